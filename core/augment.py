"""Multi-crop views of a whole batch at once, on the device that trains.

One family for all modalities, as in MerMED-FM: rotation, random resized crop and flip (one affine
resampling), weak colour jitter (one colour matrix), Gaussian blur; no grayscale, no solarisation.
All draws are made on the CPU, so a GPU sees the same views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from core.config import ViewsConfig
from core.modalities import MEAN_STD

_LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = torch.tensor([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)
_DRAWS = 13
"""Of a view: six for the crop, five for the colours, two for the blur."""


@dataclass(frozen=True)
class Views:
    """Normalised views of a batch."""

    global_VBCHW: Tensor
    local_VBCHW: Tensor


def make_views(
    images: Tensor, modality: str, views: ViewsConfig, draws: torch.Generator | Tensor
) -> Views:
    """Two global and `local_views` local views of every image.

    Args:
        images: uint8 [B, C, H, W] with C 1 or 3, on any device.
        modality: whose mean and deviation normalise the result.
        views: sizes and strengths.
        draws: uniform draws of each image [B, `draws_per_image`], on the CPU, or the CPU generator
            that makes them.

    Returns:
        Views with three channels.

    **Guarantees**: the views of an image are a function of its pixels and its own row of draws,
    whatever other images are in the batch.
    """
    batch = len(images)
    if isinstance(draws, torch.Generator):
        draws = torch.rand(batch, draws_per_image(views), generator=draws)
    rows = draws.float().view(batch, 2 + views.local_views, _DRAWS).permute(2, 1, 0)  # [13, V, B]
    pixels = images.float() / 255
    first, second, local = views.blur_probability
    several = [local] * views.local_views
    large = _views(pixels, views.global_px, views.global_area, [first, second], rows[:, :2], views)
    small = _views(pixels, views.local_px, views.local_area, several, rows[:, 2:], views)
    return Views(normalise(large, modality), normalise(small, modality))


def draws_per_image(views: ViewsConfig) -> int:
    """Uniform draws that `make_views` takes for an image."""
    return (2 + views.local_views) * _DRAWS


def normalise(pixels: Tensor, modality: str) -> Tensor:
    """Bring [..., C, H, W] in [0, 1] to three channels with the modality's mean and deviation."""
    mean, std = MEAN_STD[modality]
    shift = pixels.new_tensor(mean)[:, None, None]
    scale = pixels.new_tensor(std)[:, None, None]
    return (pixels - shift) / scale


def denormalise(pixels: Tensor, modality: str) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = MEAN_STD[modality]
    return pixels * pixels.new_tensor(std)[:, None, None] + pixels.new_tensor(mean)[:, None, None]


def _views(
    pixels: Tensor,
    size: int,
    area: tuple[float, float],
    blur: Sequence[float],
    rows: Tensor,
    views: ViewsConfig,
) -> Tensor:
    """Views [V, B, C, size, size] in [0, 1], one for each probability of a blur.

    Args:
        pixels: [B, C, H, W] in [0, 1].
        size: side of a view in pixels.
        area: lowest and highest share of the image.
        blur: V probabilities.
        rows: draws [_DRAWS, V, B].
        views: strengths.
    """
    count, batch = rows.shape[1:]
    if count == 0:
        return pixels.new_zeros((0, *pixels.shape[:2], size, size))
    crops = _crop(pixels, size, area, views, rows[:6])  # [V, B, C, size, size]
    flat = _jitter(crops.flatten(0, 1), views, rows[6:11].flatten(1))
    chosen = (rows[11] < torch.tensor(blur)[:, None]).flatten()
    if bool(chosen.any()):
        places = chosen.nonzero()[:, 0].to(flat.device)
        sigmas = _between(rows[12].flatten()[chosen], *views.blur_sigma)
        flat[places] = _blur(flat[places], sigmas, views.blur_sigma[1])
    return flat.view(count, batch, *flat.shape[1:])


