"""The part of a site that speaks to the coordinator: Flower's SuperNode, which looks more often.

Flower's own looks for a message every 3 s and for a reply every half second, however near it is,
and waits a second for the rest of a message of which it has seen the beginning. After an answer of
500 it stays, deaf or without a heartbeat, for ever; this ends, and is started again.

    python -P -m client.supernode <arguments of flower-supernode>
"""

import os
import sys
import threading
from functools import partial
from types import ModuleType
from typing import NoReturn

from flwr.supernode import start_client_internal as flower
from flwr.supernode.cli.flower_supernode import flower_supernode

from client.guard import FIRST_PAUSE_SECONDS, check_flower, replace_in
from client.pauses import Pauses
from core.errors import UserError


def main() -> None:
    """Serve the coordinator until stopped."""
    try:
        look_sooner(flower)
    except UserError as error:
        sys.exit(f"error: {error}")
    end_with_any_thread()
    flower_supernode()
    _end()  # it returns when it has given up


def end_with_any_thread() -> None:
    """End this process where one of its threads fails, as that of the heartbeat may."""

    def end(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not SystemExit:
            threading.__excepthook__(failure)
            _end()

    threading.excepthook = end


def _end() -> NoReturn:
    """At once: other threads would keep the process alive."""
    print("the SuperNode ends with the error above", flush=True)
    os._exit(1)


def look_sooner(module: ModuleType) -> None:
    """Replace the pauses of Flower's loop.

    Raises:
        UserError: Flower is of another version, or sleeps elsewhere.
    """
    version = check_flower()
    for caller in ("start_client_internal", "_push_messages"):
        words = getattr(getattr(module, caller, None), "__code__", None)
        if words is None or not {"time", "sleep"} <= set(words.co_names):
            raise UserError(
                f"Flower {version} has no pause in '{module.__name__}.{caller}'; install Flower "
                "anew"
            )
    pull = partial(module.pull_objects, initial_backoff=FIRST_PAUSE_SECONDS)
    replace_in(module, module._pull_and_store_message, {"pull_objects": pull})
    vars(module)["time"] = Pauses()


if __name__ == "__main__":
    main()
