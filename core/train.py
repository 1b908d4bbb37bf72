"""The training loop of one site: teacher and student, memory, losses, schedules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from core.augment import denormalise, make_views
from core.backbone import Network, use_plain_attention
from core.checkpoint import Arrays
from core.config import Recipe
from core.description import Description, Usual
from core.losses import random_blocks
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.objective import Objective, losses_of
from core.optimizer import clip_each, make_optimizer
from core.randomness import derive_seed, torch_generator
from core.schedules import ema_momentum, learning_rate, teacher_temperature, weight_decay

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps asked for, and the loss."""


@dataclass
class Batch:
    """Images of one modality."""

    modality: int
    images: Tensor  # uint8 [B, C, H, W]
    patients: Tensor  # int64 [B]


@dataclass
class TrainState:
    """Everything that changes while training; `step` counts over the whole study."""

    student: Network
    teacher: Network
    optimizer: torch.optim.AdamW
    bank: MemoryBank
    device: torch.device
    step: int = 0
    extra_slots: dict[int, Tensor] = field(default_factory=dict)
    """modality -> prototypes [P, D] of all sites, compared with like entries of the memory."""
    usual: dict[int, Usual] = field(default_factory=dict)
    """modality -> what pictures show of it at this site, if the recipe has them described."""


def new_state(recipe: Recipe, device: torch.device, *site_key: int | str) -> TrainState:
    """Networks of the recipe's shape, an optimiser, and a memory of random anchors.

    Weights are as timm draws them; load the global state before training.
    """
    student = Network.of(recipe, drop_path=recipe.model.drop_path).to(device)
    teacher = Network.of(recipe).to(device).requires_grad_(False)
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
    arrays: Arrays = {}
    for name, parameter in state.student.named_parameters():
        for moment, value in state.optimizer.state.get(parameter, {}).items():
            arrays[f"optimizer/{moment}/{name}"] = value.cpu().numpy()
    if keep_memory:
        arrays |= {f"memory/{name}": array for name, array in state.bank.to_arrays().items()}
    return arrays


def load_private(state: TrainState, arrays: Arrays) -> None:
    """The inverse of `private_arrays`; an empty dict leaves a fresh state."""
    for name, parameter in state.student.named_parameters():
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            if (array := arrays.get(f"optimizer/{moment}/{name}")) is not None:
                moments = state.optimizer.state[parameter]
                moments[moment] = torch.from_numpy(array.copy()).to(parameter.device)
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
) -> dict[str, float]:
    """Train `steps` steps in place and return metrics under their wire names.

    Args:
        state: networks, optimiser and memory; changed in place.
        batches: global step -> one batch a modality.
        recipe: the study.
        steps: how many.
        site: names the random streams, so that sites draw different views.
        on_step: progress, called after each step.
    """
    device, parameters = state.device, list(state.student.parameters())
    sums: dict[str, Tensor] = {}
    for done in range(1, steps + 1):
        step = state.step
        set_rates(state.optimizer, recipe, step)
        current = batches(step)
        names = [MODALITIES[batch.modality] for batch in current]
        sizes = [len(batch.images) for batch in current]
        streams = [torch_generator(recipe.seed, site, "step", step, name) for name in names]
        views = [
            make_views(_to(batch.images, device), name, recipe.views, draws)
            for batch, name, draws in zip(current, names, streams, strict=True)
        ]
        large = torch.cat([part.global_VBCHW for part in views], dim=1)  # [2, B, C, H, W]
        small = torch.cat([part.local_VBCHW for part in views], dim=1)
        with torch.no_grad():
            targets = torch.split(_embed(state.teacher, large, recipe), sizes, dim=1)
        objectives = [
            _objective(state, recipe, batch.modality, teacher, draws)
            for batch, teacher, draws in zip(current, targets, streams, strict=True)
        ]
        if recipe.model.drop_path:  # timm draws which paths to drop from torch's own generator
            torch.manual_seed(derive_seed(recipe.seed, site, "paths", step))
        state.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for first_view, pixels in ((0, large), (len(large), small)):
            if len(pixels) == 0:
                continue
            part, figures = _loss(state, recipe, current, objectives, pixels, first_view)
            torch.autograd.backward(part)  # frees these views' activations
            total += part.detach()
            for wire, value in figures.items():
                sums[wire] = sums.get(wire, torch.zeros((), device=device)) + value
        clip_each(parameters, recipe.optim.clip_norm)
        state.optimizer.step()
        follow(state, ema_momentum(recipe, step))
        for batch, teacher in zip(current, targets, strict=True):
            # After the loss: a batch never meets itself.
            state.bank.write(batch.modality, teacher[1], batch.patients)
        state.step += 1
        if on_step is not None:
            on_step(done, steps, float(total))
    return {name: float(value) / steps for name, value in sums.items()}


