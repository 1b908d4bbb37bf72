"""How our command lines speak: one-line errors on standard error, exit status 2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from core.errors import UserError


def run_command_line(app: Callable[[], object]) -> None:
    """Run a typer app; a UserError becomes one red line and exit status 2, without a traceback."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)


@contextmanager
def counting(
    console: Console, description: str, total: int, *, transient: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar that an exception ends at once, as `rich.progress.track` does not.

    That one lives in a generator: what is raised in its loop leaves it to the garbage collector,
    which may end it in the middle of another line of the console, and wait there for ever.

    Yields:
        What to call after each of the `total` things, with how many are done where that is known.
    """
    from rich.progress import Progress

    with Progress(console=console, transient=transient) as bar:
        task = bar.add_task(description, total=total)

        def one_done(done: int | None = None) -> None:
            if done is None:
                bar.advance(task)
            else:
                bar.update(task, completed=done)

        yield one_done


def new_app(help_text: str) -> typer.Typer:
    """A typer app with our conventions: help without arguments, no shell-completion options."""
    return typer.Typer(
        help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
