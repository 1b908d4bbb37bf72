"""The two losses, semantic consistency against the memory and KoLeo, and their centre.

Sources: MaSSL (Silva et al., ICML 2024) and MerMED-FM (arXiv 2507.00185) for the consistency,
DINOv2 (arXiv 2304.07193) for KoLeo on the embeddings of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def random_blocks(entries: int, blocks: int, generator: torch.Generator) -> list[Tensor]:
    """Cut the indices of the memory's entries into `blocks` random parts of (nearly) one size."""
    return list(torch.randperm(entries, generator=generator).tensor_split(blocks))


def centre(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors [..., D] of the embeddings' difference from the memory's mean [D].

    A young network gives all images of a modality almost the same embedding. What they share says
    nothing of an image and would fill every similarity; without it they differ from the first step,
    and the views need not be driven apart along whatever varies most, which is the augmentation.
    The mean is the memory's, not the batch's: no image is compared with its batch.
    """
    return torch.nn.functional.normalize(embeddings - mean, dim=-1, eps=1e-6)


def consistency_loss(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    blocks: Sequence[Tensor],
    student_temperature: float,
    teacher_temperature: float,
    *,
    first_view: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy between the views' similarities to the entries of each block.

    With q(u) and p(v) the softmax over a block of (embedding . entry / temperature) for teacher
    view u and student view v of one image, the loss is the mean over pairs u != v, blocks and
    images of - sum_j q_j(u) log p_j(v). Since log p_j is v . m_j / T less the logarithm of the
    normaliser, that sum is the latter less v . (sum_j q_j m_j) / T: the logits of a view are the
    only product as large as the memory, and what a student view meets is added up as vectors [D].

    Args:
        student: unit embeddings [V, B, D] of all views or of some that follow each other.
        teacher: unit embeddings [U, B, D] of the global views, without gradient.
        memory: unit entries [K, D] of the images' modality.
        blocks: index vectors that cut 0..K-1, from `random_blocks`.
        student_temperature: positive.
        teacher_temperature: positive; below the student's it sharpens the targets.
        first_view: place of the first of the student's views; the teacher's views are 0 to U-1.

    Returns:
        The loss, and the mean entropy of the targets in nats (no gradient): both tend to
        ln(entries of a block) when the embeddings collapse.
    """
    num_views, batch = student.shape[:2]
    num_targets = teacher.shape[0]
    places = torch.arange(first_view, first_view + num_views, device=student.device)[:, None]
    meets = (places != torch.arange(num_targets, device=student.device)).to(student.dtype)  # [V, U]
    order = torch.cat(list(blocks)).to(memory.device)
    loss, entropy = student.new_zeros(()), student.new_zeros(())
    for entries in torch.split(memory[order], [len(b) for b in blocks]):  # [P, D]
        scores = teacher @ entries.T / teacher_temperature  # [U, B, P]
        q = torch.softmax(scores, dim=-1)
        means = q @ entries  # [U, B, D]
        logits = student @ entries.T / student_temperature  # [V, B, P]
        targets = torch.einsum("vu,ubd->vbd", meets, means) / student_temperature  # [V, B, D]
        normaliser = torch.logsumexp(logits, dim=-1) * meets.sum(1, keepdim=True)  # [V, B]
        loss = loss + normaliser.sum() - (targets * student).sum()
        expected = (teacher * means).sum() / teacher_temperature
        entropy = entropy + (torch.logsumexp(scores, dim=-1).sum() - expected)
    pairs = meets.sum() * batch * len(blocks)
    return loss / pairs, entropy / (num_targets * batch * len(blocks))


def koleo_loss(embeddings: Tensor) -> Tensor:
    """Mean of - log(distance to the nearest other embedding): large when embeddings crowd together.

    Args:
        embeddings: unit vectors [B, D] of one modality and one view, B >= 2.
    """
    with torch.no_grad():
        similarity = embeddings @ embeddings.T
        nearest = similarity.fill_diagonal_(-2).argmax(dim=1)  # [B]
    distance = torch.nn.functional.pairwise_distance(embeddings, embeddings[nearest], eps=1e-8)
    return -torch.log(distance + 1e-8).mean()
