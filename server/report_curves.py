"""Curves of a study over its rounds, for its report."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from core.evaluation.figures import MUTED, STYLE, Look, Panel, canvas, look, shorten, svg
from core.modalities import MODALITIES, TITLES
from server.history import Line
from server.summary import Series, series

Curve = Sequence[tuple[int, float]]
MOST_NAMED: Final = 8
"""More sites than colours: the rest is drawn as a band, of which the median is a line."""
MOST_MARKED: Final = 40
"""Rounds beyond which a marker a round hides the line."""
PHASES: Final = ("exchange", "wait_for_sites", "admit", "screen", "aggregate")
WIDTH, HEIGHT = 3.0, 2.3
WIDE = 4.6, 2.6


def modality_look(modality: str) -> Look:
    """Colour and symbol of a modality, the same in every figure."""
    return look(MODALITIES.index(modality))


@matplotlib.rc_context(STYLE)
def loss_panels(lines: Sequence[Line]) -> list[Panel]:
    """Loss and teacher entropy against the collapse line, a panel a modality."""
    loss, ceiling = series(lines, "loss"), series(lines, "loss_ceiling")
    entropy = series(lines, "teacher_entropy")
    panels = []
    for modality, points in loss.items():
        figure, axes = canvas(WIDTH, HEIGHT)
        drawn = [("loss", look(0), points), ("teacher entropy", look(2), entropy.get(modality, []))]
        if modality in ceiling:
            drawn.append(("collapse", Look(look(1).colour, "", "6 2"), ceiling[modality]))
        for _, style, curve in drawn:
            _draw(axes, style, curve)
        title = TITLES[modality]
        said = _spoken([(name, curve) for name, _, curve in drawn])
        _rounds(axes)
        panels.append(Panel(title, svg(figure, f"Loss over rounds, {title}: {said}")))
    return panels


LOSS_LEGEND: Final = (
    ("loss", look(0)), ("teacher entropy", look(2)), ("collapse", Look(look(1).colour, "s", "6 2")),
)  # fmt: skip
"""What the lines of `loss_panels` are."""


@matplotlib.rc_context(STYLE)
def modality_panel(
    title: str, found: Series, *, reference: float | None = None, breaks: bool = True
) -> Panel:
    """One figure over rounds, a line a modality.

    Args:
        title: What is drawn.
        found: Modality -> (round, value).
        reference: A dotted line across.
        breaks: Leave a gap where rounds are missing.
    """
    figure, axes = canvas(WIDTH, HEIGHT)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.9, linestyle=":")
    for modality, points in found.items():
        _draw(axes, modality_look(modality), points, breaks=breaks)
    _rounds(axes)
    said = _spoken([(TITLES[modality], points) for modality, points in found.items()])
    return Panel(title, svg(figure, f"{title} over rounds: {said}"))


@matplotlib.rc_context(STYLE)
def site_panel(title: str, found: Mapping[str, Curve], named: Sequence[str]) -> Panel:
    """One figure over rounds, a line a site; of many sites the named ones before a band of all.

    Args:
        title: What is drawn.
        found: Site -> (round, value).
        named: Sites that are drawn by themselves in any case, as far as colours last.
    """
    figure, axes = canvas(*WIDE)
    shown = sorted(found) if len(found) <= MOST_NAMED else [s for s in named if s in found]
    shown = shown[:MOST_NAMED]
    looks = {site: look(index) for index, site in enumerate(shown)}
    if len(found) > len(shown):
        at: dict[int, list[float]] = {}
        for points in found.values():
            for x, y in points:
                at.setdefault(x, []).append(y)
        xs = sorted(at)
        low, high = [min(at[x]) for x in xs], [max(at[x]) for x in xs]
        axes.fill_between(xs, low, high, color=MUTED, alpha=0.18, linewidth=0)
        axes.plot(xs, [median(at[x]) for x in xs], color=MUTED, linewidth=1.5)
    for site in shown:
        _draw(axes, looks[site], found[site])
    _rounds(axes)
    said = _spoken([(site, found[site]) for site in shown])
    picture = svg(figure, f"{title} over rounds, {len(found)} sites: {said}")
    return Panel(title, picture, tuple((shorten(site), style) for site, style in looks.items()))


@matplotlib.rc_context(STYLE)
def seconds_panel(lines: Sequence[Line]) -> Panel:
    """Seconds of each round by phase at the coordinator, on top of one another."""
    figure, axes = canvas(*WIDE)
    numbers = [line["round"] for line in lines]
    values = {p: [float(line["seconds"].get(p, 0.0)) for line in lines] for p in PHASES}
    floor = [0.0] * len(numbers)
    looks = {phase: look(index) for index, phase in enumerate(PHASES)}
    for phase in PHASES:
        top = [a + b for a, b in zip(floor, values[phase], strict=True)]
        axes.fill_between(
            [n - 0.5 for n in numbers] + [numbers[-1] + 0.5], [*floor, floor[-1]],
            [*top, top[-1]], step="post", color=looks[phase].colour, linewidth=0,
        )  # fmt: skip
        floor = top
    axes.set_ylim(0, max(floor, default=1.0) * 1.05 or 1.0)
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    _rounds(axes)
    said = ", ".join(f"{p.replace('_', ' ')} {sum(values[p]):.0f} s" for p in PHASES)
    legend = tuple((phase.replace("_", " "), looks[phase]) for phase in PHASES)
    return Panel("Seconds of a round by phase", svg(figure, f"Seconds by phase: {said}"), legend)


def site_series(lines: Sequence[Line], figure: str) -> dict[str, list[tuple[int, float]]]:
    """Site -> (round, value) of a figure in its outcomes, such as update_norm."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for site, outcome in line["sites"].items():
            if (value := outcome.get(figure)) is not None:
                found.setdefault(site, []).append((line["round"], float(value)))
    return found


def auroc_series(lines: Sequence[Line], final: Mapping[str, float]) -> Series:
    """AUROC (kNN) of the global model after each round that was evaluated, 0 being the initial one.

    Args:
        lines: The history; a site measures the model that it receives, that of the round before.
        final: Modality -> AUROC of the last model, where it was measured.
    """
    found = {m: [(r - 1, v) for r, v in points] for m, points in series(lines, "knn_auroc").items()}
    for modality, value in final.items():
        found.setdefault(modality, []).append((len(lines), value))
    return {modality: found[modality] for modality in TITLES if modality in found}


def _draw(axes: Axes, style: Look, points: Curve, *, breaks: bool = True) -> None:
    """A line that breaks where rounds in between are missing, unless they are meant to be."""
    xs: list[float] = []
    ys: list[float] = []
    for x, y in points:
        if xs and breaks and x - xs[-1] > 1:
            xs.append(x - 0.5)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y)
    marker = style.marker if style.marker and len(points) <= MOST_MARKED else None
    lonely = not marker and len(points) == 1
    axes.plot(
        xs, ys, color=style.colour, linestyle=style.linestyle, marker="o" if lonely else marker,
        linewidth=1.2,
    )  # fmt: skip


def _rounds(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _spoken(curves: Sequence[tuple[str, Curve]]) -> str:
    """First and last values, for readers who cannot see the lines."""
    return "; ".join(
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for name, points in curves
        if points
    )
