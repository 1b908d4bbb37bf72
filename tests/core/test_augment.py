import math

import pytest
import torch

from core.augment import denormalise, draws_per_image, make_views, normalise
from core.config import ViewsConfig
from core.modalities import MEAN_STD


def still(**changes: object) -> ViewsConfig:
    """Views that change nothing, but for what a test asks for."""
    quiet = ViewsConfig(
        global_px=16, local_px=8, local_views=2, global_area=(1.0, 1.0), local_area=(1.0, 1.0),
        rotation_degrees=0.0, flip_probability=0.0, jitter_probability=0.0,
        blur_probability=(0.0, 0.0, 0.0),
    )  # fmt: skip
    return quiet.model_copy(update=changes)


def images(channels: int = 3, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (5, channels, 16, 16), generator=draws, dtype=torch.uint8)


def views_of(images_BCHW: torch.Tensor, config: ViewsConfig, seed: int = 0):
    return make_views(images_BCHW, "us", config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_recipes_number_and_size(channels: int) -> None:
    views = views_of(images(channels), ViewsConfig(global_px=16, local_px=8, local_views=3))
    assert views.global_VBCHW.shape == (2, 5, 3, 16, 16)
    assert views.local_VBCHW.shape == (3, 5, 3, 8, 8)
    assert torch.isfinite(views.global_VBCHW).all()


def test_no_local_views_give_an_empty_stack() -> None:
    assert views_of(images(), still(local_views=0)).local_VBCHW.shape == (0, 5, 3, 8, 8)


def test_the_same_generator_gives_the_same_bits_and_another_does_not() -> None:
    config = ViewsConfig(global_px=16, local_px=8)
    first, again, other = (views_of(images(), config, seed).global_VBCHW for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_crop_of_the_whole_area_resembles_the_image() -> None:
    config = still(global_area=(1.0, 1.0))
    # The aspect is drawn in 3/4..4/3: a whole-area crop loses up to 14 % of one side.
    view = views_of(images(), config).global_VBCHW[0]
    whole = normalise(images().float() / 255, "us")
    correlation = torch.corrcoef(torch.stack([view.flatten(), whole.flatten()]))[0, 1]
    assert correlation > 0.3


def test_flip_mirrors_every_image() -> None:
    plain = views_of(images(), still()).global_VBCHW[0]
    flipped = views_of(images(), still(flip_probability=1.0)).global_VBCHW[0]
    assert torch.allclose(flipped, plain.flip(-1), atol=1e-4)


def test_jitter_keeps_grey_grey_and_colours_in_range() -> None:
    config = still(jitter_probability=1.0, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1)
    grey = images(1).expand(-1, 3, -1, -1)
    view = views_of(grey, config).global_VBCHW[0]
    mean, std = MEAN_STD["us"]
    pixels = view * std[0] + mean[0]
    assert torch.allclose(pixels[:, 0], pixels[:, 1], atol=2e-3)
    assert pixels.min() > -1e-3
    assert pixels.max() < 1 + 1e-3


def test_blur_keeps_the_mean_and_lowers_the_contrast() -> None:
    config = still(global_px=224, blur_probability=(1.0, 0.0, 0.0), blur_sigma=(2.0, 2.0))
    checker = ((torch.arange(224)[:, None] + torch.arange(224)) // 4 % 2 * 255).to(torch.uint8)
    blurred, sharp = views_of(checker.expand(1, 1, 224, 224), config).global_VBCHW
    assert blurred.mean().item() == pytest.approx(sharp.mean().item(), abs=0.05)
    assert blurred.std() < 0.5 * sharp.std()


def test_rotation_fills_corners_with_black_and_keeps_the_centre() -> None:
    white = torch.full((8, 1, 16, 16), 255, dtype=torch.uint8)
    view = views_of(white, still(rotation_degrees=45.0)).global_VBCHW[0]
    mean, std = MEAN_STD["us"]
    pixels = view * std[0] + mean[0]
    assert pixels[:, :, 8, 8].min() > 0.99
    assert pixels[:, :, 0, 0].min() < 0.5


def test_a_small_area_shows_a_small_part() -> None:
    ramp = torch.arange(16, dtype=torch.float32).mul(17).to(torch.uint8).expand(64, 1, 16, 16)
    spans = {}
    for area in (0.05, 1.0):
        view = views_of(ramp, still(global_area=(area, area))).global_VBCHW[0]
        spans[area] = float((view.amax((1, 2, 3)) - view.amin((1, 2, 3))).mean())
    assert spans[0.05] == pytest.approx(spans[1.0] * math.sqrt(0.05), rel=0.35)


def test_denormalised_pixels_are_the_pixels_that_were_normalised() -> None:
    pixels = images().float() / 255
    restored = denormalise(normalise(pixels, "cfp"), "cfp")
    assert torch.allclose(restored, pixels.expand_as(restored), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 5), slice(0, 5)])
def test_global_views_of_some_images_alone_are_those_of_all_views_of_the_batch(
    channels: int, rows: slice
) -> None:
    """From the first columns of their rows of draws: so the first pass of a part sees them."""
    config = ViewsConfig(global_px=16, local_px=8, local_views=3, blur_sigma=(1.0, 10.0))
    draws = torch.rand(5, draws_per_image(config), generator=torch.Generator().manual_seed(3))
    whole = make_views(images(channels), "us", config, draws)
    part = make_views(images(channels)[rows], "us", config, draws[rows])
    assert torch.allclose(part.global_VBCHW, whole.global_VBCHW[:, rows], atol=1e-5)
    assert torch.allclose(part.local_VBCHW, whole.local_VBCHW[:, rows], atol=1e-5)
    only = config.model_copy(update={"local_views": 0})
    look = make_views(images(channels)[rows], "us", only, draws[rows, : draws_per_image(only)])
    assert torch.equal(look.global_VBCHW, part.global_VBCHW)
