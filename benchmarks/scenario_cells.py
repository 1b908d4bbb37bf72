"""Cells and rows of the study's tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scenario_compare import MEAN

from core.modalities import MODALITIES, TITLES

Arm = Mapping[str, Any]
"""Seed -> what its job found; "less_ours", "per_doubling" and the like -> modality -> difference,
low, high, p."""
Arms = Mapping[str, Arm]
"""Arm -> its results, of one scenario and length."""


def seeds_of(arm: Arm) -> list[Any]:
    """What the jobs found, in the order of their seeds."""
    return [arm[seed] for seed in sorted((key for key in arm if key.isdigit()), key=int)]


def figures(arm: Arm, moment: str, figure: str = "auroc") -> dict[str, list[float]]:
    """Modality, and MEAN -> a figure by seed; empty where a seed lacks it."""
    rows = [row.get(moment, {}) for row in seeds_of(arm)]
    if not rows or any(figure not in cell for row in rows for cell in row.values()):
        return {}
    names = [m for m in MODALITIES if all(m in row for row in rows)]
    if not names:
        return {}
    found = {m: [float(row[m][figure]) for row in rows] for m in names}
    return {**found, MEAN: [float(v) for v in np.mean([*found.values()], axis=0)]}


def differences_of(arms: Arms, which: str, head: str, *means: str) -> str:
    """A row an arm that has such differences, a column a modality."""
    names = [m for m in MODALITIES if any(m in a.get(which, ()) for a in arms.values())]
    rows = [
        [name, *(difference(arm, which, m) for m in (*names, *means))]
        for name, arm in arms.items()
        if which in arm
    ]
    return markdown([head, *(TITLES[m] for m in names), *means], rows)


def by_arm_and_modality(arms: Arms, moment: str, less: str, figure: str = "auroc") -> str:
    """A row an arm, a column a modality and their mean; and one of `less`, if it is named."""
    found = {name: figures(arm, moment, figure) for name, arm in arms.items()}
    names = [m for m in MODALITIES if any(m in rows for rows in found.values())]
    rows = []
    for name, row in found.items():
        if row:
            cells = [with_spread(row.get(m, ())) for m in names]
            cells += [with_spread(row[MEAN]), *([difference(arms[name], less)] if less else [])]
            rows.append([name, *cells])
    heads = ["arm", *(TITLES[m] for m in names), "mean"]
    return markdown(heads + (["less ours [95 %]"] if less else []), rows)


def difference(arm: Arm, which: str, modality: str = MEAN) -> str:
    """An arm's difference from another, if it has one."""
    cells = arm.get(which, {}).get(modality)
    return shown(cells) if cells else ""


def shown(cells: Sequence[float]) -> str:
    """A difference with its interval."""
    difference, low, high, _ = cells
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def with_spread(values: Sequence[float]) -> str:
    """The mean and the largest distance from it."""
    if not len(values):
        return ""
    spread = f" ± {np.max(np.abs(values - np.mean(values))):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
