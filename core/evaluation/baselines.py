"""What a model must beat: raw pixels, hand-made features, and its own shape with random weights."""

import copy
import dataclasses
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.feature import hog
from torch import Tensor, nn

from core.evaluate import Features, Task
from core.evaluation.models import LoadedModel
from core.evaluation.protocol import FeatureSource
from core.randomness import torch_generator

THUMBNAIL_PX: Final = 16
HOG_PX: Final = 64
HISTOGRAM_BINS: Final = 16


def pixels(task: Task, indices: NDArray[np.int64]) -> Features:
    """The image shrunk to 16 x 16 pixels, values in [0, 1]: [n, 256 * channels]."""
    return _thumbnails(_images(task, indices))


def hand_made(task: Task, indices: NDArray[np.int64]) -> Features:
    """Histograms of oriented gradients, a thumbnail, and a histogram of each colour.

    Images are brought to 64 px first, so that cells of 8 px mean the same at every size.
    """
    images = _images(task, indices)
    if images.shape[-1] != HOG_PX:
        images = nn.functional.interpolate(
            images, (HOG_PX, HOG_PX), mode="bilinear", antialias=True, align_corners=False
        )
    shapes = [
        hog(
            image, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=0,
            feature_vector=True,
        )
        for image in images.numpy()
    ]  # fmt: skip
    return np.concatenate([np.array(shapes, np.float32), _thumbnails(images), _colours(images)], 1)


PIXELS: Final = FeatureSource("pixels", pixels)
HAND_MADE: Final = FeatureSource("HOG, thumbnail, colours", hand_made)


def random_weights(loaded: LoadedModel, seed: int) -> LoadedModel:
    """A copy of the model with weights drawn anew: what its shape alone is worth.

    Matrices and kernels get deviation (fan in)^-1/2, tokens and position embeddings .02, biases 0;
    normalisation layers pass what they get.
    """
    backbone = copy.deepcopy(loaded.model.backbone)
    draws = torch_generator("random weights", seed)
    for name, parameter in backbone.named_parameters():
        _redraw(name, parameter, draws)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    model = dataclasses.replace(loaded.model, backbone=backbone.eval())
    return dataclasses.replace(loaded, name="random init", kind="random", model=model, sha256="")


@torch.no_grad()
def _redraw(name: str, parameter: Tensor, draws: torch.Generator) -> None:
    last = name.rpartition(".")[2]
    if last == "weight" and parameter.ndim >= 2:
        deviation = parameter[0].numel() ** -0.5
    elif last == "weight" or last == "gamma":  # of a normalisation layer, or a layer's scale
        parameter.fill_(1)
        return
    elif last == "bias":
        parameter.zero_()
        return
    else:
        deviation = 0.02
    parameter.copy_(torch.randn(parameter.shape, generator=draws) * deviation)


def _images(task: Task, indices: NDArray[np.int64]) -> Tensor:
    """Pixels [n, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(task.shard.images[indices])).permute(0, 3, 1, 2).float() / 255


def _colours(images: Tensor) -> Features:
    """Share of each channel's pixels in each of 16 equal bins of brightness."""
    count, channels, size, _ = images.shape
    rows = torch.arange(count * channels).view(count, channels, 1, 1)
    bins = (images * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1) + rows * HISTOGRAM_BINS
    filled = torch.bincount(bins.flatten(), minlength=count * channels * HISTOGRAM_BINS)
    shares: Features = (filled.float() / size**2).view(count, -1).numpy()
    return shares


def _thumbnails(images: Tensor) -> Features:
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    small: Features = nn.functional.interpolate(images, size, mode="area").flatten(1).numpy()
    return small
