"""`fedmermed-site status`: what this site does now, what it answered and what left, from its files.

**Guarantees**:
    - Looking changes nothing of the site's state, from which alone all of it comes.
    - What a coordinator wrote (a study's id, what a refusal quotes) is shown as one printable line:
      it cannot steer the terminal.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live as Display
from rich.table import Table
from rich.text import Text

from client.chain import FILE as AUDIT_FILE
from client.chain import HEAD, Chain, Entry, read
from client.progress import Progress, read_progress
from client.site import SiteConfig
from core.admission import printable
from core.errors import UserError
from core.lock import held

REDRAW_SECONDS: Final = 1.0
SHOWN_REFUSALS: Final = 5
NOT_DONE: Final = "not done: "


@dataclass
class StudyStatus:
    """What the audit file tells of one study."""

    rounds: int = 0
    """Rounds that were answered with an update."""
    last_round: int = 0
    last_time: str = ""
    """Of the last line, UTC."""
    sent: int = 0
    """Replies that left, of any kind."""
    bytes: int = 0
    """Of their arrays."""
    refused: int = 0
    epsilon: float | None = None
    """Spent in this study; None: it has no record privacy."""


@dataclass(frozen=True)
class Refused:
    """A message that was answered with a reason and nothing else."""

    time: str
    study: str
    round: int
    message: str
    reason: str


@dataclass(frozen=True)
class SiteStatus:
    """A site at a glance."""

    site: str
    joined: bool
    """Whether `fedmermed-site join` runs on this state."""
    training: dict[str, Progress]
    """study -> its progress, of those that train at this moment"""
    studies: dict[str, StudyStatus]
    refusals: tuple[Refused, ...]
    """All, in order."""
    audit_lines: int
    audit_problem: str
    """Empty: the chain is whole."""
    now: float = field(default_factory=time.time)


class StatusReader:
    """Looks at a site's files again and again; the audit file is read when it has changed."""

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        self._seen: tuple[Any, ...] = ()
        self._chain: Chain | None = None

    def read(self) -> SiteStatus:
        """What the site's files tell now."""
        state, studies, refusals = self._site.state_path, dict[str, StudyStatus](), list[Refused]()
        chain = self._read_chain(state)
        for entry in chain.entries if chain else ():
            if entry.get("direction") == "out":
                _take(entry, studies, refusals)
        return SiteStatus(
            site=self._site.name,
            joined=held(state / "join.lock"),
            training=_training(state),
            studies=studies,
            refusals=tuple(refusals),
            audit_lines=chain.head.lines if chain else 0,
            audit_problem=printable(chain.problem) if chain else "",
        )

    def _read_chain(self, state: Path) -> Chain | None:
        seen = tuple(_stamp(state / name) for name in (AUDIT_FILE, HEAD))
        if seen != self._seen:
            try:
                self._chain = read(state)
            except UserError:
                if any(seen):  # it is there, and cannot be read
                    raise
                self._chain = None
            self._seen = seen
        return self._chain


def show_status(
    site: SiteConfig, console: Console, *, watch: bool = False, as_json: bool = False
) -> bool:
    """Print a site's status, once or until Ctrl-C; returns whether its audit chain is whole.

    Args:
        site: The site.
        console: Where to.
        watch: Draw it anew each second.
        as_json: Print JSON instead, one line a look where `watch` is set too.
    """
    reader = StatusReader(site)
    status = reader.read()
    if as_json:
        print(json.dumps(asdict(status), indent=None if watch else 1), flush=True)
    elif not watch:
        console.print(picture(status))
    try:
        while watch and as_json:
            time.sleep(REDRAW_SECONDS)
            status = reader.read()
            print(json.dumps(asdict(status)), flush=True)
        if watch:
            with Display(picture(status), console=console, auto_refresh=False) as display:
                while True:
                    time.sleep(REDRAW_SECONDS)
                    status = reader.read()
                    display.update(picture(status), refresh=True)
    except KeyboardInterrupt:
        pass
    return not status.audit_problem


