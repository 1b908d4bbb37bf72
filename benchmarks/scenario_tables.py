"""Tables of the study: AUROC, differences to ours with intervals, votes, forgetting, time.

An interval is the middle 95 % of draws of the test images' patients and of the seeds, the same
draws for both arms (core.evaluation.intervals.compare). Three seeds are few: what another seed
would change is only roughly in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scenario_measure import DRAWS

from core.evaluation.intervals import Comparison, Resampled, compare, mean_over_modalities
from core.modalities import MODALITIES, TITLES
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


def differences(arm: Draws, ours: Draws) -> dict[str, Comparison]:
    """Modality, and MEAN -> the arm less ours, over the seeds that both have."""
    seeds = sorted(set(arm) & set(ours))
    a, b = over_seeds(arm, seeds), over_seeds(ours, seeds)
    return {name: compare(a[name], b[name]) for name in a if name in b}


def shown(comparison: Comparison) -> str:
    """A difference and its interval."""
    return f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"


def arms_table(arms: Mapping[str, Draws], notes: Mapping[str, str]) -> str:
    """A row an arm, a column a modality: mean over seeds; the mean with its spread; less ours.

    Args:
        arms: arm -> its draws; "ours" among them, if differences are wanted.
        notes: arm -> what the last column says.
    """
    names = [m for m in MODALITIES if any(m in rows for d in arms.values() for rows in d.values())]
    heads = ["arm", *(TITLES[m] for m in names), "mean", "less ours [95 %]", "CPU"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, draws in arms.items():
        cells = [
            f"{np.mean([rows[m].value for rows in draws.values() if m in rows]):.3f}"
            if any(m in rows for rows in draws.values())
            else ""
            for m in names
        ]
        means = [float(np.mean([r.value for r in rows.values()])) for rows in draws.values()]
        less = ""
        if arm != "ours" and set(draws) & set(arms.get("ours", ())):
            less = shown(differences(draws, arms["ours"])[MEAN])
        cells += [_with_spread(means), less, notes.get(arm, "")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def votes_table(arms: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Accuracy of a vote: a row an arm, a column a modality, mean and largest distance from it.

    Args:
        arms: arm -> for each seed modality -> accuracy.
    """
    names = [m for m in MODALITIES if any(m in row for rows in arms.values() for row in rows)]
    heads = ["arm", *(TITLES[m] for m in names), "mean"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, rows in arms.items():
        cells = [_with_spread([row[m] for row in rows if m in row]) for m in names]
        cells.append(_with_spread([float(np.mean(list(row.values()))) for row in rows]))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.max(np.abs(values - np.mean(values))):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def change_table(
    half: Mapping[str, Draws], end: Mapping[str, Draws], stayed: Mapping[str, Draws],
    modalities: Sequence[str],
) -> str:  # fmt: skip
    """What became of modalities that left or joined at half time: a row an arm and modality.

    Args:
        half: arm -> draws at half time.
        end: arm -> draws at the end.
        stayed: arm -> draws at the end of `extreme`, where all are there all the time.
        modalities: that left or joined.
    """
    heads = ["arm", "", "half time", "end", "change [95 %]", "all there all the time", "others"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, draws in end.items():
        changes = differences(draws, half[arm])
        for m in modalities:
            rest = [n for n in changes if n not in (*modalities, MEAN)]
            cells = [
                _mean_value(half[arm], [m]), _mean_value(draws, [m]), shown(changes[m]),
                _mean_value(stayed.get(arm, {}), [m]), _mean_value(draws, rest),
            ]  # fmt: skip
            lines.append(f"| {arm} | {TITLES[m]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_value(draws: Draws, names: Sequence[str]) -> str:
    values = [rows[n].value for rows in draws.values() for n in names]
    return f"{np.mean(values):.3f}" if values else ""


def time_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """CPU seconds by arm: a step of a site, one measurement of all modalities, a job."""
    heads = ["arm", "jobs", "a step and site", "a measurement", "a job", "all"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, rows in results.items():
        train, measuring = (sum(r[k] for r in rows) for k in ("cpu_train", "cpu_measure"))
        steps, measurements = (sum(r[k] for r in rows) for k in ("site_steps", "measurements"))
        cells = [
            str(len(rows)), f"{train / steps:.3f}" if steps else "",
            f"{measuring / measurements:.1f}", f"{(train + measuring) / len(rows):.0f}",
            f"{train + measuring:.0f}",
        ]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
