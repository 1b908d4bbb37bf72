import pytest
import torch

from core.losses import random_blocks
from core.objective import Objective


def unit(*shape: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=draws), dim=-1)


def objective(num_views: int, batch: int, *, centred: bool) -> Objective:
    mean = 0.3 * unit(8, seed=4) if centred else None
    blocks = random_blocks(20, 3, torch.Generator().manual_seed(3))
    teacher, memory = unit(2, batch, 8, seed=1), unit(20, 8, seed=2)
    return Objective(teacher, memory, mean, blocks, num_views, 0.1, 0.04, 0.5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("centred", [True, False])
def test_losses_and_gradients_of_the_resolutions_add_up_to_those_of_all_views(
    batch: int, centred: bool
) -> None:
    compare = objective(5, batch, centred=centred)
    whole = unit(5, batch, 8, seed=0).requires_grad_()
    loss, figures = compare.of_views(whole, 0)
    loss.backward()
    parts = unit(5, batch, 8, seed=0).requires_grad_()
    total, sums = 0.0, dict.fromkeys(figures, 0.0)
    for first_view, views in ((0, slice(0, 2)), (2, slice(2, 5))):
        part, part_figures = compare.of_views(parts[views], first_view)
        part.backward()
        total += float(part.detach())
        for name, value in part_figures.items():
            sums[name] += float(value)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums == pytest.approx({name: float(value) for name, value in figures.items()}, rel=1e-5)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-4, atol=1e-6)
    assert set(figures) == {"loss", "koleo", "teacher_entropy"}


def test_a_single_image_has_no_neighbour_and_no_koleo() -> None:
    _, figures = objective(2, 1, centred=False).of_views(unit(2, 1, 8, seed=0), 0)
    assert float(figures["koleo"]) == 0
    _, figures = objective(2, 3, centred=False).of_views(unit(2, 3, 8, seed=0), 0)
    assert float(figures["koleo"]) != 0
