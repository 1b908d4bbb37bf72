"""How far apart two arms are, on the same draws of the same test images, over seeds.

An interval is the middle 95 % of draws of the test images' patients and of the seeds, the same
draws for both arms (core.evaluation.intervals.compare). Three seeds are few: what another seed
would change is only roughly in it.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scenario_measure import DRAWS

from core.evaluation.intervals import Comparison, Resampled, compare, mean_over_modalities
from core.modalities import MODALITIES
from core.randomness import numpy_generator

MEAN: Final = "mean"
Draws = Mapping[int, Mapping[str, Resampled]]
"""Seed -> modality -> AUROC and its draws."""


def over_seeds(draws: Draws, seeds: Sequence[int]) -> dict[str, Resampled]:
    """Modality, and MEAN -> mean over seeds, with draws in which the seeds are drawn too.

    The same seeds give the same draws of them, so arms stay paired.
    """
    generator = numpy_generator("seeds", *seeds)
    picks = generator.integers(len(seeds), size=(DRAWS, len(seeds)))
    names = [m for m in MODALITIES if all(m in draws[seed] for seed in seeds)]
    found = {name: _over_seeds([draws[s][name] for s in seeds], picks) for name in names}
    return {**found, MEAN: mean_over_modalities(found)}


def _over_seeds(parts: Sequence[Resampled], picks: NDArray[np.int64]) -> Resampled:
    table = np.stack([part.draws for part in parts], axis=1)  # [B, S]
    return Resampled(
        float(np.mean([part.value for part in parts])),
        np.take_along_axis(table, picks, axis=1).mean(1),
        parts[0].freedom,
    )


def differences(arm: Draws, other: Draws) -> dict[str, Comparison]:
    """Modality, and MEAN -> the arm less the other, over the seeds that both have."""
    seeds = sorted(set(arm) & set(other))
    a, b = over_seeds(arm, seeds), over_seeds(other, seeds)
    return {name: compare(a[name], b[name]) for name in a if name in b}


def changes(
    after: Draws, before: Draws, names: Sequence[str], share: float = 1.0
) -> dict[int, dict[str, Resampled]]:
    """Seed -> modality, those of `names` -> a share of how its AUROC changed, on the same draws."""
    return {
        seed: {
            m: Resampled(
                share * (row[m].value - before[seed][m].value),
                share * (row[m].draws - before[seed][m].draws),
                row[m].freedom,
            )
            for m in names
            if m in row
        }
        for seed, row in after.items()
        if seed in before
    }


def per_doubling(points: Mapping[float, Draws]) -> dict[str, Comparison]:
    """Modality, and MEAN -> how much the AUROC grows with twice as much: a fitted line's slope.

    Args:
        points: an amount, two at least -> draws; seeds that not all have are left out.
    """
    amounts = sorted(points)
    seeds = sorted(set.intersection(*(set(points[amount]) for amount in amounts)))
    x = np.log2(amounts) - np.log2(amounts).mean()
    lever = x / (x @ x)  # least squares
    rows = [over_seeds(points[amount], seeds) for amount in amounts]
    found = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        slope = Resampled(
            float(lever @ [part.value for part in parts]),
            lever @ np.stack([part.draws for part in parts]),
            min(part.freedom for part in parts),
        )
        flat = Resampled(0.0, np.zeros_like(slope.draws), slope.freedom)
        found[name] = compare(slope, flat)
    return found
