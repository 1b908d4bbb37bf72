import math

import pytest
import torch

from core.losses import centre, consistency_loss, koleo_loss, random_blocks


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=draws), dim=-1)


def written_formula(student, teacher, memory, blocks, student_temperature, teacher_temperature):
    """The design's formula, term by term: mean over pairs, blocks, images of - sum q log p."""
    terms = []
    for u in range(len(teacher)):
        for v in range(len(student)):
            if u == v:
                continue
            for block in blocks:
                for image in range(student.shape[1]):
                    target = [
                        math.exp(float(teacher[u, image] @ memory[j]) / teacher_temperature)
                        for j in block
                    ]
                    guess = [
                        math.exp(float(student[v, image] @ memory[j]) / student_temperature)
                        for j in block
                    ]
                    terms.append(
                        -sum(
                            t / sum(target) * math.log(g / sum(guess))
                            for t, g in zip(target, guess, strict=True)
                        )
                    )
    return sum(terms) / len(terms)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("views", [2, 5])
def test_loss_equals_the_formula_written_naively(blocks: int, views: int) -> None:
    student, teacher, memory = unit(views, 3, 8), unit(2, 3, 8, seed=1), unit(14, 8, seed=2)
    parts = random_blocks(14, blocks, torch.Generator().manual_seed(3))
    loss, _ = consistency_loss(student, teacher, memory, parts, 0.1, 0.04)
    expected = written_formula(student, teacher, memory, parts, 0.1, 0.04)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_the_memory_beyond_the_student() -> None:
    student = unit(3, 4, 8).requires_grad_()
    memory = unit(16, 8, seed=2)
    loss, entropy = consistency_loss(
        student, unit(2, 4, 8, seed=1), memory, [torch.arange(16)], 0.1, 0.04
    )
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert not entropy.requires_grad


def test_constant_embeddings_meet_the_ceiling_of_loss_and_entropy() -> None:
    constant = unit(1, 1, 8).expand(4, 5, 8)
    memory = constant[0, :1].expand(32, 8)
    loss, entropy = consistency_loss(
        constant, constant[:2], memory, list(torch.arange(32).split(16)), 0.1, 0.04
    )
    assert float(loss) == pytest.approx(math.log(16), rel=1e-5)
    assert float(entropy) == pytest.approx(math.log(16), rel=1e-5)


def test_own_rings_equal_one_ring_with_a_mask_under_balanced_batches() -> None:
    """MerMED-FM masks entries of other modalities to -inf in one ring."""
    modalities, entries, batch = 3, 12, 4
    rings = unit(modalities, entries, 8, seed=5)
    student, teacher = unit(4, modalities * batch, 8), unit(2, modalities * batch, 8, seed=1)
    of_image = torch.arange(modalities).repeat_interleave(batch)
    of_entry = torch.arange(modalities).repeat_interleave(entries)
    ring = rings.reshape(-1, 8)

    mask = torch.where(of_image[:, None] == of_entry, 0.0, -math.inf)  # [B, K]
    log_p = torch.log_softmax(student @ ring.T / 0.1 + mask, -1)
    q = torch.softmax(teacher @ ring.T / 0.04 + mask, -1)
    pairs = [(u, v) for u in range(2) for v in range(4) if u != v]
    masked = torch.stack(
        [-(q[u] * log_p[v].masked_fill(mask == -math.inf, 0)).sum(-1).mean() for u, v in pairs]
    ).mean()

    own = []
    for modality in range(modalities):
        chosen = of_image == modality
        loss, _ = consistency_loss(
            student[:, chosen],
            teacher[:, chosen],
            rings[modality],
            [torch.arange(entries)],
            0.1,
            0.04,
        )
        own.append(loss)
    assert torch.stack(own).mean().item() == pytest.approx(masked.item(), rel=1e-5)


def test_blocks_part_all_entries_without_overlap() -> None:
    parts = random_blocks(37, 4, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(37))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_koleo_is_minus_log_of_the_distance_to_the_nearest_neighbour() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 2.5])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    nearest = [0.1, 0.1, 0.9, 1.5]  # angle to the nearest other point
    expected = sum(-math.log(2 * math.sin(a / 2)) for a in nearest) / 4
    assert float(koleo_loss(points)) == pytest.approx(expected, rel=1e-4)


def test_koleo_stays_finite_for_equal_embeddings() -> None:
    points = unit(1, 8).expand(6, 8).clone().requires_grad_()
    koleo_loss(points).backward()
    assert torch.isfinite(points.grad).all()


def test_centred_embeddings_are_unit_vectors_without_what_all_share() -> None:
    embeddings, shared = unit(5, 8), unit(1, 8, seed=1)[0]
    moved = centre(embeddings + shared, embeddings.mean(0) + shared)
    assert torch.allclose(moved, centre(embeddings, embeddings.mean(0)), atol=1e-5)
    assert torch.allclose(moved.norm(dim=-1), torch.ones(5))
    assert torch.isfinite(centre(embeddings, embeddings[0])).all()
