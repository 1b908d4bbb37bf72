"""The picture of a run: loss against its collapse line, and kNN AUROC, one column a modality."""

from itertools import cycle
from pathlib import Path
from typing import Final

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from core.modalities import TITLES
from server.summary import Series

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
LOSS, COLLAPSE, AUROC, CHANCE = "#0072B2", "#D55E00", "#009E73", "#767676"

MOST_NAMES: Final = 12
"""Of curves, in a legend; sites that spent the same share one."""


def draw_picture(path: Path, title: str, loss: Series, ceiling: Series, auroc: Series) -> None:
    """Draw a PNG.

    Args:
        path: File to write.
        title: Name of the study.
        loss: Mean training loss of a round.
        ceiling: The loss of a collapsed model, ln of the entries compared with.
        auroc: Of the global model after a round, 0 being the initial one.
    """
    modalities = list(loss) or list(auroc)
    columns = max(1, len(modalities))
    figure, axes = plt.subplots(
        2, columns, figsize=(1.2 + 2.1 * columns, 5.2), squeeze=False, sharex=True, sharey="row",
        layout="constrained",
    )  # fmt: skip
    for (above, below), modality in zip(axes.T, modalities, strict=False):
        above.set_title(TITLES[modality], fontsize=11)
        above.plot(*_xy(ceiling, modality), color=COLLAPSE, linestyle="--", label="collapse")
        above.plot(*_xy(loss, modality), color=LOSS, marker="o", markersize=4, label="loss")
        below.axhline(0.5, color=CHANCE, linestyle=":", label="chance")
        below.plot(*_xy(auroc, modality), color=AUROC, marker="s", markersize=4, label="kNN AUROC")
        below.set_xlabel("round")
        below.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("kNN AUROC (validation)")
    for row in axes:
        row[0].legend(fontsize=8, frameon=False, loc="best")
    figure.suptitle(f"{title}: global model over rounds (AUROC at 0: before training)", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_epsilon(path: Path, title: str, epsilons: Series, delta: float) -> None:
    """Draw a PNG of a study whose sites send no losses: what each has spent after each round."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for site, points in epsilons.items():
        curves.setdefault(tuple(points), []).append(site)
    for (curve, sites), marker in zip(curves.items(), cycle("os^Dv<>P"), strict=False):
        name = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
        axis.plot(*zip(*curve, strict=True), marker=marker, markersize=4, label=name)
    if not curves:
        axis.text(0.5, 0.5, "the sites send no figures", ha="center", transform=axis.transAxes)
    elif len(curves) <= MOST_NAMES:
        axis.legend(fontsize=8, frameon=False)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("round")
    axis.set_ylabel(f"epsilon spent, at delta {delta:g}")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: privacy of each site's patients", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _xy(series: Series, modality: str) -> tuple[list[int], list[float]]:
    points = series.get(modality, [])
    return [x for x, _ in points], [y for _, y in points]
