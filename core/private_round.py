"""One round at one site under differential privacy of its patients (recipe: privacy.mode 'record').

The twin of core.site_round: the same arguments and results, other training. What it returns to be
sent is made of the received state, public images and sums with noise alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from core.checkpoint import Arrays
from core.config import Recipe
from core.privacy.accounting import releases_prototypes
from core.privacy.memory import comparisons, public_memory
from core.privacy.network import choose_trainable, learning, refuse_coupling
from core.privacy.noise import PrivateRandom
from core.privacy.release import released_prototypes
from core.privacy.sampling import Patients, Rows, draw_patients
from core.privacy.step import PrivateOptimizer
from core.privacy.unit import Comparison, one_by_one, together, unit_loss
from core.privacy.views import patient_views, stacks
from core.schedules import ema_momentum
from core.shards import Shard
from core.step import TrainState
from core.train import (
    OnStep,
    follow,
    load_network,
    load_private,
    network_arrays,
    new_state,
    private_arrays,
    set_rates,
)
from core.wire import GlobalState, Prototypes, SiteUpdate


def private_round(
    recipe: Recipe,
    received: GlobalState,
    shards: Sequence[Shard],
    private: Arrays,
    *,
    site: str,
    declared: Mapping[str, int],
    first_step: int,
    device: str,
    on_step: OnStep | None = None,
) -> tuple[SiteUpdate, Arrays]:
    """Train one round from the received global state by DP-SGD.

    Args:
        recipe: the study, with privacy.mode 'record'.
        received: global weights and released prototypes.
        shards: the site's images.
        private: what this function returned as second value last time; empty at first.
        site: name, for the random streams of what is public.
        declared: modality -> images, as the site's file states them: they weigh the update. Exact
            counts would tell whether one patient is there.
        first_step: global step at which the round starts.
        device: a torch device name, from `core.device.resolve_device`.
        on_step: progress. The loss it is given is that of the step's patients without noise: it
            must not leave the site. NaN in a step without patients.

    Returns:
        The update, and the arrays to keep on the site's disk: optimiser moments, which are made of
        sums with noise.

    Raises:
        UserError: the recipe's network cannot train privately.

    **Guarantees**:
        - The round takes `federation.local_steps` noisy steps, neither more nor fewer, whatever
          patients there are, and releases prototypes only in the recipe's rounds: what
          `core.privacy.accounting.round_events` charges.
        - In a step, adding or removing one patient of the site changes the sum that gets noise by
          at most `privacy.clip_norm` (to one part in 10,000, for rounding).
        - Which patients are in a step, and the noise, come from the operating system; the recipe's
          seed decides neither.
        - The update's metrics are empty and its counts are `declared`.
    """
    target = torch.device(device)
    state = new_state(recipe, target, site)
    load_network(state.student, received.student)
    load_network(state.teacher, received.teacher)
    load_private(state, private)
    state.step = first_step
    rounds_done = first_step // recipe.federation.local_steps

    refuse_coupling(state.student)
    privacy = recipe.privacy
    choose_trainable(state.student, privacy.trainable, privacy.trainable_blocks)
    patients, random = Patients(shards), PrivateRandom()
    memories = {
        modality: public_memory(recipe, state, modality, received.prototypes)
        for modality in patients.modalities
    }
    optimizer = PrivateOptimizer(
        state.optimizer,
        {name: p for name, p in state.student.named_parameters() if p.requires_grad},
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        expected_patients=privacy.expected_patients,
        random=random,
    )
    steps = recipe.federation.local_steps
    for done in range(1, steps + 1):
        set_rates(state.optimizer, recipe, state.step)
        drawn = draw_patients(patients, privacy.sampling_rate, privacy.images_per_patient, random)
        compared = comparisons(recipe, memories, site, state.step)
        loss = add_patients(recipe, state, optimizer, patients, drawn, compared, random)
        optimizer.step()
        follow(state, ema_momentum(recipe, state.step))
        state.step += 1
        if on_step is not None:
            on_step(done, steps, loss)

    prototypes = Prototypes({}, {})
    if releases_prototypes(recipe, rounds_done + 1):
        prototypes = released_prototypes(
            recipe, state, patients, sorted(declared), received.prototypes, random
        )
    update = SiteUpdate(
        round_number=rounds_done + 1,
        student=network_arrays(state.student),
        teacher=network_arrays(state.teacher) if recipe.federation.teacher == "average" else {},
        prototypes=prototypes,
        num_examples=dict(declared),
        metrics={},
    )
    return update, private_arrays(state, keep_memory=False)


def add_patients(
    recipe: Recipe,
    state: TrainState,
    optimizer: PrivateOptimizer,
    patients: Patients,
    drawn: Sequence[Rows],
    compared: Mapping[int, Comparison],
    random: PrivateRandom,
) -> float:
    """Add the clipped gradients of one step's patients to the optimiser's sum.

    Returns:
        The mean of the patients' losses, without noise; NaN if there are no patients.
    """
    privacy, device = recipe.privacy, state.device
    size, gradients_of = (
        (privacy.chunk, together) if privacy.gradients == "vmap" else (1, one_by_one)
    )
    parameters, losses = learning(state.student), []
    for kinds, stack in stacks(patients, drawn, size):
        views = patient_views(patients, kinds, stack, recipe.views, random, device)
        targets = teacher_embeddings(state.teacher, views[0])
        loss = unit_loss(state.student, [compared[modality] for modality, _ in kinds])
        gradients, values = gradients_of(loss, parameters, *views, targets)
        optimizer.add(gradients)
        losses.append(values)
    return float(torch.cat(losses).mean()) if losses else float("nan")


@torch.no_grad()
def teacher_embeddings(teacher: nn.Module, global_NVMCHW: Tensor) -> Tensor:
    """Embeddings [n, 2, m, D] of n patients' global views."""
    rows: Tensor = teacher(global_NVMCHW.flatten(0, 2))
    return rows.view(*global_NVMCHW.shape[:3], -1)
