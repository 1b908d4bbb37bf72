"""Initial weights from drawn pictures: a start that needs no download and no patient.

A backbone learns, on phantoms of all seven modalities, to tell what it sees (`core.description`).
The coordinator does it once, before a study; `model.init_file` hands the result to round 1.
"""

import copy
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor

from core.augment import denormalise, make_views
from core.backbone import Network, initialise, use_plain_attention
from core.config import Recipe
from core.description import USUAL_PICTURES, Description
from core.device import uses_bf16
from core.optimizer import clip_each
from core.phantoms import draw_pictures
from core.pretrain_state import PretrainState
from core.randomness import torch_generator
from core.sampling import batch_share, draw
from core.train import OnStep

USUAL_BATCH = 14


@dataclass(frozen=True)
class Pretraining:
    """How long and on what."""

    steps: int = 400
    phantoms: int | None = None
    """Different pictures of each modality; without it five for eight steps, so that the usual batch
    shows each about three times."""
    batch_size: int = USUAL_BATCH
    """Pictures a step, split evenly over the modalities; each gives two views. In the same
    CPU time many steps of few teach more than few steps of many (benchmarks)."""
    learning_rate: float = 1.5e-3
    """Highest of the usual batch, after a tenth of the steps; then a cosine to 0. It grows with the
    root of the batch."""
    area: tuple[float, float] = (0.5, 1.0)
    """Share of a picture that a view shows."""
    ema_momentum: float = 0.95
    """Of the averaged weights that are the result; rises to 1 by a cosine."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """That of a study."""
        model = recipe.model
        return cls(model.phantom_steps, model.phantoms or None, model.phantom_batch)


def pretrain(
    recipe: Recipe,
    settings: Pretraining,
    *,
    device: str = "cpu",
    on_step: OnStep | None = None,
    keep: Path | None = None,
) -> Network:
    """Train the recipe's backbone to describe phantoms; the same seed draws the same pictures.

    Args:
        recipe: backbone, view size and augmentation, precision, seed.
        settings: the rest.
        device: a torch device name, from `resolve_device`.
        on_step: progress, called after each step.
        keep: a file that has every minute what was learnt until then. A call that finds it, with
            the same recipe, settings and weights, goes on from there, to the same bits; who called
            removes it once the result is safe.

    Returns:
        The network on the CPU, averaged over the steps; its projection head is as it was drawn, and
        the describing heads are there if the recipe goes on with them.

    Raises:
        UserError: the backbone has no class token, or its patches form no square grid,
            or what was kept is damaged.
    """
    place = torch.device(device)
    network = _start(recipe).to(place)
    averaged = copy.deepcopy(network).requires_grad_(False)
    own, smooth = list(network.parameters()), list[Tensor](averaged.parameters())
    description = cast(Description, network.description)
    optimizer = torch.optim.AdamW(own, weight_decay=0.05, fused=True)
    views = recipe.views.model_copy(update={"local_views": 0, "global_area": settings.area})
    dtype = torch.bfloat16 if uses_bf16(recipe, place) else None
    pictures = {name: images.to(place) for name, images in _pictures(recipe, settings).items()}
    usual = {
        name: description.usual(images[:USUAL_PICTURES], views.global_px)
        for name, images in pictures.items()
    }
    first, state = 0, None
    if keep is not None:
        state = PretrainState(keep, _name(recipe, settings, network), network, averaged, optimizer)
        first = state.load()
    highest = settings.learning_rate * math.sqrt(settings.batch_size / USUAL_BATCH)
    for step in range(first, settings.steps):
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
            description(part, denormalise(batch, name), usual[name])
            for part, (name, batch) in zip(parts, shown.items(), strict=True)
        ]
        loss = torch.stack(losses).mean()
        for group in optimizer.param_groups:
            group["lr"] = highest * _rate(step, settings.steps)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each(own, recipe.optim.clip_norm)
        optimizer.step()
        moved = (1 - settings.ema_momentum) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        with torch.no_grad():
            torch._foreach_lerp_(smooth, list[Tensor](own), moved)
        done = step + 1
        if state is not None:
            state.save(done, last=done == settings.steps)
        if on_step is not None:
            on_step(done, settings.steps, float(loss.detach()))
    if recipe.loss.description_weight == 0:
        averaged.description = None
    return averaged.cpu()


def _name(recipe: Recipe, settings: Pretraining, network: Network) -> str:
    """Weights are named too: what another version has kept may have others."""
    weights = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    asked = json.dumps([recipe.to_json(), dataclasses.asdict(settings), weights])
    return hashlib.sha256(asked.encode()).hexdigest()


def _start(recipe: Recipe) -> Network:
    network = Network(recipe.model, recipe.views.global_px, describes=True)
    initialise(network, torch_generator(recipe.seed, "initial"))
    use_plain_attention(network)
    return network


def _pictures(recipe: Recipe, settings: Pretraining) -> dict[str, Tensor]:
    """Modality -> uint8 [N, C, px, px]: a patient each, so that no two share their anatomy."""
    count = settings.phantoms or max(USUAL_PICTURES, settings.steps * 5 // 8)
    drawn = draw_pictures(count, px=recipe.views.global_px, seed=recipe.seed)
    return {
        name: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        for name, images in drawn.items()
    }


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
