"""The picture of a run: loss against its collapse line, and kNN AUROC, one column a modality."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from core.modalities import TITLES
from server.summary import Series

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
LOSS, COLLAPSE, AUROC, CHANCE = "#0072B2", "#D55E00", "#009E73", "#767676"


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


def _xy(series: Series, modality: str) -> tuple[list[int], list[float]]:
    points = series.get(modality, [])
    return [x for x, _ in points], [y for _, y in points]
