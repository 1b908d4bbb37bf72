"""Progress of a study in this process: bars on a terminal, plain lines elsewhere."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.config import Recipe
from server.history import describe_round


@contextmanager
def shown_progress(console: Console, recipe: Recipe, sites: int, done: int) -> Iterator[None]:
    """Show what is logged as 'fedmermed' while the block runs.

    Args:
        console: Where to.
        recipe: The study, for its rounds and steps.
        sites: How many sites train; 0: none, there is but pretraining to show.
        done: Rounds that are done already.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"),
        TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    log = logging.getLogger("fedmermed")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        handler = _Handler(bar, recipe, sites, done)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)


class _Handler(logging.Handler):
    """Turns log records into bar and lines."""

    def __init__(self, bar: Progress, recipe: Recipe, sites: int, done: int) -> None:
        super().__init__(logging.INFO)
        self._bar = bar
        self._rounds, self._steps = recipe.federation.rounds, recipe.federation.local_steps
        self._round_steps = self._steps * sites
        self._first = self._done = done * self._round_steps
        self._began = time.monotonic()
        self._pretraining: tuple[int, float] | None = None
        self._usual: tuple[int, float] | None = None
        """Steps after the first round that is shown, and when: it loads data and fills memories,
        which takes several times the others' time."""
        total = self._rounds * self._round_steps
        self._task = bar.add_task(
            f"{recipe.name}", total=total, completed=self._done, visible=sites > 0
        )
        self._phantoms = bar.add_task("pretraining on phantoms", visible=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        step = getattr(record, "step", None)
        line = getattr(record, "line", None)
        pretrained = getattr(record, "pretrained", None)
        if step is not None:
            self._step(*step)
        elif pretrained is not None:
            number, steps = pretrained
            self._pretrained(number, steps, record.getMessage())
        elif line is not None:
            if self._done == self._first:  # rounds of another process, after its pretraining
                at_work = [s for part, s in line["seconds"].items() if part != "wait_for_sites"]
                self._began = time.monotonic() - sum(at_work)
            self._done = line["round"] * self._round_steps
            self._bar.update(self._task, completed=self._done)
            self._say(f"{describe_round(line, self._rounds)}{self._time_left()}")
            self._usual = self._usual or (self._done, time.monotonic())
        else:
            colour = "yellow" if record.levelno >= logging.WARNING else "default"
            self._say(record.getMessage(), colour)

    def _pretrained(self, step: int, steps: int, text: str) -> None:
        now = time.monotonic()
        self._bar.update(self._phantoms, total=steps, completed=step, visible=step < steps)
        # Timed from the first step that is told of: before it phantoms are drawn.
        first, began = self._pretraining = self._pretraining or (step, now)
        if not self._bar.console.is_terminal:
            a_step = (now - began) / (step - first) if step > first else 0.0
            self._say(text + told(a_step * (steps - step)))
        self._began = now  # of the rounds

    def _step(self, site: str, round_number: int, step: int, loss: float) -> None:
        self._done += 1
        what = f"round {round_number}/{self._rounds} {site} step {step}/{self._steps}"
        text = what if math.isnan(loss) else f"{what} loss {loss:.3f}"
        self._bar.update(self._task, completed=self._done, description=text)
        if step == self._steps and not self._bar.console.is_terminal:
            self._say(f"{text}{self._time_left()}")

    def _time_left(self) -> str:
        left = self._rounds * self._round_steps - self._done
        first, began = self._usual or (self._first, self._began)
        if self._done == first:
            return ""
        return told((time.monotonic() - began) / (self._done - first) * left)

    def _say(self, text: str, style: str = "default") -> None:
        self._bar.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def told(seconds: float) -> str:
    """The end of a line that says how long it takes yet; nothing at the end."""
    if seconds <= 0:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
