"""How every picture of a report looks: colours, symbols, and pictures as text inside the page."""

import base64
import io
import re
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#010101", "#f0e442",
)  # fmt: skip
"""Okabe and Ito's palette, told apart by all common kinds of colour vision."""
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: Final = ("", "6 2", "2 2", "8 2 2 2", "4 4", "1 3")
SHAPES: Final = {
    "o": "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",
    "s": "M-4-4H4V4H-4Z",
    "^": "M0-5 5 4H-5Z",
    "D": "M0-5 5 0 0 5-5 0Z",
    "v": "M0 5 5-4H-5Z",
    "P": "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    "X": "M-5-2-2-5 0-3 2-5 5-2 3 0 5 2 2 5 0 3-2 5-5 2-3 0Z",
    "p": "M0-5 5-1 3 5H-3L-5-1Z",
}
"""The markers as SVG paths, for legends in the page's own text."""

INK: Final = "#010101"
MUTED: Final = "#020202"
GRID: Final = "#030303"
PAPER: Final = "#040404"
VARIABLES: Final = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--card)",
}
"""Colours that the page's style sheet defines, once for light and once for dark."""

STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class name may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Look:
    """How one model, modality or class is drawn wherever it appears."""

    colour: str
    marker: str
    dash: str
    """As in SVG; "" is a solid line"""

    @property
    def variable(self) -> str:
        """The colour as the style sheet names it."""
        return VARIABLES[self.colour]

    @property
    def shape(self) -> str:
        """The marker as an SVG path."""
        return SHAPES[self.marker]

    @property
    def linestyle(self) -> Any:
        """The dash as matplotlib takes it."""
        return (0, tuple(float(part) / 2 for part in self.dash.split())) if self.dash else "-"


def look(index: int) -> Look:
    """Colour and symbol number `index`; symbols shift when the colours begin anew."""
    turn = index // len(COLOURS)
    return Look(
        COLOURS[index % len(COLOURS)],
        MARKERS[(index + turn) % len(MARKERS)],
        DASHES[(index + turn) % len(DASHES)],
    )


@dataclass(frozen=True)
class Panel:
    """One picture of a row of small multiples."""

    title: str
    picture: Markup
    legend: tuple[tuple[str, Look], ...] = ()
    readout: str = ""
    """For pages that show the values under a pointer: JSON of left and right, where the axes begin
    and end as shares of the width, first and last x there, and lines: name, colour, x and y."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture of so many inches; draw and print it under STYLE."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure, description: str) -> Markup:
    """The figure as an <svg> element for a page: no outside reference, colours by variables.

    Args:
        figure: drawn with the colours of this module.
        description: what a reader who cannot see it is told.
    """
    buffer = io.StringIO()
    # The salt makes identifiers differ from figure to figure on the page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"; font-family: [^;\"]*", "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    text = re.sub(
        r"<svg [^>]*>",
        f'<svg viewBox="{size[0][9:-1]}" style="max-width:{float(size[1]) * 1.75:.0f}px" '
        f'role="img" aria-label="{escape(description)}">',
        text,
        count=1,
    )
    return Markup(text)  # matplotlib escapes the text it draws


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: more cannot be seen."""
    return re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", attribute[0])


def png(image: NDArray[np.uint8], px: int) -> str:
    """An image [H, W], [H, W, 1] or [H, W, 3] as a data URI, at most `px` pixels a side."""
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = image[..., 0]
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((px, px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shorten(text: str, length: int = 28) -> str:
    """One line of at most `length` characters, for a place with no more room."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
