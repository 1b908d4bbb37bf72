"""How checks are shown: a list that grows while they run, then a table; JSON for scripts."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from client.check.findings import Finding, Status, from_error
from core.errors import UserError

P = ParamSpec("P")


class Board:
    """The findings so far, by the name of their check."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self._running: tuple[Spinner, str, float] | None = None

    @contextmanager
    def shown(self, console: Console) -> Iterator[None]:
        """Show the list while it grows; a file or a pipe gets the table alone."""
        with Live(self, console=console, transient=True, redirect_stderr=False):
            yield

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Show a spinner and the seconds of what is being done."""
        self._running = (Spinner("dots"), name, time.monotonic())
        yield
        self._running = None

    def run(
        self, name: str, check: Callable[P, Finding], *args: P.args, **kwargs: P.kwargs
    ) -> Finding:
        """Run one check and keep what it finds; a UserError is red."""
        with self.running(name):
            try:
                finding = check(*args, **kwargs)
            except UserError as error:
                finding = from_error(error)
        self.findings[name] = finding
        return finding

    def count(self, status: Status) -> int:
        """How many findings have this colour."""
        return Counter(finding.status for finding in self.findings.values())[status]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # As many as fit: a list that outgrows the screen would hide the spinner below it.
        fitting = max(1, (options.max_height or console.height) - 2)
        for name, finding in list(self.findings.items())[-fitting:]:
            yield f"[{finding.status}]●[/] {escape(name)}"
        if self._running:
            spinner, name, started = self._running
            spinner.update(text=f"{escape(name)} [dim]{time.monotonic() - started:.0f} s[/]")
            yield spinner


def table(board: Board, title: str) -> Table:
    """All findings with what to do about those that are not green."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, expand=True)
    result.add_column("")
    result.add_column("check", no_wrap=True)
    result.add_column("found", overflow="fold", ratio=3)
    result.add_column("remedy", overflow="fold", ratio=2)
    for name, finding in board.findings.items():
        status = f"[bold {finding.status}]{finding.status}[/]"
        result.add_row(status, escape(name), escape(finding.found), escape(finding.remedy))
    return result


def as_json(board: Board, site: str, recipe: str) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "site": site,
        "recipe": recipe,
        **{str(status): board.count(status) for status in Status},
        "checks": [
            {
                "check": name,
                "status": str(finding.status),
                "found": finding.found,
                "remedy": finding.remedy,
                "values": dict(finding.values),
            }
            for name, finding in board.findings.items()
        ],
    }
