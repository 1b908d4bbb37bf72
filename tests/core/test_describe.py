import pytest
import torch

from core.describe import DIRECTIONS, FIGURES, describe


def test_a_flat_picture_has_its_colour_and_no_direction() -> None:
    pixels = torch.tensor([0.2, 0.5, 0.8])[None, :, None, None].expand(1, 3, 16, 16)
    (figures,) = describe(pixels, 4)
    assert figures.shape == (1, FIGURES, 4, 4)
    histogram = figures[0, DIRECTIONS : 2 * DIRECTIONS]
    assert histogram.max() < 0.011  # the root of what keeps it differentiable
    colours = figures[0, 2 * DIRECTIONS : 2 * DIRECTIONS + 3, 0, 0]
    assert colours.tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert figures[0, -3:].max() < 0.004


@pytest.mark.parametrize(("degrees", "expected"), [(0, 0), (45, 2), (90, 4), (135, 6), (180, 0)])
def test_a_ramp_points_in_its_direction_and_its_opposite_alike(degrees, expected) -> None:
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramp = 0.5 + 0.01 * (angle.cos() * (columns - 16) + angle.sin() * (rows - 16))
    figures = describe(ramp.expand(1, 3, 32, 32), 4)[0][0, :DIRECTIONS, 1:3, 1:3]  # no border
    strongest, second = figures.topk(2, dim=0).values
    assert (figures.argmax(0) == expected).all()
    assert (strongest > 5 * second).all()


def test_a_gradient_between_two_directions_is_shared() -> None:
    angle = torch.deg2rad(torch.tensor(180.0 / DIRECTIONS / 2))
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramp = 0.5 + 0.01 * (angle.cos() * (columns - 16) + angle.sin() * (rows - 16))
    figures = describe(ramp.expand(1, 3, 32, 32), 4)[0][0, :DIRECTIONS, 1, 1]
    assert float(figures[0]) == pytest.approx(float(figures[1]), rel=1e-3)


def test_contrast_moves_how_much_and_hardly_what_texture() -> None:
    noise = 0.5 + 0.2 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (strong,), (weak,) = describe(noise, 4), describe(0.5 + (noise - 0.5) / 2, 4)
    texture, amount = slice(DIRECTIONS), slice(DIRECTIONS, 2 * DIRECTIONS)
    assert (weak[:, texture] / strong[:, texture]).mean() > 0.95
    assert (weak[:, amount] / strong[:, amount]).mean() == pytest.approx(0.5**0.5, abs=0.01)


def test_each_cell_tells_of_its_own_pixels() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, :, :4, 12:] = 1.0
    mean = describe(pixels, 4)[0][0, 2 * DIRECTIONS]
    assert mean[0, 3] == 1
    assert mean.sum() == 1


def test_several_grids_at_once_are_those_of_each_alone() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for together, cells in zip(describe(pixels, 4, 8), (4, 8), strict=True):
        assert torch.equal(together, describe(pixels, cells)[0])
