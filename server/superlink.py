"""`python -m server.superlink ...`: Flower's SuperLink with more patience for its database.

Flower waits 5 s for SQLite's lock and then answers 500, which ends the run: at a state of 400 MB
and three sites it does (measured). Its own arguments are passed on as they are.
"""

import importlib
from typing import Any

from core.console import run_command_line
from core.errors import UserError

BUSY_MILLISECONDS = "120000"


def raise_busy_timeout() -> None:
    """Have Flower's database connections wait for a lock for two minutes.

    Raises:
        UserError: this version of Flower keeps its settings elsewhere.
    """
    constant: Any = importlib.import_module("flwr.supercore.constant")
    pragmas = dict(getattr(constant, "SQLITE_PRAGMAS", ()))
    if "busy_timeout" not in pragmas:
        raise UserError(
            "flwr.supercore.constant.SQLITE_PRAGMAS holds no busy_timeout: this is not Flower "
            "1.41; install the version of constraints.txt"
        )
    patient = tuple((pragmas | {"busy_timeout": BUSY_MILLISECONDS}).items())
    constant.SQLITE_PRAGMAS = patient
    sql_mixin = importlib.import_module("flwr.supercore.sql_mixin")  # copies it when imported
    if dict(sql_mixin.SQLITE_PRAGMAS).get("busy_timeout") != BUSY_MILLISECONDS:
        raise UserError("Flower's database was set up before its patience was raised")


def main() -> None:
    """Become the SuperLink."""
    raise_busy_timeout()
    from flwr.superlink.cli import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    run_command_line(main)
