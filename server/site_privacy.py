"""Site privacy: what the server releases hides whether one site took part; the server is trusted.

Every admitted update is cut to `privacy.clip_norm`; the cut updates are summed, Gaussian noise is
added to the sum, and it is divided by `privacy.sites`, whoever answered: a site that is away counts
as one that changed nothing. Prototypes are sums of each site's rows by the nearest public centroid,
with noise of their own. core.privacy.accounting.round_events is what a round costs.

**Guarantees**, of the student, the teacher and the prototypes of the next state:
    - Adding or removing one site, whatever it sends, moves the sum of updates by no more than
      `clip_norm` (but for rounding in float64), that of prototype rows and that of their counts by
      no more than 1 each.
    - Every number of these three sums has noise of its own, of deviation `noise_multiplier` times
      `clip_norm`, `prototype_noise` and twice that, from the operating system's randomness.
    - A site counts for the same as any other: neither its images nor the other sites change its
      weight, its cut, or whether it counts.
    - The teacher, and which prototypes are kept, follow from these noised sums and from earlier
      releases alone. No row that a site sent, no count and no older contribution is in the state.
    - More sites than `privacy.sites` end the round before anything is released.
    - An update that is not finite ends the round too; admission rejects it long before.

Not covered: the history, metrics, reports and the live view; whether a round came about at all; and
what the server itself sees, which is every update in clear.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.admission import update_norm
from core.checkpoint import Arrays
from core.config import Recipe
from core.errors import UserError
from core.modalities import MODALITIES
from core.privacy.noise import PrivateRandom
from core.privacy.prototypes import private_prototypes
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.aggregate import rebuild_teacher

Float64 = NDArray[np.float64]
CHUNK_NUMBERS: Final = 250_000
"""Noise that is drawn at once."""


def aggregate_privately(
    recipe: Recipe,
    state: GlobalState,
    updates: Mapping[str, SiteUpdate],
    *,
    round_number: int,
    random: PrivateRandom,
) -> tuple[GlobalState, dict[str, float]]:
    """Compute the state after a round of a study with site privacy.

    Memory holds the new state and few arrays of it beside, however many sites there are.

    Args:
        recipe: The study.
        state: What the sites were sent: a release.
        updates: Site -> its admitted update; their order changes nothing.
        round_number: The round, from 1.
        random: Draws the noise.

    Returns:
        The new global state, and the weight of each site.

    Raises:
        UserError: there are more sites than the sum is divided by, or an update is not finite.
    """
    privacy = recipe.privacy
    require_room(recipe, round_number, len(updates))
    student: Arrays = {}
    for name, total in clipped_sums(updates, state.student, privacy.clip_norm):
        add_noise(total, privacy.noise_multiplier * privacy.clip_norm, random)
        student[name] = np.asarray(state.student[name] + total / privacy.sites, np.float32)
    first_step = (round_number - 1) * recipe.federation.local_steps
    teacher = rebuild_teacher(state.teacher, student, recipe, first_step)
    prototypes = _prototypes(recipe, state.prototypes, updates, random)
    weights = dict.fromkeys(sorted(updates), 1 / privacy.sites)
    return GlobalState(student=student, teacher=teacher, prototypes=prototypes), weights


def require_room(recipe: Recipe, round_number: int, sites: int) -> None:
    """Hold that no more sites take part than the sum is divided by.

    Raises:
        UserError: there are more.
    """
    if recipe.privacy.mode == "site" and sites > recipe.privacy.sites:
        raise UserError(
            f"round {round_number}: {sites} sites take part, but noise and divisor are made for "
            f"privacy.sites = {recipe.privacy.sites}; nothing was released. Put the sites that are "
            "too many in quarantine and run again, or begin a study with a larger number"
        )


def clipped_sums(
    updates: Mapping[str, SiteUpdate], sent: Arrays, clip_norm: float
) -> Iterator[tuple[str, Float64]]:
    """Name by name the sum over sites of what each changed, cut to `clip_norm` over all weights.

    Raises:
        UserError: an update is not finite.
    """
    factors: dict[str, float] = {}
    for site in sorted(updates):
        norm = update_norm(updates[site].student, sent)
        if not math.isfinite(norm):  # would pass the cut: the larger of nan and 1 may be 1
            raise UserError(f"site '{site}': its update is not finite; nothing was released")
        factors[site] = clip_norm / max(norm, clip_norm)
    for name, start in sent.items():
        total = np.zeros(start.shape)
        for site, factor in factors.items():
            total += factor * (updates[site].student[name].astype(np.float64) - start)
        yield name, total


def add_noise(total: Float64, deviation: float, random: PrivateRandom) -> None:
    """Add independent normal noise to every number, in place."""
    flat = total.reshape(-1)  # a view: totals are made contiguous
    for start in range(0, flat.size, CHUNK_NUMBERS):
        part = flat[start : start + CHUNK_NUMBERS]
        part += deviation * random.normal(part.size)


def public_centroids(recipe: Recipe, released: Prototypes) -> dict[str, Float64]:
    """For every modality the prototypes that are released, filled up with fixed random directions.

    Returns:
        modality -> unit rows [K, D], K the recipe's number of prototypes.
    """
    shape = (recipe.federation.prototypes_per_modality, recipe.model.embedding_dim)
    found: dict[str, Float64] = {}
    for index, modality in enumerate(MODALITIES):
        rows = np.random.default_rng([recipe.seed, index]).normal(size=shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        if modality in released.centroids:
            known = released.centroids[modality].astype(np.float64)
            rows[: len(known)] = known
        found[modality] = rows
    return found


def _prototypes(
    recipe: Recipe, released: Prototypes, updates: Mapping[str, SiteUpdate], random: PrivateRandom
) -> Prototypes:
    """The prototypes that leave after a round, from the rows of each site, which weigh the same.

    How many patients a site says are behind a row changes nothing.
    """
    if not recipe.federation.prototypes_per_modality:
        return Prototypes({}, {})
    rows: dict[str, NDArray[Any]] = {}
    owners: dict[str, NDArray[Any]] = {}
    for modality in MODALITIES:
        given = {s: updates[s].prototypes.centroids.get(modality, ()) for s in sorted(updates)}
        if any(map(len, given.values())):
            rows[modality] = np.concatenate([r for r in given.values() if len(r)])  # [N, D]
            owners[modality] = np.repeat(list(given), [len(r) for r in given.values()])  # [N]
    return private_prototypes(
        rows, owners, public_centroids(recipe, released),
        noise=recipe.privacy.prototype_noise, min_count=0.0, random=random,
    )  # fmt: skip
