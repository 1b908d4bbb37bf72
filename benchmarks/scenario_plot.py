"""The picture of a scenario: each arm's mean AUROC by seed, and how far it is from ours."""

from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scenario_cells import Arms, figures
from scenario_compare import MEAN

# Okabe and Ito's blue and vermilion, told apart by all common kinds of colour vision.
SEED, APART, NEAR = "#767676", "#D55E00", "#0072B2"
ROW_INCHES: Final = 0.34


def draw_arms(
    file: Path, title: str, arms: Arms, moment: str = "end", less: str = "less_ours"
) -> None:
    """Draw an SVG, the best arm on top; an interval without 0 is red.

    Args:
        file: to write.
        title: of the scenario.
        arms: arm -> its results in scenarios.json.
        moment: whose AUROC is drawn.
        less: which difference is.
    """
    means = {name: figures(arm, moment)[MEAN] for name, arm in arms.items()}
    order = sorted(means, key=lambda arm: float(np.mean(means[arm])))
    figure = Figure(figsize=(9, 1.3 + ROW_INCHES * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(order):
        left.plot(means[arm], [place] * len(means[arm]), "|", color=SEED, markersize=9)
        left.plot(np.mean(means[arm]), place, "o", color=NEAR, markersize=6)
        if less in arms[arm]:
            difference, low, high, _ = arms[arm][less][MEAN]
            colour = APART if low > 0 or high < 0 else NEAR
            right.plot([low, high], [place, place], color=colour, linewidth=2)
            right.plot(difference, place, "o", color=colour, markersize=6)
    left.set_yticks(range(len(order)), order)
    left.set_xlabel("mean test AUROC of the linear probe\n(point: mean; strokes: seeds)")
    right.set_xlabel("less ours, 95 % interval\n(red: it excludes 0)")
    right.axvline(0, color=SEED, linestyle=":")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    with matplotlib.rc_context({"svg.hashsalt": title}):  # else names in it change by the run
        figure.savefig(file, metadata={"Date": None})
