"""The history in few numbers: read line by line as it grows, and let go of.

Five hundred rounds of fifty sites are 20 MB of history.jsonl; what is kept of them here is a tally
a site, a series a figure, and the words of the last round.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.admission import printable
from core.modalities import MODALITIES
from core.wire import EPSILON, METRICS
from server.history import Line
from server.roster import SITE_NAME

OUTCOMES: Final = ("admitted", "rejected", "error", "silent", "absent", "quarantined")
PHASES: Final = ("exchange", "wait_for_sites", "admit", "screen", "aggregate")
"""What the coordinator's time in a round goes to."""
ROUNDS_UNTRAINED: Final = 3
"""After more rounds without a modality the model may lose it."""
Points = list[tuple[int, float]]
"""(round, value)"""


@dataclass
class SiteTally:
    """What a site did in all rounds so far."""

    rounds: Counter[str] = field(default_factory=Counter)
    """outcome -> how many rounds ended so"""
    last_admitted: int = 0
    outcome: str = ""
    """Of the last round."""
    reason: str = ""
    rejected_reason: str = ""
    """Of the last time that it was rejected."""
    seconds: float | None = None
    """From question to answer, the last time that it answered."""
    bytes_up: int = 0
    """Of all its replies, as far as they were counted."""
    images: dict[str, int] = field(default_factory=dict)
    """modality -> training images, as it reported them last"""
    epsilon: float | None = None
    """What its ledger held of the study when it last answered; None: no record privacy."""
    norms: Points = field(default_factory=list)
    """Lengths of its updates."""


class Tally:
    """What a run directory's history comes to.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / "history.jsonl"
        self._begin()

    def _begin(self) -> None:
        self._offset, self._inode = 0, 0
        self.rounds = 0
        self.damaged = False
        """Whether the file holds a line that is none; it and those after it do not count."""
        self.sites: dict[str, SiteTally] = {}
        self._trained: dict[str, int] = {}
        self.series: dict[str, dict[str, Points]] = {}
        """modality -> metric -> its mean over sites, round by round"""
        self.seconds: list[float] = []
        """Of each round."""
        self.phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
        """The same by phase."""
        self.bytes_up = self.bytes_down = 0
        self.epsilon: float | None = None
        """What the server's ledger held after the last round; None: no site privacy."""
        self.alarms: list[str] = []
        """Of the last round, as are the two below."""
        self.outliers: list[tuple[str, str]] = []
        """site, words"""
        self.refused: list[str] = []

    def read(self) -> None:
        """Take in what was added since the last time; all of it where the file was written anew."""
        try:
            file = open(self._file, "rb")  # noqa: SIM115 closed below
        except FileNotFoundError:
            return self._begin()
        with file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._begin()
                self._inode = facts.st_ino
            file.seek(self._offset)
            for text in file:
                if self.damaged or not text.endswith(b"\n"):  # half a line may be completed yet
                    break
                self._take(text)
                self._offset += len(text)
        return None

    def by_metric(self, metric: str) -> dict[str, Points]:
        """Modality -> its mean over sites of a metric, round by round."""
        return {m: found[metric] for m, found in self.series.items() if metric in found}

    def untrained(self) -> dict[str, int]:
        """Modality that no admitted update was trained on lately -> the last round with one."""
        return {m: n for m, n in self._trained.items() if self.rounds - n > ROUNDS_UNTRAINED}

    @property
    def version(self) -> tuple[int, int]:
        """Another one whenever there is news."""
        return self._inode, self._offset

    def _take(self, text: bytes) -> None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or line.get("round") != self.rounds + 1:
            self.damaged = True
            return
        self.rounds += 1
        for name, outcome in _table(line, "sites").items():
            if SITE_NAME.fullmatch(name) and isinstance(outcome, dict):
                self._site(self.sites.setdefault(name, SiteTally()), outcome)
        for name, value in _table(line, "metrics").items():
            metric, _, modality = name.partition("/")
            if name == EPSILON and (number := _number(value)):
                self.epsilon = number[0]
            if metric in METRICS and modality in MODALITIES and (number := _number(value)):
                points = self.series.setdefault(modality, {}).setdefault(metric, [])
                points.append((self.rounds, number[0]))
        seconds = _table(line, "seconds")
        self.seconds.append(sum(number[0] for s in seconds.values() if (number := _number(s))))
        for phase, past in self.phases.items():
            past.append((_number(seconds.get(phase)) or (0.0,))[0])
        self.bytes_up += _whole(line.get("bytes_up"))
        self.bytes_down += _whole(line.get("bytes_down"))
        self.alarms = [printable(str(words)) for words in _list(line, "alarms")]
        self.refused = [printable(str(words)) for words in _list(line, "refused_nodes")]
        self.outliers = [
            (str(o.get("site")), printable(str(o.get("words"))))
            for o in _list(line, "outliers")
            if isinstance(o, dict) and SITE_NAME.fullmatch(str(o.get("site")))
        ]

    def _site(self, site: SiteTally, outcome: Line) -> None:
        what = outcome.get("outcome")
        if what not in OUTCOMES:
            return
        site.rounds[what] += 1
        site.outcome, site.reason = what, printable(str(outcome.get("reason", "")))
        if what == "admitted":
            site.last_admitted = self.rounds
            images = _table(outcome, "num_examples").items()
            site.images = {m: _whole(n) for m, n in images if m in MODALITIES}
            self._trained |= {m: self.rounds for m, count in site.images.items() if count}
            if number := _number(_table(outcome, "metrics").get(EPSILON)):
                site.epsilon = number[0]
        elif what == "rejected":
            site.rejected_reason = site.reason
        if number := _number(outcome.get("seconds")):
            site.seconds = number[0]
        if number := _number(outcome.get("update_norm")):
            site.norms.append((self.rounds, number[0]))
        site.bytes_up += _whole(outcome.get("bytes"))


def _table(line: Line, name: str) -> dict[str, Any]:
    found = line.get(name)
    return found if isinstance(found, dict) else {}


def _list(line: Line, name: str) -> list[Any]:
    found = line.get(name)
    return found if isinstance(found, list) else []


def _number(value: Any) -> tuple[float] | None:
    """A finite number in a tuple, which is true where it is 0."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return (float(value),) if known else None


def _whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
