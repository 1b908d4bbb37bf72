"""A study for TensorBoard: its history as event files.

LOGDIR/<name of the run directory> gets one event file of scalars, over rounds:
  <metric>/<modality>          mean over sites: loss, loss_ceiling, teacher_entropy, rankme, ...
  <metric>/<modality>/<site>   of one site
  site_<figure>/<site>         update_norm, norm_ratio, cosine, weight, seconds
  seconds/<phase>, bytes/down, bytes/up, sites/<outcome>, alarms
knn_auroc is of the model that sites received: it stands at the round before, 0 before training.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from core.checkpoint import read_json
from core.errors import UserError
from core.wire import METRICS
from server.history import Line, read_history, read_recipe

SUFFIX: Final = ".fedmermed"
"""How the name of an event file of ours ends."""
FIGURES: Final = ("update_norm", "norm_ratio", "cosine", "weight", "seconds")
POLL_SECONDS: Final = 5.0
Scalar = tuple[str, float, int]
"""Tag, value, round"""


def write_events(run: Path, logdir: Path, *, follow: bool = False) -> Path:
    """Write the event file of a study anew; what this wrote there before is replaced.

    Args:
        run: The run directory; it is only read.
        logdir: What TensorBoard is given.
        follow: Go on with new rounds until the last one of the recipe is done.

    Returns:
        The directory of the event file.

    Raises:
        UserError: there is no such study, or tensorboardX is not installed.
    """
    if not (run / "recipe.json").exists():
        raise UserError(f"'{run}' is not a run directory; give the directory of a study")
    out = logdir / run.resolve().name
    if out.resolve() == run.resolve():
        raise UserError(f"'{logdir}' holds the run directory itself; give another LOGDIR")
    writer_class = _writer_class()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    rounds, start = read_recipe(run / "recipe.json").federation.rounds, began(run)
    with writer_class(str(out), filename_suffix=SUFFIX) as writer:
        told = 0
        while True:
            lines = read_history(run)
            _write(writer, lines, told, start)
            told = len(lines)  # fewer than before, if damaged rounds were dropped: they come again
            if not follow or told >= rounds:
                return out
            writer.flush()
            time.sleep(POLL_SECONDS)


def scalars(line: Line) -> Iterator[Scalar]:
    """All scalars of a round."""
    number = line["round"]
    for name, value in line["metrics"].items():
        if name.partition("/")[0] in METRICS:
            yield name, value, _step(name, number)
    for site, outcome in line["sites"].items():
        for name, value in outcome.get("metrics", {}).items():
            if name.partition("/")[0] in METRICS:
                tag = f"{name}/{site}" if "/" in name else f"site_{name}/{site}"
                yield tag, value, _step(name, number)
        for figure in FIGURES:
            if outcome.get(figure) is not None:
                yield f"site_{figure}/{site}", outcome[figure], number
    outcomes = [outcome["outcome"] for outcome in line["sites"].values()]
    for name in sorted({"admitted", *outcomes}):
        yield f"sites/{name}", outcomes.count(name), number
    for phase, seconds in line["seconds"].items():
        yield f"seconds/{phase}", seconds, number
    yield "bytes/down", line["bytes_down"], number
    yield "bytes/up", line["bytes_up"], number
    yield "alarms", len(line["alarms"]), number


def _step(name: str, number: int) -> int:
    return number - 1 if name.startswith("knn_auroc") else number


def timed(lines: Sequence[Line], start: float) -> Iterator[tuple[Line, float]]:
    """Rounds and when each was done; they have no time in the history: they follow one another."""
    now = start
    for line in lines:
        now += sum(line["seconds"].values())
        yield line, now


def began(run: Path) -> float:
    """When a study began, in Unix seconds; 0 where that was not noted."""
    file = run / "study.json"
    return datetime.fromisoformat(read_json(file)["began"]).timestamp() if file.exists() else 0.0


def _write(writer: Any, lines: Sequence[Line], told: int, start: float) -> None:
    for line, now in timed(lines, start):
        if line["round"] > told:
            for tag, value, step in scalars(line):
                writer.add_scalar(tag, value, step, walltime=now)


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise UserError(
            "event files need tensorboardX, which is not installed; "
            "pip install 'fedmermed[tensorboard]'"
        ) from None
    return SummaryWriter
