"""Robust aggregation: what one site can do to the mean of all, whatever it sends.

norm_bound (default)  A site's change of the global state is cut to `norm_bound` times the median
                      change of the round's sites. Direction and weight stay.
trimmed_mean          At every single weight the lowest and the highest fifth of the sites are left
                      out; the others are averaged with their weights.
none                  The plain weighted mean, within `max_update_norm`.

Guarantees of norm_bound:
    - An update within the bound keeps every bit, and one site alone is never changed.
    - After the cut no update of student or teacher is longer than the bound, up to the rounding of
      float32.
    - Whatever fewer than half of the sites send, the bound stays within `norm_bound` times the
      largest change of an honest site.
Guarantees of trimmed_mean:
    - If no more sites than are left out at each end are hostile, every weight lies within the range
      of what the honest sites sent.
Of both, for prototypes:
    - A site's counts of a modality weigh at most `norm_bound` times the median site's when
      prototypes are merged.

Not guaranteed: that a cut update does no harm. It still has its weight, which follows from the
images that a site claims, and pulls in its direction, round after round.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.history import Line
from server.spool import read_part

Group = Mapping[str, NDArray[Any]]
TRIMMED_SHARE: Final = 0.2
"""Of the sites, at each end of every weight's values."""
CHUNK_NUMBERS: Final = 2_000_000
"""Read at once, of all sites together."""


def bound_updates(
    updates: Mapping[str, SiteUpdate],
    outcomes: Mapping[str, Line],
    state: GlobalState,
    bound: float,
) -> tuple[dict[str, SiteUpdate], dict[str, float]]:
    """Cut the updates that are longer than the bound about the state that was sent.

    Args:
        updates: Site -> its admitted update.
        outcomes: Site -> its outcome, with `update_norm` and, where it sent one, `teacher_norm`.
        state: What the sites were sent.
        bound: In units of the lower median of the norms, of students and of teachers apart.

    Returns:
        All updates, and the factor of each site that was cut.
    """
    factors: dict[str, float] = {}
    for figure in ("update_norm", "teacher_norm"):
        norms = {site: outcomes[site][figure] for site in updates if figure in outcomes[site]}
        limit = bound * median_low(norms.values()) if norms else 0.0
        for site, norm in norms.items():
            if norm > limit:
                factors[site] = min(factors.get(site, 1.0), limit / norm)
    cut = {
        site: replace(
            updates[site],
            student=ScaledArrays(updates[site].student, state.student, factor),
            teacher=ScaledArrays(updates[site].teacher, state.teacher, factor),
        )
        for site, factor in factors.items()
    }
    return {**updates, **cut}, factors


class ScaledArrays(Mapping[str, NDArray[Any]]):
    """Arrays about a reference, their distance from it scaled; read when they are asked for."""

    def __init__(self, arrays: Group, reference: Arrays, factor: float) -> None:
        self._arrays = arrays
        self._reference = reference
        self._factor = factor

    def __getitem__(self, name: str) -> NDArray[Any]:
        start = self._reference[name].astype(np.float64)
        moved = start + self._factor * (self._arrays[name].astype(np.float64) - start)
        return np.asarray(moved, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def trimmed_mean(groups: Sequence[Group], weights: Sequence[float]) -> Arrays:
    """Mean of named arrays without the extremes of every number, in float64; the result is float32.

    Of n values the lowest and the highest floor(n / 5) are left out; the weights of the others are
    scaled to sum to 1. Weights keep modalities balanced; the range of what is averaged, which is
    what defends, does not depend on them. Needs memory for `CHUNK_NUMBERS` numbers and the result.
    """
    cut = int(TRIMMED_SHARE * len(groups))
    given = np.asarray(weights, np.float64)
    result: Arrays = {}
    for name in groups[0]:
        first = groups[0][name]
        flat = np.empty(first.size, np.float32)
        step = max(1, CHUNK_NUMBERS // len(groups))
        for start in range(0, first.size, step):
            part = slice(start, min(start + step, first.size))
            values = np.stack([read_part(g, name, part) for g in groups], axis=1)  # [N, S]
            kept = np.argsort(values, axis=1, kind="stable")[:, cut : len(groups) - cut]
            left = np.take_along_axis(values, kept, axis=1).astype(np.float64)
            share = given[kept]
            # Sums in a fixed order, one site after the other.
            total, weight = np.zeros(len(left)), np.zeros(len(left))
            for place in range(kept.shape[1]):
                total += share[:, place] * left[:, place]
                weight += share[:, place]
            flat[part] = total / weight
        result[name] = flat.reshape(first.shape)
    return result


def cap_prototypes(given: Mapping[str, Prototypes], bound: float) -> dict[str, Prototypes]:
    """Prototypes whose counts of a modality sum to at most `bound` times the median site's sum."""
    totals: dict[str, dict[str, float]] = {}
    for site, prototypes in given.items():
        for modality, counts in prototypes.counts.items():
            totals.setdefault(modality, {})[site] = float(counts.sum(dtype=np.float64))
    limits = {modality: bound * median_low(sums.values()) for modality, sums in totals.items()}
    return {
        site: Prototypes(
            prototypes.centroids,
            {
                modality: counts
                if totals[modality][site] <= limits[modality]
                else (counts * np.float32(limits[modality] / totals[modality][site]))
                for modality, counts in prototypes.counts.items()
            },
        )
        for site, prototypes in given.items()
    }
