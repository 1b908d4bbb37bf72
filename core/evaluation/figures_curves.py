"""Curves and intervals of a report: what scores and labels look like beyond one figure."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from core.evaluation.figures import MUTED, STYLE, Look, Panel, canvas, shorten, svg
from core.evaluation.types import Interval, Prediction

Points = Mapping[float, Sequence[float]]
"""Percent of the labels -> a value a seed."""
MOST_BINS = 10
IMAGES_IN_BIN = 25
"""Of a calibration curve, at least: a share of fewer says nothing."""


@matplotlib.rc_context(STYLE)
def interval_chart(rows: Sequence[tuple[str, Look, Interval]], axis: str) -> Panel:
    """A dot with its interval for each row, the first on top."""
    figure, axes = canvas(4.8, 0.75 + 0.33 * len(rows))
    for y, (_, style, interval) in enumerate(rows):
        axes.plot([interval.low, interval.high], [y, y], color=style.colour, linewidth=2.2)
        axes.plot([interval.value], [y], style.marker, color=style.colour, markersize=7.5)
        axes.annotate(
            f"{interval.value:.3f}", (1, y), xycoords=("axes fraction", "data"),
            xytext=(8, 0), textcoords="offset points", va="center",
            fontweight="bold" if y == 0 else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [shorten(name) for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(axis)
    spoken = "; ".join(f"{name} {i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for name, _, i in rows)
    return Panel(axis, svg(figure, f"{axis}: {spoken}"))


def mean_roc(prediction: Prediction) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One-against-rest ROC: of class 1 if there are two, else the mean curve over the classes.

    Returns:
        False-positive rates and true-positive rates, both [n]; empty if no class can be ranked.
    """
    scores, labels = prediction.scores, prediction.labels
    if prediction.multi_label:
        curves = [(labels[:, c], scores[:, c]) for c in range(scores.shape[1])]
    elif scores.shape[1] == 2:
        curves = [(labels == 1, scores[:, 1])]
    else:
        curves = [(labels == c, scores[:, c]) for c in range(scores.shape[1])]
    rates = [roc_curve(y, s)[:2] for y, s in curves if 0 < y.sum() < len(y)]
    if len(rates) == 1:
        return np.asarray(rates[0][0]), np.asarray(rates[0][1])
    if not rates:
        return np.zeros(0), np.zeros(0)
    grid = np.linspace(0, 1, 201)
    mean = np.mean([np.interp(grid, false, true) for false, true in rates], axis=0)
    return np.r_[0.0, grid], np.r_[0.0, mean]


@matplotlib.rc_context(STYLE)
def roc_panel(title: str, predictions: Sequence[tuple[Look, Prediction]]) -> Panel:
    """ROC curves of several models on one task."""
    figure, axes = canvas(3.0, 2.9)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    for order, (style, prediction) in enumerate(predictions):
        false, true = mean_roc(prediction)
        axes.plot(
            false, true, color=style.colour, linestyle=style.linestyle,
            linewidth=2.2 if order == 0 else 1.2, zorder=10 - order,
        )  # fmt: skip
    _unit_square(axes)
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    return Panel(title, svg(figure, f"ROC curves, {title}"))


def reliability(prediction: Prediction) -> list[tuple[float, float, int]]:
    """Mean probability, share that is right, and count in each of up to ten equally full bins.

    The probability is that of the predicted class, or of every label when multi-label.
    """
    scores, labels = prediction.scores, prediction.labels
    if prediction.multi_label:
        sure, right = scores.ravel(), labels.ravel().astype(float)
    else:
        sure, right = scores.max(1), (scores.argmax(1) == labels).astype(float)
    bins = min(MOST_BINS, max(1, len(sure) // IMAGES_IN_BIN))
    return [
        (float(sure[inside].mean()), float(right[inside].mean()), len(inside))
        for inside in np.array_split(np.argsort(sure, kind="stable"), bins)
    ]


@matplotlib.rc_context(STYLE)
def reliability_panel(title: str, predictions: Sequence[tuple[Look, Prediction]]) -> Panel:
    """Stated probability against the share that is right, several models on one task."""
    figure, axes = canvas(3.0, 2.9)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    for order, (style, prediction) in enumerate(predictions):
        x, y, _ = zip(*reliability(prediction), strict=True)
        first = order == 0
        axes.plot(
            x, y, color=style.colour, linestyle=style.linestyle, marker=style.marker,
            linewidth=2.2 if first else 1.0, markersize=5.5 if first else 4, zorder=10 - order,
        )  # fmt: skip
    _unit_square(axes)
    axes.set_xlabel("stated probability")
    axes.set_ylabel("share that is right")
    return Panel(title, svg(figure, f"Calibration, {title}"))


@matplotlib.rc_context(STYLE)
def label_panel(title: str, series: Sequence[tuple[Look, Points]]) -> Panel:
    """AUROC against the share of labels: mean over seeds, and the range of the seeds."""
    figure, axes = canvas(3.0, 2.7)
    for order, (style, points) in enumerate(series):
        x = sorted(points)
        values = [np.asarray(points[fraction]) for fraction in x]
        low, high = [v.min() for v in values], [v.max() for v in values]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.12, linewidth=0)
        axes.plot(
            x, [v.mean() for v in values], color=style.colour, linestyle=style.linestyle,
            marker=style.marker, linewidth=2.2 if order == 0 else 1.2, zorder=10 - order,
        )  # fmt: skip
    ticks = sorted({fraction for _, points in series for fraction in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_spaced(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("labels used for training, %")
    axes.set_ylabel("AUROC")
    return Panel(title, svg(figure, f"AUROC against the share of labels, {title}"))


def _spaced(ticks: Sequence[float]) -> list[float]:
    """Those of the ticks whose numbers do not touch on a logarithmic axis."""
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        if not kept or kept[-1] / tick > 1.6:
            kept.append(tick)
    return kept


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
