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
    """Unit vectors [..., D] of the embeddings' difference from the memory's mean [..., D].

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

    Of several modalities at once, all tensors have one more axis in front, and so have the results:
    starting many small products costs more than computing them.

    Args:
        student: unit embeddings [..., V, B, D] of all views or of some that follow each other.
        teacher: unit embeddings [..., U, B, D] of the global views, without gradient.
        memory: unit entries [..., K, D] of the images' modality.
        blocks: index vectors [..., P] that cut 0..K-1, from `random_blocks`.
        student_temperature: positive.
        teacher_temperature: positive; below the student's it sharpens the targets.
        first_view: place of the first of the student's views; the teacher's views are 0 to U-1.

    Returns:
        The loss, and the mean entropy of the targets in nats (no gradient): both tend to
        ln(entries of a block) when the embeddings collapse.
    """
    *lead, num_views, batch, dim = student.shape
    num_targets = teacher.shape[-3]
    places = torch.arange(first_view, first_view + num_views, device=student.device)[:, None]
    meets = (places != torch.arange(num_targets, device=student.device)).to(student.dtype)  # [V, U]
    met = meets.sum(1, keepdim=True)  # [V, 1]
    seen, wanted = (e.flatten(-3, -2) for e in (student, teacher))  # [..., V * B, D]
    loss = entropy = student.new_zeros(())
    for entries in _cut(memory, blocks):  # [..., P, D]
        scores = wanted @ entries.mT / teacher_temperature  # [..., U * B, P]
        means = torch.softmax(scores, dim=-1) @ entries  # [..., U * B, D]
        logits = seen @ entries.mT / student_temperature  # [..., V * B, P]
        summed = meets @ means.reshape(*lead, num_targets, batch * dim)  # [..., V, B * D]
        targets = summed.view(student.shape) / student_temperature
        normaliser = torch.logsumexp(logits, dim=-1).view(*lead, num_views, batch) * met
        loss = loss + normaliser.sum((-2, -1)) - (targets * student).sum((-3, -2, -1))
        expected = (wanted * means).sum((-2, -1)) / teacher_temperature
        entropy = entropy + (torch.logsumexp(scores, dim=-1).sum(-1) - expected)
    pairs = (num_views * num_targets - own_pairs(first_view, num_views, num_targets)) * batch
    return loss / (pairs * len(blocks)), entropy / (num_targets * batch * len(blocks))


def own_pairs(first_view: int, num_views: int, num_targets: int) -> int:
    """How many of the student's views are the teacher's too, and do not meet them."""
    return max(0, min(num_targets - first_view, num_views))


def _cut(memory: Tensor, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
    """The memory's entries of each block [..., P, D]."""
    if len(blocks) == 1:
        return [memory]  # whose order says nothing
    order = torch.cat(list(blocks), dim=-1).to(memory.device)
    if order.ndim == 1:
        shuffled = memory[order]
    else:
        shuffled = torch.stack([m[o] for m, o in zip(memory, order, strict=True)])
    return torch.split(shuffled, [b.shape[-1] for b in blocks], dim=-2)


def koleo_loss(embeddings: Tensor) -> Tensor:
    """Mean of - log(distance to the nearest other embedding): large when embeddings crowd together.

    Args:
        embeddings: unit vectors [..., B, D] of one modality and one view, B >= 2; the result has
            the axes before.
    """
    with torch.no_grad():
        similarity = embeddings @ embeddings.mT  # [..., B, B]
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)
        nearest = similarity.argmax(dim=-1, keepdim=True)  # [..., B, 1]
    others = torch.take_along_dim(embeddings, nearest, dim=-2)
    distance = torch.nn.functional.pairwise_distance(embeddings, others, eps=1e-8)
    return -torch.log(distance + 1e-8).mean(-1)