def picture(status: SiteStatus) -> RenderableType:
    """The status as a terminal of 80 columns shows it."""
    parts: list[RenderableType] = []
    if status.audit_problem:
        parts.append(Text(f"! the audit chain is broken: {status.audit_problem}", "bold red"))
        parts.append(Text("  -> keep both files; then see: fedmermed-site audit"))
    joined = "joined" if status.joined else "not joined (fedmermed-site join does not run)"
    parts.append(Text(f"site {status.site}: ", "bold") + Text(joined))
    parts += [_doing(study, progress, status.now) for study, progress in status.training.items()]
    if status.joined and not status.training:
        parts.append(Text("waits for the next message"))
    if status.studies:
        parts += [Text(), _studies(status)]
    else:
        parts.append(Text("no message has reached this site yet"))
    for one in status.refusals[-SHOWN_REFUSALS:]:
        where = f"study {one.study[:8]}, round {one.round}" if one.round else one.message
        parts.append(Text(f"! {_short(one.time)}, {where}: {one.reason}", "yellow"))
    if (more := len(status.refusals) - SHOWN_REFUSALS) > 0:
        parts.append(Text(f"  and {more} before; see: fedmermed-site audit"))
    if status.audit_lines and not status.audit_problem:
        parts.append(Text(f"audit chain whole: {status.audit_lines:,} lines", "green"))
    return Group(*parts)


def _doing(study: str, progress: Progress, now: float) -> Text:
    what = f"step {progress.step:,} of {progress.steps:,}" if progress.step else "reads images"
    text = f"trains round {progress.round} of study {study[:8]}: {what}"
    if progress.loss is not None:
        text += f", loss {progress.loss:.3f}"
    if progress.images_per_second is not None:
        text += f", {progress.images_per_second:,.0f} images/s"
    if progress.gpu_bytes is not None:
        text += f", {progress.gpu_bytes / 1e9:.1f} GB of GPU memory"
    return Text(f"{text}, for {(now - progress.began) / 60:.0f} min", "green")


def _studies(status: SiteStatus) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("study", "rounds", "last", "at, UTC", "replies", "bytes", "refused", "epsilon"):
        left = heading in ("study", "at, UTC")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for name, study in status.studies.items():
        table.add_row(
            Text(name[:8] or "(none)"), str(study.rounds), str(study.last_round or "-"),
            Text(_short(study.last_time)), str(study.sent), f"{study.bytes:,}",
            Text(str(study.refused), "yellow" if study.refused else "default"),
            "none" if study.epsilon is None else f"{study.epsilon:.3f}",
        )  # fmt: skip
    return table


def _take(entry: Entry, studies: dict[str, StudyStatus], refusals: list[Refused]) -> None:
    """Count one line of a message out."""
    name = printable(str(entry.get("study", "")), 64)
    decision, when = str(entry.get("decision", "")), printable(str(entry.get("time", "")), 40)
    number, message = entry.get("round"), printable(str(entry.get("message", "")), 40)
    study, number = studies.setdefault(name, StudyStatus()), number if type(number) is int else 0
    study.last_time = when
    if decision.startswith(NOT_DONE):
        study.refused += 1
        reason = printable(decision.removeprefix(NOT_DONE))
        refusals.append(Refused(when, name, number, message, reason))
        return
    study.sent += 1
    if type(entry.get("bytes")) is int:
        study.bytes += entry["bytes"]
    if message == "train" and number > study.last_round:  # one sent again is the same round
        study.rounds, study.last_round = study.rounds + 1, number
    if isinstance(entry.get("epsilon"), int | float):
        study.epsilon = float(entry["epsilon"])


def _training(state: Path) -> dict[str, Progress]:
    """Progress of the studies whose lock is held: a killed process leaves its file behind."""
    found = {}
    for directory in sorted((state / "studies").glob("*")):
        if held(directory / "lock") and (progress := read_progress(directory)):
            found[printable(directory.name, 64)] = progress
    return found


def _short(when: str) -> str:
    return when[:16].replace("T", " ")


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        facts = file.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
