"""Masked autoencoders (He et al., CVPR 2022), federated as SSL-FL does (Yan et al., TMI 2023).

Three quarters of the patches are hidden; the backbone sees the others, and a small decoder draws
the hidden ones, each patch brought to mean 0 and deviation 1. Backbone and decoder are averaged.
"""

import math

import torch
from competitor_step import Competitor, Step, precision
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from core.backbone import create_backbone
from core.config import Recipe

HIDDEN_SHARE = 0.75
WIDTH = 64
HEADS = 4


class MaskedAutoencoder(nn.Module):
    """A backbone and a decoder of `depth` blocks, WIDTH wide."""

    description = None  # nothing describes: core.backbone.initialise asks

    def __init__(self, recipe: Recipe, depth: int) -> None:
        super().__init__()
        px = recipe.views.global_px
        self.backbone = create_backbone(recipe.model, px, drop_path=recipe.model.drop_path)
        self.patch = int(self.backbone.patch_embed.feat_ratio())
        side = px // self.patch
        self.enter = nn.Linear(self.backbone.num_features, WIDTH)
        self.missing = nn.Parameter(torch.zeros(WIDTH))
        self.places = build_sincos2d_pos_embed([side, side], dim=WIDTH)  # [N, WIDTH], fixed
        self.blocks = nn.Sequential(*[Block(WIDTH, HEADS, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.leave = nn.Linear(WIDTH, 3 * self.patch**2)

    def encode(self, pixels: Tensor, seen: Tensor) -> Tensor:
        """Tokens [B, 1 + n, d] of the class and of the patches that are seen [B, n]."""
        vit = self.backbone
        pixels = pixels * self._shown(seen)  # convolutions would carry hidden ones into others
        tokens = vit._pos_embed(vit.patch_embed(pixels))
        first = vit.num_prefix_tokens
        patches = tokens[:, first:].gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = vit.norm_pre(torch.cat([tokens[:, :first], patches], dim=1))
        return vit.norm(vit.blocks(tokens))

    def _shown(self, seen: Tensor) -> Tensor:
        """1 at the pixels of patches that are seen [B, 1, H, W], 0 at the others."""
        side = math.isqrt(len(self.places))
        shown = torch.zeros(len(seen), side**2, device=seen.device).scatter(1, seen, 1.0)
        return nn.functional.interpolate(shown.view(-1, 1, side, side), scale_factor=self.patch)

    def forward(self, pixels: Tensor, seen: Tensor) -> Tensor:
        """All patches as they are drawn [B, N, 3 P^2] from those that are seen."""
        tokens = self.enter(self.encode(pixels, seen))
        first = self.backbone.num_prefix_tokens
        batch, places = len(pixels), self.places.to(tokens)
        drawn = self.missing.to(tokens.dtype).expand(batch, len(places), WIDTH)
        index = seen[..., None].expand(-1, -1, WIDTH)
        drawn = drawn.scatter(1, index, tokens[:, first:]) + places
        drawn = self.blocks(torch.cat([tokens[:, :first], drawn], dim=1))
        return self.leave(self.norm(drawn))[:, first:]

    def targets(self, pixels: Tensor) -> Tensor:
        """The patches themselves [B, N, 3 P^2], normalised each."""
        flat = nn.functional.unfold(pixels, self.patch, stride=self.patch).mT
        mean, variance = flat.mean(-1, keepdim=True), flat.var(-1, keepdim=True)
        return (flat - mean) / (variance + 1e-6).sqrt()


def hide(count: int, patches: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which patches of each image are seen [B, n], and a mask of the hidden ones [B, N]."""
    order = torch.rand(count, patches, generator=draws).argsort(1)
    seen = order[:, : patches - round(HIDDEN_SHARE * patches)]
    hidden = torch.ones(count, patches, dtype=torch.bool).scatter(1, seen, value=False)
    return seen, hidden


def masked_autoencoder(*, depth: int) -> Competitor:
    """The method; its views are all of the global size."""

    def loss(step: Step) -> Tensor:
        pixels = torch.cat([step.large, step.small]).flatten(0, 1)
        drawn_places = hide(len(pixels), len(step.student.places), step.draws)
        seen, hidden = (part.to(pixels.device) for part in drawn_places)
        with precision(step.recipe, pixels.device):
            drawn = step.student(pixels, seen)
        error = (drawn.float() - step.student.targets(pixels)).square().mean(-1)  # [B, N]
        return error[hidden].mean()

    return Competitor(lambda recipe: MaskedAutoencoder(recipe, depth), loss)
