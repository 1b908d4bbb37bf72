"""What a browser is shown: parts of a page as HTML, each with a digest that tells news from old.

**Guarantees**:
    - Of a site it shows what server/overview.py has, and lengths of its updates: nothing else that
      the history or a reply holds.
    - Every text is escaped where it enters the HTML, whatever site or file it comes from.
    - Files are looked at anew at most twice a second, however many look at the page; pictures are
      drawn when there is a new round, and for no more than a fifth of the time.
"""

import hashlib
import re
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment
from markupsafe import Markup, escape

from core.evaluation.figures import Panel
from core.evaluation.page import page_environment
from core.modalities import TITLES
from server.overview import Overview
from server.overview_reader import OverviewReader
from server.page import charts
from server.report_curves import LOSS_LEGEND, MOST_NAMED, modality_look
from server.status import duration, size
from server.tally import Tally

LOCK: Final = threading.RLock()
"""One look at a time: readers of run directories keep state, and settings of matplotlib are global.
What is not new comes from memory, so nobody waits long."""
FRESH_SECONDS: Final = 0.5
REST: Final = 4.0
"""So many times as long as it took to draw the pictures, they are not drawn again."""
Pictures = dict[str, list[Panel]]


@dataclass(frozen=True)
class Part:
    """A part of a page."""

    html: str
    digest: str


@dataclass(frozen=True)
class Look:
    """A page as it is now.

    Attributes:
        title: Of the browser's window.
        now: Unix seconds.
        parts: Name -> part, in their order on the page; always the same names.
    """

    title: str
    now: float
    parts: dict[str, Part]


class View(ABC):
    """A page that is looked at again and again, by any number of readers."""

    def __init__(self) -> None:
        self._last: tuple[float, Look] | None = None
        self._seen: object = None
        self._drawn: object = None
        self._pictures: Pictures = {}
        self._next_drawing = 0.0

    def look(self) -> Look:
        """The page as it is now, or was half a second ago."""
        with LOCK:
            if self._last is None or time.monotonic() - self._last[0] > FRESH_SECONDS:
                found = self._look()
                self._last = (time.monotonic(), found)
            return self._last[1]

    @abstractmethod
    def _look(self) -> Look: ...

    @abstractmethod
    def _draw(self) -> Pictures: ...

    def _charts(self, version: object) -> Pictures:
        """The pictures, drawn anew where the version has changed, unless they were just now.

        Not in the look that first finds a new version: words shall not wait for pictures.
        """
        began, seen = time.monotonic(), self._seen
        self._seen = version
        waits = self._drawn is not None and (version != seen or began < self._next_drawing)
        if version != self._drawn and not waits:
            self._pictures, self._drawn = self._draw(), version
            ended = time.monotonic()
            self._next_drawing = ended + REST * (ended - began)
        return self._pictures


class StudyView(View):
    """The page of one study.

    Args:
        run: The run directory; it is only read.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._reader = OverviewReader(run)

    def read(self) -> tuple[Overview, Tally]:
        """The study as it is now; to be called, and used, under LOCK."""
        return self._reader.read(), self._reader.tally

    def _look(self) -> Look:
        view, tally = self.read()
        pictures = self._charts(tally.version)
        names = [(TITLES[m], modality_look(m)) for m in TITLES if m in tally.series]
        return Look(
            title=window_title(view),
            now=view.now,
            parts={
                "head": render("head", view),
                "alarms": render("alarms", view),
                "sites": render("sites", view),
                "modalities": render("modalities", view, TITLES),
                "losses": render("losses", pictures["losses"], LOSS_LEGEND),
                "embeddings": render("embeddings", pictures["embeddings"], names),
                "updates": render("updates", pictures["updates"], len(tally.sites), MOST_NAMED),
                "seconds": render("seconds", pictures["seconds"]),
            },
        )

    def _draw(self) -> Pictures:
        """Where not all sites can be drawn: those that stood out, or were rejected most often."""
        tally = self._reader.tally
        rejected = {name: site.rounds["rejected"] for name, site in tally.sites.items()}
        odd = [name for name, _ in tally.outliers]
        odd += sorted(filter(rejected.get, rejected), key=lambda name: -rejected[name])
        return charts.study_charts(tally, list(dict.fromkeys(odd)))


def window_title(view: Overview) -> str:
    """What a tab shows; troubles first, because nothing else is seen of one in the background."""
    grave = sum(alarm.level != "look" for alarm in view.alarms)
    mark = f"({grave}) " if grave else ""
    return f"{mark}{view.name}: {view.state}, {view.rounds_done} of {view.rounds}"


def render(macro: str, *values: Any) -> Part:
    """A part, by a macro of parts.html.j2."""
    html = str(getattr(_macros(), macro)(*values)).strip()
    digest = hashlib.blake2b(f"{macro}\n{html}".encode(), digest_size=6)
    return Part(html, digest.hexdigest())


@cache
def environment() -> Environment:
    """The page's templates."""
    found = page_environment(Path(__file__).parent)
    found.filters |= {"duration": duration, "bytes": size, "clock": _clock, "commands": _commands}
    return found


@cache
def _macros() -> Any:
    return environment().get_template("parts.html.j2").module


def _commands(text: str) -> Markup:
    """What is between back quotes as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _clock(seconds: float) -> str:
    """A time of day for readers without scripts; the others see it as time that has passed."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
