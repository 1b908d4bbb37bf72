"""How far a long run is: a bar on a terminal, a line a minute in a log file."""

import time
from datetime import timedelta
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_SECONDS: Final = 60.0
"""Between two lines of a log."""
BAR_SECONDS: Final = 0.25


class FileProgress:
    """Counts files and shows how many are done, how fast, and how long the rest will take."""

    def __init__(self, console: Console, total: int, used: int, rejected: int) -> None:
        """Begin to count.

        Args:
            console: Where to show it.
            total: Files of the whole list.
            used: Of those, done by earlier runs with at least one picture.
            rejected: Done by earlier runs without.
        """
        self.read = 0
        self._console = console
        self._total = total
        self._used, self._rejected = used, rejected
        self._start = time.monotonic()
        self._shown = self._start
        self._bar = Progress(
            TextColumn("reading"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,  # no thread beside the one that may fork and write
        )
        self._task = self._bar.add_task("", total=total, completed=used + rejected)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self._console.is_terminal:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning of this run."""
        return time.monotonic() - self._start

    def count(self, *, used: bool) -> None:
        """Count one more file."""
        self.read += 1
        self._used += used
        self._rejected += not used
        pause = BAR_SECONDS if self._console.is_terminal else LINE_SECONDS
        if time.monotonic() - self._shown >= pause:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        done = self._used + self._rejected
        rate = self.read / max(self.seconds, 1e-3)
        left = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown"
        counts = f"{self._used:,} used, {self._rejected:,} rejected"
        facts = f"{rate:,.0f} files/s, {left} left, {counts}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, description=facts, refresh=True)
        else:
            self._console.print(f"{done:,} of {self._total:,} files, {facts}", soft_wrap=True)