def _between(draws: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draws


def _crop(
    pixels: Tensor, size: int, area: tuple[float, float], views: ViewsConfig, draws: Tensor
) -> Tensor:
    """Rotate about the image centre, crop a random share of the area, flip, resample once.

    Images [B, C, H, W] and draws [6, V, B] -> [V, B, C, size, size].
    """
    count, batch = draws.shape[1:]
    share = _between(draws[0], *area)
    aspect = torch.exp(_between(draws[1], math.log(3 / 4), math.log(4 / 3)))
    half_width = (share * aspect).sqrt().clamp(max=1)  # [V, B], in half-image units
    half_height = (share / aspect).sqrt().clamp(max=1)
    centre_x = (1 - half_width) * _between(draws[2], -1, 1)
    centre_y = (1 - half_height) * _between(draws[3], -1, 1)
    flip = 1 - 2 * (draws[4] < views.flip_probability).float()
    angle = torch.deg2rad(_between(draws[5], -1, 1) * views.rotation_degrees)
    cos, sin = angle.cos(), angle.sin()
    right = torch.stack([cos * half_width * flip, sin * half_width * flip], dim=-1)  # [V, B, 2]
    down = torch.stack([-sin * half_height, cos * half_height], dim=-1)
    centre = torch.stack([cos * centre_x - sin * centre_y, sin * centre_x + cos * centre_y], dim=-1)
    right, down, centre = (
        part.transpose(0, 1)[:, :, None, None].to(pixels.device) for part in (right, down, centre)
    )
    places = (2 * torch.arange(size, device=pixels.device) + 1) / size - 1  # of pixels' centres
    grid = right * places[:, None] + (down * places[:, None, None] + centre)  # [B, V, s, s, 2]
    # One below the other, so that an image's views are sampled from it without copies of it.
    tall = grid.flatten(1, 2)
    sampled = functional.grid_sample(pixels, tall, padding_mode="zeros", align_corners=False)
    return sampled.view(batch, -1, count, size, size).permute(2, 0, 1, 3, 4)


def _jitter(pixels: Tensor, views: ViewsConfig, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of images [N, C, H, W], by draws [5, N].

    One matrix and offset an image: what contrast adds is grey, which hue and saturation keep.
    """
    batch, channels = pixels.shape[:2]
    chosen = draws[0] < views.jitter_probability
    brightness, contrast, saturation = (
        torch.where(chosen, _between(draw, 1 - strength, 1 + strength), torch.ones(()))
        for draw, strength in zip(
            draws[1:4], (views.brightness, views.contrast, views.saturation), strict=True
        )
    )
    matrix = (brightness * contrast)[:, None, None]  # [N, 1, 1]
    if channels == 3:
        hue = _between(draws[4], -views.hue, views.hue)
        turn = 2 * math.pi * torch.where(chosen, hue, torch.zeros(()))
        chroma = torch.zeros(batch, 3, 3)
        chroma[:, 0, 0] = 1
        chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * turn.cos()
        chroma[:, 1, 2], chroma[:, 2, 1] = -saturation * turn.sin(), saturation * turn.sin()
        matrix = matrix * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)  # [N, 3, 3]
    flat = pixels.flatten(2)  # [N, C, H * W]
    means = flat.mean(2)
    grey = means[:, 0] if channels == 1 else (means * means.new_tensor(_LUMA)).sum(1)
    offset = ((1 - contrast) * brightness).to(pixels.device) * grey
    coloured = torch.baddbmm(offset[:, None, None], matrix.to(pixels.device), flat)
    return coloured.clamp_(0, 1).view(pixels.shape)


def _blur(pixels: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Blur images [N, C, H, W] by a separable Gaussian, a sigma [N] each, in pixels at 224 px."""
    size = pixels.shape[-1]
    radius = math.ceil(3 * largest * size / 224)
    offsets = torch.arange(-radius, radius + 1)
    widths = (sigmas * size / 224).clamp(min=1e-3)[:, None]
    kernel = torch.exp(-0.5 * (offsets / widths) ** 2)  # [N, T]
    taps = (kernel / kernel.sum(1, keepdim=True)).to(pixels.device)
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = functional.pad(pixels, pad, mode="reflect")
        pixels = torch.zeros_like(pixels)
        for place, tap in enumerate(taps.unbind(1)):
            pixels.addcmul_(padded.narrow(axis, place, size), tap[:, None, None, None])
    return pixels
