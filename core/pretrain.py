"""Initial weights from drawn pictures: a start that needs no download and no patient.

A backbone learns, on phantoms of all seven modalities, to tell what it sees: from each patch token
the patch's own cells, from the class token a grid over the whole view (`core.describe`). The
coordinator does it once, before a study; `model.init_file` hands the result to round 1.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from core.augment import denormalise, make_views
from core.backbone import Network, initialise, use_plain_attention
from core.config import Recipe
from core.describe import FIGURES, describe
from core.errors import UserError
from core.modalities import MODALITIES
from core.optimizer import clip_each
from core.phantoms import make_phantoms
from core.randomness import torch_generator
from core.sampling import batch_share, draw
from core.train import uses_bf16

GRID_CELLS = 8
"""Cells a side of the whole view, which the class token describes."""
PATCH_CELLS = 2
"""Cells a side of what a patch token describes."""
_USUAL = 128
"""Phantoms of a modality whose figures say what is usual."""


@dataclass(frozen=True)
class Pretraining:
    """How long and on what."""

    steps: int = 400
    phantoms: int = 2000
    """Different pictures of each modality."""
    batch_size: int = 56
    """Pictures a step, split evenly over the modalities; each gives two views."""
    learning_rate: float = 1.5e-3
    """Highest, after a tenth of the steps; then a cosine to 0."""
    area: tuple[float, float] = (0.5, 1.0)
    """Share of a picture that a view shows."""
    position_std: float = 0.5
    """Deviation of the first position embedding. Patch tokens have deviations of about 1: beside
    them attention cannot see the usual .02, and the class token learns no layout."""
    ema_momentum: float = 0.95
    """Of the averaged weights that are the result; rises to 1 by a cosine."""


def pretrain(
    recipe: Recipe,
    settings: Pretraining,
    *,
    device: str = "cpu",
    on_step: Callable[[float], None] | None = None,
) -> Network:
    """Train the recipe's backbone to describe phantoms; the same seed draws the same pictures.

    Args:
        recipe: backbone, view size and augmentation, precision, seed.
        settings: the rest.
        device: a torch device name, from `resolve_device`.
        on_step: progress, called with the loss after each step.

    Returns:
        The network on the CPU, averaged over the steps; its head is as it was drawn.

    Raises:
        UserError: the backbone has no class token, or its patches form no square grid.
    """
    place = torch.device(device)
    network = _start(recipe, settings).to(place)
    averaged = copy.deepcopy(network).requires_grad_(False)
    own, smooth = list(network.parameters()), list[Tensor](averaged.parameters())
    lesson = Lesson(network.backbone, recipe.seed).to(place)
    optimizer = torch.optim.AdamW([*own, *lesson.parameters()], weight_decay=0.05, fused=True)
    views = recipe.views.model_copy(update={"local_views": 0, "global_area": settings.area})
    dtype = torch.bfloat16 if uses_bf16(recipe, place) else None
    pictures = {name: _pictures(recipe, settings, name).to(place) for name in MODALITIES}
    usual = {name: lesson.usual(images[:_USUAL]) for name, images in pictures.items()}
    for step in range(settings.steps):
        draws = torch_generator(recipe.seed, "pretrain", step)
        shown = {}
        for index, (name, images) in enumerate(pictures.items()):
            start, count = batch_share(len(pictures), index, settings.batch_size, step)
            chosen = draw(np.arange(len(images)), start, count, recipe.seed, "pretrain", name)
            made = make_views(images[torch.from_numpy(chosen).to(place)], name, views, draws)
            shown[name] = made.global_VBCHW.flatten(0, 1)  # [2 * count, 3, px, px]
        with torch.autocast(place.type, dtype, enabled=dtype is not None):
            tokens = network.backbone.forward_features(torch.cat([*shown.values()]))  # type: ignore[operator]
        parts = tokens.float().split([len(batch) for batch in shown.values()])
        losses = [
            lesson(part, denormalise(batch, name), usual[name])
            for part, (name, batch) in zip(parts, shown.items(), strict=True)
        ]
        loss = torch.stack(losses).mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each([*own, *lesson.parameters()], recipe.optim.clip_norm)
        optimizer.step()
        moved = (1 - settings.ema_momentum) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        with torch.no_grad():
            torch._foreach_lerp_(smooth, list[Tensor](own), moved)
        if on_step is not None:
            on_step(float(loss.detach()))
    return averaged.cpu()


class Lesson(nn.Module):
    """What the tokens have to tell, and how far off they are.

    Figures count from what is usual in their modality (in the grid, at their place), in units of
    their deviation: saying what is usual costs 1, for the grid and for the patches alike.
    """

    def __init__(self, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        self.prefix = cast(int, backbone.num_prefix_tokens)
        tokens = cast(Tensor, backbone.pos_embed).shape[1] - self.prefix
        self.side = math.isqrt(tokens)
        if not getattr(backbone, "has_class_token", False) or self.side**2 != tokens:
            raise UserError(
                "pretraining on phantoms needs a vision transformer with a class token and a "
                f"square grid of patches; found {self.prefix} tokens before {tokens} patches: "
                "choose another 'model.backbone', or start from random weights"
            )
        width = cast(int, backbone.num_features)
        self.grid = nn.Linear(width, FIGURES * GRID_CELLS**2)
        self.patch = nn.Linear(width, FIGURES * PATCH_CELLS**2)
        draws = torch_generator(seed, "pretrain", "heads")
        for head in (self.grid, self.patch):
            nn.init.trunc_normal_(head.weight, std=width**-0.5, generator=draws)
            nn.init.zeros_(head.bias)

    def usual(self, pictures: Tensor) -> list[Tensor]:
        """Mean and deviation of the grid's figures and of the patches', of uint8 pictures."""
        pixels = pictures.float().expand(-1, 3, -1, -1) / 255
        grid, fine = describe(pixels, GRID_CELLS), describe(pixels, self.side * PATCH_CELLS)
        return [
            grid.mean(0, keepdim=True),
            grid.std((0, 2, 3), keepdim=True) + 1e-3,
            fine.mean((0, 2, 3), keepdim=True),
            fine.std((0, 2, 3), keepdim=True) + 1e-3,
        ]

    def forward(self, tokens: Tensor, pixels: Tensor, usual: list[Tensor]) -> Tensor:
        """Mean square error of the grid plus that of the patches.

        Args:
            tokens: [B, prefix + side * side, d], the class token first.
            pixels: what they see, [B, 3, H, W] in [0, 1].
            usual: of the pictures' modality.
        """
        grid_mean, grid_std, patch_mean, patch_std = usual
        grid = (describe(pixels, GRID_CELLS) - grid_mean) / grid_std
        fine = (describe(pixels, self.side * PATCH_CELLS) - patch_mean) / patch_std
        patch = (self.side, PATCH_CELLS)
        cells = fine.reshape(*fine.shape[:2], *patch, *patch)  # [B, F, side, P, side, P]
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, side^2, F * P^2]
        grid_error: Tensor = self.grid(tokens[:, 0]) - grid.flatten(1)
        patch_error: Tensor = self.patch(tokens[:, self.prefix :]) - patches
        return grid_error.square().mean() + patch_error.square().mean()


def _start(recipe: Recipe, settings: Pretraining) -> Network:
    network = Network(recipe.model, recipe.views.global_px)
    draws = torch_generator(recipe.seed, "initial")
    initialise(network, draws)
    position = cast(Tensor, network.backbone.pos_embed)
    nn.init.trunc_normal_(position, std=settings.position_std, generator=draws)
    use_plain_attention(network)
    return network


def _pictures(recipe: Recipe, settings: Pretraining, name: str) -> Tensor:
    """uint8 [N, C, px, px]: a patient each, so that no two share their anatomy."""
    shard = make_phantoms(
        name,
        patients=settings.phantoms,
        images_per_patient=1,
        px=recipe.views.global_px,
        seed=recipe.seed,
    )
    return torch.from_numpy(shard.images).permute(0, 3, 1, 2).contiguous()


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
