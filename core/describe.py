"""What the cells of a picture show, in figures: directions of the grey gradient, and colours.

The targets of `core.description`. The idea of predicting gradient histograms is MaskFeat's (Wei et
al., CVPR 2022, arXiv 2112.09133); the histograms are Dalal and Triggs' (CVPR 2005), here without
overlapping blocks.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

DIRECTIONS = 8
"""Bins of the half circle: a gradient and its opposite count as one direction."""
FIGURES = 2 * DIRECTIONS + 2 * 3
"""Figures a cell: directions relative to the cell's energy, directions, mean colour, deviation."""


def describe(pixels: Tensor, *grids: int) -> list[Tensor]:
    """Describe each cell of one or several grids; the gradients are taken once for all.

    Args:
        pixels: [B, 3, H, W] in [0, 1].
        grids: cells a side of each; they overlap where it does not divide H and W.

    Returns:
        A grid's [B, FIGURES, cells, cells]: roots of the mean gradient by direction, once divided
        by the cell's own norm (what texture) and once as they are (how much), then mean and
        deviation of each colour.
    """
    directions, squares = _directions(pixels), pixels.square()
    found = []
    for cells in grids:
        histogram = (functional.adaptive_avg_pool2d(directions, cells) + 1e-4).sqrt()
        relative = histogram / (histogram.square().sum(1, keepdim=True) + 0.01).sqrt()
        mean = functional.adaptive_avg_pool2d(pixels, cells)
        square = functional.adaptive_avg_pool2d(squares, cells)
        deviation = (square - mean.square()).clamp(min=0).add(1e-5).sqrt()
        found.append(torch.cat([relative, histogram, mean, deviation], dim=1))
    return found


def _directions(pixels: Tensor) -> Tensor:
    """Size of the grey gradient, shared between the two nearest of the directions [B, D, H, W]."""
    grey = functional.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = grey[:, 0, 1:-1, 2:] - grey[:, 0, 1:-1, :-2]
    down = grey[:, 0, 2:, 1:-1] - grey[:, 0, :-2, 1:-1]
    size = torch.hypot(across, down)
    position = torch.atan2(down, across) % math.pi / math.pi * DIRECTIONS
    lower = position.floor()
    share = position - lower
    bins = lower.long() % DIRECTIONS  # rounding may bring an angle up to pi itself
    result = size.new_zeros(len(size), DIRECTIONS, *size.shape[1:])
    result.scatter_add_(1, bins[:, None], (size * (1 - share))[:, None])
    result.scatter_add_(1, (bins[:, None] + 1) % DIRECTIONS, (size * share)[:, None])
    return result
