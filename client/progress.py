"""What a site trains now: STATE/studies/ID/progress.json, for the site's own eyes.

It is written while a round trains, at most once a second, and removed when the round is stored; one
that a killed process left behind is told by the study's lock, which nobody holds then. It holds a
loss and speeds, no pixel and no patient, and no message to the coordinator is made of it.
"""

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.checkpoint import write_atomically

LOG = logging.getLogger("fedmermed.site")
FILE: Final = "progress.json"
WRITE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a round is. Times are Unix seconds."""

    round: int
    step: int
    """Steps done; 0 while images are read and the model is measured."""
    steps: int
    loss: float | None
    images_per_second: float | None
    gpu_bytes: int | None
    """The most memory that torch took on the (first) GPU; None on a CPU."""
    began: float
    written: float


class ProgressFile:
    """Writes a round's progress; call it after each step.

    Args:
        directory: The study's state, which this process has locked.
        round_number: The round.
        steps: Of the round.
        batch_size: Images a step.
    """

    def __init__(self, directory: Path, round_number: int, steps: int, batch_size: int) -> None:
        self._file = directory / FILE
        self._round, self._steps, self._batch = round_number, steps, batch_size
        self._began = time.time()
        self._first: tuple[int, float] | None = None
        self._written = -math.inf
        self.step(0, None)

    def step(self, done: int, loss: float | None, gpu_bytes: int | None = None) -> None:
        """So many steps are done."""
        now = time.monotonic()
        self._first = self._first or ((done, now) if done else None)
        if now - self._written < WRITE_SECONDS and done < self._steps:
            return
        self._written = now
        speed = None
        if self._first is not None and done > self._first[0]:
            speed = (done - self._first[0]) * self._batch / max(now - self._first[1], 1e-9)
        facts = {
            "round": self._round, "step": done, "steps": self._steps, "loss": loss,
            "images_per_second": speed, "gpu_bytes": gpu_bytes, "began": self._began,
            "written": time.time(),
        }  # fmt: skip
        try:
            write_atomically(self._file, json.dumps(facts).encode() + b"\n", sync=False)
        except OSError as error:  # no reason for a round to fail
            LOG.warning("'%s' cannot be written: %s", self._file, error)


def end_progress(directory: Path) -> None:
    """The round is stored."""
    (directory / FILE).unlink(missing_ok=True)


def read_progress(directory: Path) -> Progress | None:
    """A study's progress as it was written last; None without a whole file."""
    try:
        facts = json.loads((directory / FILE).read_bytes())
        return Progress(
            round=int(facts["round"]),
            step=int(facts["step"]),
            steps=int(facts["steps"]),
            loss=_number(facts["loss"]),
            images_per_second=_number(facts["images_per_second"]),
            gpu_bytes=None if facts["gpu_bytes"] is None else int(facts["gpu_bytes"]),
            began=float(facts["began"]),
            written=float(facts["written"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None


def _number(value: Any) -> float | None:
    """None where there is no finite one: a loss may be NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
