"""One round at one site: from the global state and the site's own files to an update.

A pure function of its arguments: what the site keeps between rounds goes in and comes out as plain
arrays, so that every round may run in a fresh process and an interrupted one leaves no trace.
"""

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from core.checkpoint import Arrays
from core.collapse import spread
from core.config import Recipe
from core.description import USUAL_PICTURES, Description, Usual
from core.evaluate import auroc, extract, knn_scores, labelled_tasks
from core.modalities import MODALITIES
from core.prototypes import site_prototypes
from core.randomness import numpy_generator
from core.ranks import ALONE, Ranks
from core.sampling import draw
from core.shards import Shard
from core.site_data import SiteData
from core.sites import training_images
from core.step import TrainState
from core.train import (
    OnStep,
    embed_global,
    load_network,
    load_private,
    loss_ceiling,
    network_arrays,
    new_state,
    private_arrays,
    train,
)
from core.wire import GlobalState, Prototypes, SiteUpdate


def site_round(
    recipe: Recipe,
    received: GlobalState,
    shards: Sequence[Shard],
    private: Arrays,
    *,
    site: str,
    first_step: int,
    device: str,
    on_step: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> tuple[SiteUpdate, Arrays]:
    """Train one round from the received global state.

    Args:
        recipe: the study.
        received: global weights; prototypes are not looked at.
        shards: the site's images.
        private: what this function returned as second value last time; empty at first.
        site: name, for the random streams.
        first_step: global step at which the round starts.
        device: a torch device name, from `resolve_device`.
        on_step: progress.
        ranks: those that share the round's steps; this is the first. The others call `help_round`
            with the same arguments.

    Returns:
        The update, and the arrays to keep on the site's disk: optimiser moments and, if the recipe
        keeps it, the memory bank. These hold patient embeddings and never leave.

    Raises:
        RankLost: another rank is gone.
    """
    data = SiteData(shards)
    state = _started(recipe, received, data, private, site, first_step, device)
    started = time.monotonic()
    metrics: dict[str, float] = {}
    every, rounds_done = recipe.evaluation.every_rounds, first_step // recipe.federation.local_steps
    if every and rounds_done % every == 0:
        metrics = knn_auroc(recipe, state.teacher.backbone, shards)
        state.teacher.train()
    trained_from = time.monotonic()
    metrics |= _train(recipe, state, data, site, on_step, ranks)
    metrics["seconds_evaluate"] = trained_from - started
    metrics["seconds_train"] = time.monotonic() - trained_from

    prototypes = Prototypes({}, {})
    for modality in data.pools:
        name = MODALITIES[modality]
        ceiling = loss_ceiling(recipe.memory.entries_per_modality, recipe.memory.blocks)
        metrics[f"loss_ceiling/{name}"] = ceiling
        embeddings, patients = state.bank.written(modality)
        if len(embeddings) > 1:
            figures = spread(embeddings, centred=recipe.memory.centred)
            metrics |= {f"{figure}/{name}": value for figure, value in figures.items()}
        centroids, counts = site_prototypes(
            embeddings.numpy(),
            patients.numpy(),
            recipe.federation.prototypes_per_modality,
            recipe.federation.prototype_min_patients,
            numpy_generator(recipe.seed, site, "prototypes", state.step),
        )
        if len(centroids):
            prototypes.centroids[name], prototypes.counts[name] = centroids, counts

    update = SiteUpdate(
        round_number=rounds_done + 1,
        student=network_arrays(state.student),
        teacher=network_arrays(state.teacher) if recipe.federation.teacher == "average" else {},
        prototypes=prototypes,
        num_examples=training_images(shards),
        metrics=metrics,
    )
    return update, private_arrays(state, keep_memory=recipe.memory.at_round_start == "kept")


def help_round(
    recipe: Recipe,
    received: GlobalState,
    shards: Sequence[Shard],
    private: Arrays,
    *,
    site: str,
    first_step: int,
    device: str,
    ranks: Ranks,
) -> None:
    """Train a round's share of a rank that is not the first; what comes of it, the first has too.

    Args and errors are those of `site_round`.
    """
    data = SiteData(shards)
    state = _started(recipe, received, data, private, site, first_step, device)
    _train(recipe, state, data, site, None, ranks)


def _started(
    recipe: Recipe,
    received: GlobalState,
    data: SiteData,
    private: Arrays,
    site: str,
    first_step: int,
    device: str,
) -> TrainState:
    """The site's state at the start of a round."""
    target = torch.device(device)
    state = new_state(recipe, target, site)
    load_network(state.student, received.student)
    load_network(state.teacher, received.teacher)
    load_private(state, private)
    state.step = first_step
    if recipe.loss.description_weight:
        state.usual = usual_of(recipe, state, data, site)
    return state


def _train(
    recipe: Recipe,
    state: TrainState,
    data: SiteData,
    site: str,
    on_step: OnStep | None,
    ranks: Ranks,
) -> dict[str, float]:
    if recipe.memory.at_round_start == "refilled":
        _refill(recipe, state, data, site)
    return train(
        state,
        lambda step: data.batches(recipe, site, step),
        recipe,
        recipe.federation.local_steps,
        site=site,
        on_step=on_step,
        ranks=ranks,
    )


def knn_auroc(recipe: Recipe, backbone: nn.Module, shards: Sequence[Shard]) -> dict[str, float]:
    """AUROC of a kNN vote on the validation split of each labelled modality, by wire name."""
    scores: dict[str, list[float]] = {}
    px = recipe.views.global_px
    for task in labelled_tasks(list(shards)):
        order = numpy_generator(recipe.seed, "evaluation", task.name).permutation(len(task.train))
        train_indices = np.sort(task.train[order[: recipe.evaluation.max_images]])
        if len(np.unique(task.labels(task.val))) < 2:
            continue
        known, asked = (
            extract(backbone, task.shard.images[i], task.name, px, last_blocks=1)
            for i in (train_indices, task.val)
        )
        votes = knn_scores(
            known, task.labels(train_indices), asked, neighbours=recipe.evaluation.neighbours
        )
        scores.setdefault(task.name, []).append(auroc(votes, task.labels(task.val)))
    return {f"knn_auroc/{name}": float(np.mean(values)) for name, values in scores.items()}


def usual_of(recipe: Recipe, state: TrainState, data: SiteData, site: str) -> dict[int, Usual]:
    """What is usual in each of the site's modalities; the same pictures tell it in every round."""
    description = cast(Description, state.student.description)
    result = {}
    for modality, pool in data.pools.items():
        key = (recipe.seed, site, "usual", MODALITIES[modality])
        chosen = draw(pool, 0, USUAL_PICTURES, *key)
        pictures = data.batch(modality, chosen).images[:].to(state.device)
        result[modality] = description.usual(pictures, recipe.views.global_px)
    return result


def _refill(recipe: Recipe, state: TrainState, data: SiteData, site: str) -> None:
    """Fill each ring with the received teacher's embeddings of images drawn for this round."""
    entries, batch = recipe.memory.entries_per_modality, recipe.optim.batch_size
    for modality, pool in data.pools.items():
        key = (recipe.seed, site, "refill", MODALITIES[modality], state.step)
        indices = draw(pool, 0, min(entries, len(pool)), *key)
        for number, start in enumerate(range(0, len(indices), batch)):
            part = data.batch(modality, indices[start : start + batch])
            embeddings = embed_global(state, part, recipe, site, state.step, number)
            state.bank.write(modality, embeddings, part.patients)
