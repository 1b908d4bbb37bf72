"""A second thing to learn beside consistency: tell what a view shows.

From each patch token the patch's own cells, from the class token a grid over the whole view, in the
figures of `core.describe`. No label and no other image is needed, so it teaches from the first step
and cannot collapse; what it cannot teach is what two pictures of one finding share.
"""

import math
from typing import cast

from torch import Tensor, nn

from core.describe import FIGURES, describe
from core.errors import UserError

GRID_CELLS = 8
"""Cells a side of the whole view, which the class token describes."""
PATCH_CELLS = 2
"""Cells a side of what a patch token describes."""
USUAL_PICTURES = 128
"""Pictures of a modality whose figures say what is usual."""

Usual = tuple[Tensor, Tensor, Tensor, Tensor]
"""Mean and deviation of the grid's figures, then of the patches', of one modality."""


class Description(nn.Module):
    """The heads that tell it, and how far off they are.

    Figures count from what is usual in their modality (in the grid, at their place), in units of
    their deviation: saying what is usual costs 1, for the grid and for the patches alike.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.prefix = cast(int, backbone.num_prefix_tokens)
        tokens = cast(Tensor, backbone.pos_embed).shape[1] - self.prefix
        self.side = math.isqrt(tokens)
        if not getattr(backbone, "has_class_token", False) or self.side**2 != tokens:
            raise UserError(
                "describing pictures needs a vision transformer with a class token and a "
                f"square grid of patches; found {self.prefix} tokens before {tokens} patches: "
                "choose another 'model.backbone', or leave out 'model.phantom_steps' and "
                "'loss.description_weight'"
            )
        width = cast(int, backbone.num_features)
        self.grid = nn.Linear(width, FIGURES * GRID_CELLS**2)
        self.patch = nn.Linear(width, FIGURES * PATCH_CELLS**2)

    def usual(self, pictures: Tensor, px: int) -> Usual:
        """Mean and deviation of the grid's figures and of the patches', in views of `px` pixels.

        Args:
            pictures: uint8 [B, C, H, W] of one modality, more than one.
            px: side of a view; a gradient is larger in a picture of fewer pixels.
        """
        pixels = pictures.float().expand(-1, 3, -1, -1) / 255
        if pixels.shape[-1] != px:
            pixels = nn.functional.interpolate(
                pixels, (px, px), mode="bilinear", antialias=True, align_corners=False
            )
        grid, fine = describe(pixels, GRID_CELLS, self.side * PATCH_CELLS)
        return (
            grid.mean(0, keepdim=True),
            grid.std((0, 2, 3), keepdim=True) + 1e-3,
            fine.mean((0, 2, 3), keepdim=True),
            fine.std((0, 2, 3), keepdim=True) + 1e-3,
        )

    def forward(self, tokens: Tensor, pixels: Tensor, usual: Usual) -> Tensor:
        """Mean square error of the grid plus that of the patches.

        Args:
            tokens: [B, prefix + side * side, d], the class token first.
            pixels: what they see, [B, 3, H, W] in [0, 1].
            usual: of the pictures' modality.
        """
        grid_mean, grid_std, patch_mean, patch_std = usual
        seen, close = describe(pixels, GRID_CELLS, self.side * PATCH_CELLS)
        grid, fine = (seen - grid_mean) / grid_std, (close - patch_mean) / patch_std
        patch = (self.side, PATCH_CELLS)
        cells = fine.reshape(*fine.shape[:2], *patch, *patch)  # [B, F, side, P, side, P]
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, side^2, F * P^2]
        grid_error: Tensor = self.grid(tokens[:, 0]) - grid.flatten(1)
        patch_error: Tensor = self.patch(tokens[:, self.prefix :]) - patches
        return grid_error.square().mean() + patch_error.square().mean()
