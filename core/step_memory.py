"""What a training step takes of memory, told from the recipe alone.

Counted are weights, moments and gradients, the memory bank, the views, and what autograd keeps of
the larger of the two passes of a part (`core.step` goes backward through one resolution before the
next, and through one part of a batch before the next). With checkpointing it errs by up to a
quarter, to the safe side. The formula is for timm's plain vision transformer; a convolutional stem
before it is tried with one image. `benchmarks/step_peak.py`, `benchmarks/training_step.py` and the
tests hold it against bytes.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.backbone import Network
from core.config import Recipe
from core.describe import FIGURES
from core.description import PATCH_CELLS
from core.modalities import MODALITIES
from core.step import views_together


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step at its peak, by what holds them."""

    weights: int
    """Student, teacher, both moments, gradients, and the weights in half precision."""
    bank: int
    views: int
    activations: int
    """Of the larger pass, kept for its backward, and what that works in."""
    logits: int

    @property
    def total(self) -> int:
        """All of it; the allocator and the library come on top."""
        return self.weights + self.bank + self.views + self.activations + self.logits


def step_memory(
    recipe: Recipe, *, half: bool, fused_attention: bool, devices: int = 1
) -> StepMemory:
    """Predict the peak of a step on one device.

    Args:
        recipe: model, views, batch and memory.
        half: whether the passes run under bf16 autocast.
        fused_attention: whether attention keeps no [N, N] weights (a GPU), or does (a CPU).
        devices: how many share the batch.
    """
    with torch.device("meta"):
        network = Network.of(recipe)
    parameters = sum(p.numel() for p in network.parameters())
    views, size = recipe.views, 2 if half else 4
    batch = -(-recipe.optim.batch_size // (devices * recipe.optim.accumulate))  # of a part
    anew = recipe.model.checkpointing
    block: Any = network.backbone.blocks[0]  # type: ignore[index]
    passes = []
    together = views_together(views, batch)
    for px, count in zip((views.global_px, views.local_px), together, strict=True):
        kept = kept_bytes(
            network, px, count * batch, half=half, fused_attention=fused_attention, anew=anew
        )
        # One block's backward holds gradients before and after the GELU, and two of its tokens.
        works_in = 2 * size * block.mlp.fc1.out_features + 2 * 4 * block.attn.proj.out_features
        passes.append(kept + works_in * count * batch * _tokens(network.backbone, px))
    pixels = 3 * (2 * views.global_px**2 + views.local_views * views.local_px**2)
    entries, dim = recipe.memory.entries_per_modality, recipe.model.embedding_dim
    compared = max(2, views.local_views) * batch * entries  # each image with its own ring alone
    return StepMemory(
        weights=parameters * (5 * 4 + (2 if half else 0)),
        bank=len(MODALITIES) * entries * dim * 4,
        views=2 * 4 * batch * pixels,  # of each modality, and all of them joined
        activations=max(passes),
        logits=3 * 4 * compared,  # logits, their softmax, its gradient
    )


def kept_bytes(
    network: Network, px: int, images: int, *, half: bool, fused_attention: bool, anew: bool = False
) -> int:
    """What autograd keeps of a forward pass of the student, weights apart.

    Args:
        network: the student, on any device.
        px: side of the images.
        images: how many go through together.
        half: bf16 autocast.
        fused_attention: see `step_memory`.
        anew: with `model.checkpointing`: what goes into each block, and all of one that is on its
            way back.
    """
    backbone: Any = network.backbone
    block, size = backbone.blocks[0], 2 if half else 4
    width, hidden = backbone.embed_dim, block.mlp.fc1.out_features
    tokens = _tokens(backbone, px)
    # A token: what both norms take in, and give; query, key, value; what attention gives; what the
    # GELU takes and gives.
    row = 2 * 4 * width + (2 + 3 + 1) * size * width + 2 * size * hidden
    if not fused_attention:
        row += size * block.attn.num_heads * tokens
    depth = len(backbone.blocks)
    described = network.description is not None and px == int(backbone.patch_embed.img_size[0])
    if anew:  # the last block then runs in full
        kept = depth * 4 * width + row
    elif described:  # so it does here: all its tokens are read
        kept = depth * row
    else:
        kept = (depth - 1) * row + (4 + size) * width  # the class token's part: core.class_token
    if described:  # the last norm, in and out; what the patches' head reads; how far off it is
        kept += 3 * 4 * width + 4 * FIGURES * PATCH_CELLS**2
    stem = _stem_bytes(backbone.patch_embed, px, half=half)
    return int(images * (tokens * kept + 3 * size * px**2 + stem))


def _stem_bytes(embed: Any, px: int, *, half: bool) -> int:
    """What a pass of one image through a hybrid's convolutions keeps, the image apart."""
    if not hasattr(embed, "backbone"):
        return 0
    stem = copy.deepcopy(embed.backbone).to_empty(device="cpu")
    weights = {tuple(p.shape) for p in stem.parameters()}
    image = torch.zeros(1, 3, px, px)
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in weights | {tuple(image.shape)}:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        features = stem(image)
        features = features[-1] if isinstance(features, list | tuple) else features
        look(features.to(torch.bfloat16) if half else features)  # the projection takes it in
    return sum(kept.values())


def _tokens(backbone: Any, px: int) -> int:
    return int((px // backbone.patch_embed.feat_ratio()) ** 2 + backbone.num_prefix_tokens)
