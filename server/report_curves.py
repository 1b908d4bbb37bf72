"""Curves of a study over its rounds, for its report and its live page."""

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.evaluation.figures import MUTED, STYLE, Look, Panel, canvas, look, shorten, svg
from core.modalities import MODALITIES, TITLES
from server.history import Line
from server.summary import Series, series
from server.tally import PHASES

Curve = Sequence[tuple[int, float]]
Drawn = Sequence[tuple[str, Look, Curve]]
"""Name, look, (round, value)"""
MOST_NAMED: Final = 8
"""More sites than colours: the rest is drawn as a band, of which the median is a line."""
MOST_MARKED: Final = 40
"""Rounds beyond which a marker a round hides the line, so that it gets MARKS alone."""
MARKS: Final = 8
WIDTH, HEIGHT = 3.0, 2.3
WIDE = 4.6, 2.6


def modality_look(modality: str) -> Look:
    """Colour and symbol of a modality, the same in every figure."""
    return look(MODALITIES.index(modality))


@matplotlib.rc_context(STYLE)
def loss_panels(loss: Series, ceiling: Series, entropy: Series) -> list[Panel]:
    """Loss and teacher entropy against the collapse line, a panel a modality."""
    panels = []
    for modality, points in loss.items():
        figure, axes = canvas(WIDTH, HEIGHT)
        drawn = [("loss", look(0), points), ("teacher entropy", look(2), entropy.get(modality, []))]
        if modality in ceiling:
            drawn.append(("collapse", Look(look(1).colour, "", "6 2"), ceiling[modality]))
        for _, style, curve in drawn:
            _draw(axes, style, curve)
        title = TITLES[modality]
        _rounds(axes)
        panels.append(_panel(title, figure, f"Loss over rounds, {title}", drawn))
    return panels


LOSS_LEGEND: Final = (
    ("loss", look(0)), ("teacher entropy", look(2)), ("collapse", Look(look(1).colour, "s", "6 2")),
)  # fmt: skip
"""What the lines of `loss_panels` are."""


def modality_panel(
    title: str, found: Series, *, reference: float | None = None, breaks: bool = True
) -> Panel:
    """One figure over rounds, a line a modality; the rest as in `curve_panel`."""
    drawn = [(TITLES[modality], modality_look(modality), found[modality]) for modality in found]
    return curve_panel(title, drawn, reference=reference, breaks=breaks)


@matplotlib.rc_context(STYLE)
def curve_panel(
    title: str, drawn: Drawn, *, reference: float | None = None, breaks: bool = True
) -> Panel:
    """One figure over rounds.

    Args:
        title: What is drawn.
        drawn: The lines.
        reference: A dotted line across.
        breaks: Leave a gap where rounds are missing.
    """
    figure, axes = canvas(WIDTH, HEIGHT)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.9, linestyle=":")
    crowded = len(drawn) > MOST_NAMED
    for _, style, points in drawn:
        _draw(axes, style, points, breaks=breaks, crowded=crowded)
    _rounds(axes)
    return _panel(title, figure, f"{title} over rounds", drawn)


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
    drawn = [(shorten(site), looks[site], found[site]) for site in shown]
    legend = tuple((name, style) for name, style, _ in drawn)
    if len(found) > len(shown):
        at: dict[int, list[float]] = {}
        for points in found.values():
            for x, y in points:
                at.setdefault(x, []).append(y)
        xs = sorted(at)
        low, high = [min(at[x]) for x in xs], [max(at[x]) for x in xs]
        axes.fill_between(xs, low, high, color=MUTED, alpha=0.18, linewidth=0)
        middle = [(x, median(at[x])) for x in xs]
        axes.plot(xs, [y for _, y in middle], color=MUTED, linewidth=1.5)
        drawn.append(("median", Look(MUTED, "", ""), middle))
    for site in shown:
        _draw(axes, looks[site], found[site])
    _rounds(axes)
    said = f"{title} over rounds, {len(found)} sites"
    return _panel(title, figure, said, drawn, legend)


@matplotlib.rc_context(STYLE)
def seconds_panel(phases: Mapping[str, Sequence[float]]) -> Panel:
    """Seconds of each round by phase at the coordinator, on top of one another.

    Args:
        phases: Phase -> seconds of rounds 1, 2, ...
    """
    figure, axes = canvas(*WIDE)
    rounds = max(map(len, phases.values()))
    floor = [0.0] * rounds
    drawn = []
    for index, phase in enumerate(PHASES):
        values, style = phases[phase], look(index)
        top = [a + b for a, b in zip(floor, values, strict=True)]
        axes.fill_between(
            [n + 0.5 for n in range(rounds + 1)], [*floor, floor[-1]], [*top, top[-1]],
            step="post", color=style.colour, linewidth=0,
        )  # fmt: skip
        floor = top
        drawn.append((phase.replace("_", " "), style, list(enumerate(values, 1))))
    axes.set_ylim(0, max(floor, default=1.0) * 1.05 or 1.0)
    axes.set_xlim(0.5, rounds + 0.5)
    _rounds(axes)
    said = ", ".join(f"{name} {sum(y for _, y in curve):.0f} s" for name, _, curve in drawn)
    legend = tuple((name, style) for name, style, _ in drawn)
    picture = svg(figure, f"Seconds by phase: {said}")
    return Panel("Seconds of a round by phase", picture, legend, _readout(figure, drawn))


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


def _draw(
    axes: Axes, style: Look, points: Curve, *, breaks: bool = True, crowded: bool = False
) -> None:
    """A line that breaks where rounds in between are missing, unless they are meant to be."""
    xs: list[float] = []
    ys: list[float] = []
    for x, y in points:
        if xs and breaks and x - xs[-1] > 1:
            xs.append(x - 0.5)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y)
    every = max(len(xs) // MARKS, 1) if crowded or len(points) > MOST_MARKED else 1
    lonely = not style.marker and len(points) == 1
    axes.plot(
        xs, ys, color=style.colour, linestyle=style.linestyle,
        marker="o" if lonely else style.marker or None, linewidth=1.2,
        # Each line begins elsewhere, so that lines that lie on one another are all seen.
        markevery=(len(axes.lines) * every // MARKS % every, every),
    )  # fmt: skip


def _rounds(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _panel(
    title: str, figure: Figure, description: str, drawn: Drawn,
    legend: tuple[tuple[str, Look], ...] = (),
) -> Panel:  # fmt: skip
    said = "; ".join(
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for name, _, points in drawn
        if points
    )  # first and last values, for readers who cannot see the lines
    picture = svg(figure, f"{description}: {said}")
    return Panel(title, picture, legend, _readout(figure, drawn))


def _readout(figure: Figure, drawn: Drawn) -> str:
    """Panel.readout of a figure that has been laid out, which `svg` does."""
    axes = figure.axes[0]
    box, (first, last) = axes.get_position(), axes.get_xlim()
    lines = [
        {"name": name, "colour": style.variable, "x": [x for x, _ in points],
         "y": [float(f"{y:.4g}") for _, y in points]}
        for name, style, points in drawn
    ]  # fmt: skip
    place = {"left": box.x0, "right": box.x1, "first": float(first), "last": float(last)}
    rounded = {name: round(value, 4) for name, value in place.items()}
    return json.dumps({**rounded, "lines": lines}, separators=(",", ":"))
