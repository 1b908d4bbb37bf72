"""Tables of what became of modalities when their sites had left, or joined."""

import numpy as np
from scenario_cells import Arms, difference, differences_of, figures, markdown, shown
from scenario_compare import MEAN

from core.modalities import TITLES


def change(arms: Arms) -> str:
    """What became of modalities that left or joined at half time, and of the others."""
    rows = []
    for name, arm in arms.items():
        half, end = figures(arm, "half"), figures(arm, "end")
        for m, cells in arm.get("change", {}).items():
            if m in TITLES:
                before, after = (f"{np.mean(part[m]):.3f}" for part in (half, end))
                rows.append([name, TITLES[m], before, after, shown(cells)])
        if "change" in arm:
            others = f"{np.mean(end[MEAN]):.3f}"
            rows.append([name, "all seven", f"{np.mean(half[MEAN]):.3f}", others, ""])
    return markdown(["arm", "", "half time", "end", "change [95 %]"], rows)


def forgotten(arms: Arms) -> str:
    """The mean change of modalities whose sites left, held against FedAvg's, and .3 of that."""
    rows = []
    for name, arm in arms.items():
        if "change_less_share" in arm:
            gone = [m for m in TITLES if m in arm["change"]]
            half, end = (figures(arm, moment, "knn_accuracy") for moment in ("half", "end"))
            vote = np.mean([np.mean(end[m]) - np.mean(half[m]) for m in gone])
            keys = ("change", "change_less_fedavg", "change_less_share")
            cells = [
                difference(arm, f"{key}{probe}") for probe in ("", "_standard") for key in keys
            ]
            rows.append([name, *cells, f"{vote:+.3f}"])
    less = ("less no_memory_fast's", "less .3 of that")
    return markdown(["arm", "probe [95 %]", *less, "usual probe [95 %]", *less, "vote"], rows)


def lost(arms: Arms) -> str:
    """How the probe changed by modality once sites had left."""
    return differences_of(arms, "change", "probe, end less before [95 %]", MEAN)


def lost_usual(arms: Arms) -> str:
    """How the usual probe changed by modality once sites had left."""
    return differences_of(arms, "change_standard", "usual probe, end less before [95 %]", MEAN)
