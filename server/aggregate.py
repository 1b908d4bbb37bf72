"""Aggregation: from admitted updates to the next global state, in numpy and in a fixed order."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.config import Recipe
from core.prototypes import decay_prototypes, merge_prototypes
from core.schedules import ema_momentum
from core.wire import GlobalState, Prototypes, SiteUpdate, sends_prototypes
from server.robust import cap_prototypes, trimmed_mean


def balanced_weights(num_examples: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Weights of the sites that give every modality the same say.

    The federated form of a sampler balanced over modalities: w_i = mean over the modalities m that
    are present of n_im / N_m.

    Args:
        num_examples: Site -> modality -> training images; one modality a site at the least.

    Returns:
        Site -> weight, in name order; they sum to 1, and a site alone has exactly 1.
    """
    totals: dict[str, int] = {}
    for counts in num_examples.values():
        for modality, count in counts.items():
            totals[modality] = totals.get(modality, 0) + count
    return {
        site: sum(num_examples[site].get(m, 0) / totals[m] for m in sorted(totals)) / len(totals)
        for site in sorted(num_examples)
    }


def weighted_mean(groups: Sequence[Mapping[str, NDArray[Any]]], weights: Sequence[float]) -> Arrays:
    """Mean of named arrays, summed in float64 in the order given; the result is float32.

    One group of weight 1 comes back bit for bit. Each array is asked for once, when its turn comes:
    groups that read from a disk need memory for few arrays, however many groups there are.
    """
    mean: Arrays = {}
    for name in groups[0]:
        terms = (w * g[name].astype(np.float64) for g, w in zip(groups, weights, strict=True))
        mean[name] = np.asarray(reduce(np.add, terms), np.float32)  # from 0 would lose a minus zero
    return mean


def rebuild_teacher(teacher: Arrays, student: Arrays, recipe: Recipe, first_step: int) -> Arrays:
    """Continue the EMA at the server as if the mean student had stood still during the round.

    t <- M t + (1 - M) s, where M is the product of the momenta of the round's steps.
    """
    steps = range(first_step, first_step + recipe.federation.local_steps)
    momentum = float(np.prod([ema_momentum(recipe, step) for step in steps]))
    return weighted_mean([teacher, student], [momentum, 1 - momentum])


def aggregate(
    recipe: Recipe,
    state: GlobalState,
    contributions: Mapping[str, Prototypes],
    updates: Mapping[str, SiteUpdate],
    *,
    round_number: int,
) -> tuple[GlobalState, dict[str, Prototypes], dict[str, float]]:
    """Compute the state after a round.

    Args:
        recipe: The study.
        state: The global state that the sites were sent.
        contributions: Site -> the prototypes it last sent, decayed while it is absent.
        updates: Site -> its admitted update, one at the least; their order changes nothing, and
            neither does whether their arrays lie in memory or in a spool.
        round_number: The round, from 1.

    Returns:
        The new global state, the new contributions, and the weight of each site.
    """
    weights = balanced_weights({site: update.num_examples for site, update in updates.items()})
    ordered = [updates[site] for site in weights]
    federation = recipe.federation
    mean = trimmed_mean if federation.robust == "trimmed_mean" else weighted_mean
    student = mean([u.student for u in ordered], list(weights.values()))
    if federation.teacher == "average":
        teacher = mean([u.teacher for u in ordered], list(weights.values()))
    else:
        first_step = (round_number - 1) * federation.local_steps
        teacher = rebuild_teacher(state.teacher, student, recipe, first_step)
    kept = {
        site: decay_prototypes(prototypes, federation.prototype_decay)
        for site, prototypes in contributions.items()
        if site not in updates
    }
    kept |= {site: update.prototypes for site, update in updates.items()}
    kept = {site: kept[site] for site in sorted(kept) if kept[site].counts}
    weighed = kept if federation.robust == "none" else cap_prototypes(kept, federation.norm_bound)
    most = federation.prototypes_per_modality
    # Those that are sent back: of one site's prototypes they would be an echo.
    least = 2 if sends_prototypes(recipe) else 1
    merged = merge_prototypes(weighed, most, recipe.seed, round_number, least_sites=least)
    return GlobalState(student=student, teacher=teacher, prototypes=merged), kept, weights
