"""How our command lines speak: one-line errors on standard error, exit status 2."""

import sys
from collections.abc import Callable

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


def new_app(help_text: str) -> typer.Typer:
    """A typer app with our conventions: help without arguments, no shell-completion options."""
    return typer.Typer(
        help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
