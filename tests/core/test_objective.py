from dataclasses import replace

import pytest
import torch

from core.losses import random_blocks
from core.objective import Among, Objective, losses_of


def unit(*shape: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=draws), dim=-1)


def objective(
    num_views: int, batch: int, *, centred: bool, seed: int = 0, entries: int = 20, cuts: int = 3
) -> Objective:
    mean = 0.3 * unit(8, seed=seed + 4) if centred else None
    blocks = random_blocks(entries, cuts, torch.Generator().manual_seed(seed + 3))
    teacher, memory = unit(2, batch, 8, seed=seed + 1), unit(entries, 8, seed=seed + 2)
    return Objective(teacher, memory, mean, blocks, num_views, 0.1, 0.04, 0.5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ends", [(2, 5), (1, 2, 5), (1, 5)])
def test_losses_and_gradients_of_some_views_add_up_to_those_of_all(
    batch: int, centred: bool, ends: tuple[int, ...]
) -> None:
    compare = objective(5, batch, centred=centred)
    whole = unit(5, batch, 8, seed=0).requires_grad_()
    loss, figures = compare.of_views(whole, 0)
    loss.backward()
    parts = unit(5, batch, 8, seed=0).requires_grad_()
    total, sums = 0.0, dict.fromkeys(figures, 0.0)
    for first_view, end in zip((0, *ends), ends, strict=False):
        part, part_figures = compare.of_views(parts[first_view:end], first_view)
        part.backward()
        total += float(part.detach())
        for name, value in part_figures.items():
            sums[name] += float(value)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums == pytest.approx({name: float(value) for name, value in figures.items()}, rel=1e-5)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-4, atol=1e-6)
    assert set(figures) == {"loss", "koleo", "teacher_entropy"}


@pytest.mark.parametrize("centred", [True, False])
def test_losses_and_gradients_of_parts_of_a_batch_add_up_to_those_of_the_batch(
    centred: bool,
) -> None:
    compare = objective(5, 6, centred=centred)
    whole = unit(5, 6, 8, seed=0).requires_grad_()
    everyone = whole[:2].detach()
    loss, figures = compare.of_views(whole, 0)
    loss.backward()
    parts = unit(5, 6, 8, seed=0).requires_grad_()
    total, sums = 0.0, dict.fromkeys(figures, 0.0)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        some = replace(compare, teacher=compare.teacher[:, rows])
        part, part_figures = some.of_views(parts[:, rows], 0, Among(everyone, rows))
        part.backward()
        total += float(part.detach())
        for name, value in part_figures.items():
            sums[name] += float(value)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums == pytest.approx({name: float(value) for name, value in figures.items()}, rel=1e-5)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_as_some_images_of_itself_has_the_same_bits() -> None:
    losses, gradients = [], []
    for some in (False, True):
        student = unit(5, 4, 8, seed=0).requires_grad_()
        among = Among(student[:2].detach(), slice(0, 4)) if some else None
        loss, _ = objective(5, 4, centred=True).of_views(student, 0, among)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(student.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_a_single_image_has_no_neighbour_and_no_koleo() -> None:
    _, figures = objective(2, 1, centred=False).of_views(unit(2, 1, 8, seed=0), 0)
    assert float(figures["koleo"]) == 0
    _, figures = objective(2, 3, centred=False).of_views(unit(2, 3, 8, seed=0), 0)
    assert float(figures["koleo"]) != 0


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("first_view", [0, 2])
def test_modalities_together_have_the_losses_and_gradients_of_each_alone(
    centred: bool, cuts: int, first_view: int
) -> None:
    """Batches and memories of several sizes, in no order; some at hand in part."""
    shapes = [(4, 20), (3, 20), (4, 20), (4, 23), (4, 20), (1, 20), (4, 20), (4, 20), (4, 20)]
    starts = [None, None, None, None, 2, 0, 2, 0, 2]  # of the images at hand, in batches of 7
    among = [
        None if start is None else Among(unit(2, 7, 8, seed=70 + p), slice(start, start + batch))
        for p, (start, (batch, _)) in enumerate(zip(starts, shapes, strict=True))
    ]
    objectives = [
        objective(5, batch, centred=centred, seed=10 * place, entries=entries, cuts=cuts)
        for place, (batch, entries) in enumerate(shapes)
    ]

    def students() -> list[torch.Tensor]:
        return [unit(2, b, 8, seed=90 + p).requires_grad_() for p, (b, _) in enumerate(shapes)]

    alone, together = students(), students()
    expected = [
        o.of_views(s, first_view, a) for o, s, a in zip(objectives, alone, among, strict=True)
    ]
    found = losses_of(objectives, together, first_view, among)
    torch.stack([loss for loss, _ in expected]).sum().backward()
    torch.stack([loss for loss, _ in found]).sum().backward()
    for (loss, figures), (other, others) in zip(found, expected, strict=True):
        assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-6)
        assert {n: float(v) for n, v in figures.items()} == pytest.approx(
            {n: float(v) for n, v in others.items()}, rel=1e-5
        )
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)
