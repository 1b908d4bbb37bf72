"""Multi-crop views of a whole batch at once, on the device that trains.

One family for all modalities, as in MerMED-FM: rotation, random resized crop and flip (one affine
resampling), weak colour jitter (one colour matrix), Gaussian blur; no grayscale, no solarisation.
All draws are made on the CPU, so a GPU sees the same views.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from core.config import ViewsConfig
from core.modalities import MEAN_STD

_LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = torch.tensor([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


class RowDraws:
    """Uniform draws made beforehand, a row an image, handed out column by column.

    **Guarantees**: the views of an image are a function of its pixels and its own row, whatever
    other images are in the batch. From a generator they depend on the image's place in the batch.
    """

    def __init__(self, rows: Tensor) -> None:
        self._columns = iter(rows.float().unbind(1))

    def next_column(self, count: int) -> Tensor:
        """The next draw of every image [count]."""
        column = next(self._columns)
        assert column.shape == (count,)
        return column


Draws = torch.Generator | RowDraws


@dataclass(frozen=True)
class Views:
    """Normalised views of a batch."""

    global_VBCHW: Tensor
    local_VBCHW: Tensor


def make_views(images: Tensor, modality: str, views: ViewsConfig, draws: Draws) -> Views:
    """Two global and `local_views` local views of every image.

    Args:
        images: uint8 [B, C, H, W] with C 1 or 3, on any device.
        modality: whose mean and deviation normalise the result.
        views: sizes and strengths.
        draws: CPU generator of this step, or `draws_per_image` draws of each image.

    Returns:
        Views with three channels.
    """
    pixels = images.float() / 255
    large, small = views.global_px, views.local_px
    first, second, local_blur = views.blur_probability

    def view(size: int, area: tuple[float, float], blur_probability: float) -> Tensor:
        crop = _crop(pixels, size, area, views, draws)
        crop = _blur(_jitter(crop, views, draws), blur_probability, views.blur_sigma, draws)
        return normalise(crop, modality)

    global_views = [view(large, views.global_area, p) for p in (first, second)]
    local_views = [view(small, views.local_area, local_blur) for _ in range(views.local_views)]
    empty = pixels.new_zeros((0, len(pixels), 3, small, small))
    return Views(torch.stack(global_views), torch.stack(local_views) if local_views else empty)


def draws_per_image(views: ViewsConfig) -> int:
    """Uniform draws that `make_views` takes for an image."""
    return (2 + views.local_views) * 13


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


def _rand(count: int, draws: Draws) -> Tensor:
    if isinstance(draws, RowDraws):
        return draws.next_column(count)
    return torch.rand(count, generator=draws)


def _uniform(count: int, low: float, high: float, draws: Draws) -> Tensor:
    return low + (high - low) * _rand(count, draws)


def _crop(
    pixels: Tensor, size: int, area: tuple[float, float], views: ViewsConfig, draws: Draws
) -> Tensor:
    """Rotate about the image centre, crop a random share of the area, flip, resample once."""
    batch, device = len(pixels), pixels.device
    share = _uniform(batch, *area, draws)
    aspect = torch.exp(_uniform(batch, math.log(3 / 4), math.log(4 / 3), draws))
    half_width = (share * aspect).sqrt().clamp(max=1)  # [B], in half-image units
    half_height = (share / aspect).sqrt().clamp(max=1)
    centre_x = (1 - half_width) * _uniform(batch, -1, 1, draws)
    centre_y = (1 - half_height) * _uniform(batch, -1, 1, draws)
    flip = 1 - 2 * (_rand(batch, draws) < views.flip_probability).float()
    angle = torch.deg2rad(_uniform(batch, -1, 1, draws) * views.rotation_degrees)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        cos * half_width * flip, -sin * half_height, cos * centre_x - sin * centre_y,
        sin * half_width * flip, cos * half_height, sin * centre_x + cos * centre_y,
    ]  # fmt: skip
    affine = torch.stack(rows, dim=1).view(batch, 2, 3).to(device)
    shape = [batch, pixels.shape[1], size, size]
    grid = functional.affine_grid(affine, shape, align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)


def _jitter(pixels: Tensor, views: ViewsConfig, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue as one matrix and offset an image."""
    batch, channels = pixels.shape[:2]
    chosen = _rand(batch, draws) < views.jitter_probability
    brightness, contrast, saturation = (
        torch.where(chosen, _uniform(batch, 1 - strength, 1 + strength, draws), torch.ones(()))
        for strength in (views.brightness, views.contrast, views.saturation)
    )
    hue = torch.where(chosen, _uniform(batch, -views.hue, views.hue, draws), torch.zeros(()))
    gain = (brightness * contrast).to(pixels.device)[:, None, None, None]
    grey = (pixels.mean(1) if channels == 1 else _luma(pixels)).mean((1, 2))  # [B]
    offset = ((1 - contrast) * brightness).to(pixels.device) * grey
    pixels = pixels * gain + offset[:, None, None, None]
    if channels == 3:
        turn = 2 * math.pi * hue
        chroma = torch.zeros(batch, 3, 3)
        chroma[:, 0, 0] = 1
        chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * turn.cos()
        chroma[:, 1, 2], chroma[:, 2, 1] = -saturation * turn.sin(), saturation * turn.sin()
        matrix = _YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ  # [B, 3, 3]
        pixels = torch.einsum("bij,bjhw->bihw", matrix.to(pixels.device), pixels)
    return pixels.clamp(0, 1)


def _luma(pixels: Tensor) -> Tensor:
    return torch.einsum("c,bchw->bhw", pixels.new_tensor(_LUMA), pixels)


def _blur(pixels: Tensor, probability: float, sigma: tuple[float, float], draws: Draws) -> Tensor:
    """Blur a random share of the images by a separable Gaussian, a sigma each."""
    batch, channels, _, width = pixels.shape
    chosen = _rand(batch, draws) < probability
    sigmas = _uniform(batch, *sigma, draws) * width / 224  # [B], in pixels of this view
    radius = math.ceil(3 * sigma[1] * width / 224)
    if radius == 0 or not bool(chosen.any()):
        return pixels
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)  # [B, T]
    kernel = torch.where(chosen[:, None], kernel, (offsets == 0).float())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # [B*C, T]
    taps = kernel.to(pixels.device)[:, None, None]  # [B*C, 1, 1, T]
    stacked = pixels.reshape(1, batch * channels, *pixels.shape[2:])
    for weight, pad in ((taps, (radius, radius, 0, 0)), (taps.mT, (0, 0, radius, radius))):
        padded = functional.pad(stacked, pad, mode="reflect")
        stacked = functional.conv2d(padded, weight, groups=batch * channels)
    return stacked.reshape(pixels.shape)