def embed_global(state: TrainState, batch: Batch, recipe: Recipe, *key: int | str) -> Tensor:
    """Teacher embeddings [B, D] of the second global view, to refill a memory; no gradient."""
    name = MODALITIES[batch.modality]
    draws = torch_generator(recipe.seed, "refill", name, *key)
    views = make_views(_to(batch.images, state.device), name, recipe.views, draws)
    with torch.no_grad(), _precision(recipe, state.device):
        embeddings: Tensor = state.teacher(views.global_VBCHW[1])
    return embeddings


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether this device trains the recipe under bf16 autocast."""
    if recipe.optim.precision == "auto":
        # On a CPU both kinds of bf16 unit pay from a width of 128 on, by 1.5 to 2 times.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return device.type == "cuda" or fast
    return recipe.optim.precision == "bf16"


def loss_ceiling(entries: int, blocks: int) -> float:
    """Loss and teacher entropy of a constant output: the mean over blocks of ln(their entries)."""
    return float(np.mean([math.log(len(part)) for part in np.array_split(range(entries), blocks)]))


def _to(images: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # pinned memory lets the copy run beside the kernels
        return images.pin_memory().to(device, non_blocking=True)
    return images.to(device)


def _embed(network: Network, pixels_VBCHW: Tensor, recipe: Recipe) -> Tensor:
    """Embeddings [V, B, D] of all batches, in one pass: small passes use a processor badly."""
    with _precision(recipe, pixels_VBCHW.device):
        embeddings: Tensor = network(pixels_VBCHW.flatten(0, 1))
    return embeddings.view(*pixels_VBCHW.shape[:2], -1)


def _precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    dtype = torch.bfloat16 if uses_bf16(recipe, device) else None
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _loss(
    state: TrainState,
    recipe: Recipe,
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    pixels_VBCHW: Tensor,
    first_view: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What some views of a step add to its loss, and to its figures by wire name."""
    described = state.student.description is not None and first_view == 0
    if described:
        with _precision(recipe, state.device):
            embeddings, tokens = state.student.with_tokens(pixels_VBCHW.flatten(0, 1))
        embeddings = embeddings.view(*pixels_VBCHW.shape[:2], -1)
        tokens = tokens.float().view(*pixels_VBCHW.shape[:2], *tokens.shape[1:])  # [V, B, N, d]
    else:
        embeddings = _embed(state.student, pixels_VBCHW, recipe)
    total, first = embeddings.new_zeros(()), 0
    figures: dict[str, Tensor] = {}
    students = torch.split(embeddings, [len(batch.images) for batch in batches], dim=1)
    losses = losses_of(objectives, students, first_view)
    for batch, (loss, found) in zip(batches, losses, strict=True):
        rows = slice(first, first := first + len(batch.images))
        if described:
            found["description"] = _description(
                state, batch.modality, tokens[:, rows], pixels_VBCHW[:, rows]
            )
            loss = loss + recipe.loss.description_weight * found["description"]
        total = total + len(batch.images) / embeddings.shape[1] * loss
        figures |= {f"{key}/{MODALITIES[batch.modality]}": v.detach() for key, v in found.items()}
    return total, figures


def _description(state: TrainState, modality: int, tokens: Tensor, pixels_VBCHW: Tensor) -> Tensor:
    description = cast(Description, state.student.description)
    shown = denormalise(pixels_VBCHW.flatten(0, 1), MODALITIES[modality])
    error: Tensor = description(tokens.flatten(0, 1), shown, state.usual[modality])
    return error


def _objective(
    state: TrainState, recipe: Recipe, modality: int, teacher: Tensor, draws: torch.Generator
) -> Objective:
    """What the student's views of a batch are compared with in the state's step."""
    memory = state.bank.embeddings[modality]
    if (slots := state.extra_slots.get(modality)) is not None:
        memory = torch.cat([memory, slots])
    return Objective(
        teacher,
        memory,
        state.bank.mean(modality) if recipe.memory.centred else None,
        random_blocks(len(memory), recipe.memory.blocks, draws),
        len(teacher) + recipe.views.local_views,
        recipe.loss.student_temperature,
        teacher_temperature(recipe, state.step),
        recipe.loss.koleo_weight,
    )


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
