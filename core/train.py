"""The training loop of one site, and what it keeps: networks, memory, moments, schedules."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from core.augment import make_views
from core.backbone import Network, use_plain_attention
from core.batch import Batch
from core.checkpoint import Arrays
from core.config import Recipe
from core.device import precision, to_device
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.optimizer import clip_each, load_moments, make_optimizer, moment_arrays
from core.randomness import torch_generator
from core.ranks import ALONE, Ranks
from core.schedules import ema_momentum, learning_rate, weight_decay
from core.step import TrainState, add_gradients

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps asked for, and the loss."""


def new_state(recipe: Recipe, device: torch.device, *site_key: int | str) -> TrainState:
    """Networks of the recipe's shape, an optimiser, and a memory of random anchors.

    Weights are as timm draws them; load the global state before training.
    """
    student = Network.of(recipe, drop_path=recipe.model.drop_path).to(device)
    teacher = Network.of(recipe).to(device).requires_grad_(False)
    if recipe.model.checkpointing:
        cast(Any, student.backbone).set_grad_checkpointing()
    if device.type == "cpu":
        use_plain_attention(student)
        use_plain_attention(teacher)
    anchors = torch_generator(recipe.seed, "anchors", *site_key)
    bank = MemoryBank(recipe.memory.entries_per_modality, recipe.model.embedding_dim, anchors)
    return TrainState(student, teacher, make_optimizer(student, recipe), bank.to(device), device)


def network_arrays(network: Network) -> Arrays:
    """Weights and buffers by name."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in network.state_dict().items()}


def load_network(network: Network, arrays: Arrays) -> None:
    """Replace all weights and buffers; names and shapes were checked on admission."""
    network.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})


def private_arrays(state: TrainState, *, keep_memory: bool) -> Arrays:
    """What a site keeps on its disk between rounds: optimiser moments and memory."""
    arrays = moment_arrays(state.optimizer, state.student)
    if keep_memory:
        arrays |= {f"memory/{name}": array for name, array in state.bank.to_arrays().items()}
    return arrays


def load_private(state: TrainState, arrays: Arrays) -> None:
    """The inverse of `private_arrays`; an empty dict leaves a fresh state."""
    load_moments(state.optimizer, state.student, arrays)
    memory = {n.removeprefix("memory/"): a.copy() for n, a in arrays.items() if "memory/" in n}
    if memory:
        state.bank.load_arrays(memory)


def train(
    state: TrainState,
    batches: Callable[[int], Sequence[Batch]],
    recipe: Recipe,
    steps: int,
    *,
    site: str,
    on_step: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train `steps` steps in place and return metrics under their wire names.

    Args:
        state: networks, optimiser and memory; changed in place.
        batches: global step -> one batch a modality; the same on every rank.
        recipe: the study.
        steps: how many.
        site: names the random streams, so that sites draw different views.
        on_step: progress, called after each step.
        ranks: those that share each step's images; all of them end with the same networks, moments
            and memory.

    Raises:
        RankLost: another rank is gone.
    """
    parameters = list(state.student.parameters())
    sums: dict[str, Tensor] = {}
    for done in range(1, steps + 1):
        set_rates(state.optimizer, recipe, state.step)
        current = batches(state.step)
        state.optimizer.zero_grad()
        met = add_gradients(state, recipe, current, site, sums, ranks)
        clip_each(parameters, recipe.optim.clip_norm)
        state.optimizer.step()
        follow(state, ema_momentum(recipe, state.step))
        for batch, embeddings in zip(current, met.embeddings, strict=True):
            # After the loss: a batch never meets itself.
            state.bank.write(batch.modality, embeddings, batch.patients)
        state.step += 1
        if on_step is not None:
            on_step(done, steps, float(met.total))
    ranks.add(list(sums.values()))
    return {name: float(value) / steps for name, value in sums.items()}


def embed_global(state: TrainState, batch: Batch, recipe: Recipe, *key: int | str) -> Tensor:
    """Teacher embeddings [B, D] of the second global view, to refill a memory; no gradient."""
    name = MODALITIES[batch.modality]
    draws = torch_generator(recipe.seed, "refill", name, *key)
    views = make_views(to_device(batch.images[:], state.device), name, recipe.views, draws)
    with torch.no_grad(), precision(recipe, state.device):
        embeddings: Tensor = state.teacher(views.global_VBCHW[1])
    return embeddings


def loss_ceiling(entries: int, blocks: int) -> float:
    """Loss and teacher entropy of a constant output: the mean over blocks of ln(their entries)."""
    return float(np.mean([math.log(len(part)) for part in np.array_split(range(entries), blocks)]))


def set_rates(optimizer: torch.optim.AdamW, recipe: Recipe, step: int) -> None:
    """Set the learning rate and weight decay of a global step."""
    rate, decay = learning_rate(recipe, step), weight_decay(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0


def follow(state: TrainState, momentum: float) -> None:
    """Move the teacher towards the student."""
    with torch.no_grad():
        averaged: list[Tensor] = list(state.teacher.parameters())
        torch._foreach_lerp_(averaged, list[Tensor](state.student.parameters()), 1 - momentum)
