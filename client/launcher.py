"""Answer each message of the SuperNode by the site's own ClientApp, whatever bundle came with it.

Flower's `flwr-clientapp` unpacks the bundle that the coordinator sent, and imports it. This program
takes its place: it has Flower fetch the message and push the reply, and does the rest itself.

It imports ahead all that training needs, which takes longer than a short round, says READY, and
waits for tasks: an Order as JSON on each line. For each it forks. Both go over the socket that is
its standard input.

**Guarantees**, for every bundle and message:
    - The bundle is hashed, and neither unpacked, installed, written to disk nor imported.
    - What answers is `client.app` of the installation that this program belongs to.
    - Only a reply that `client.app` made leaves; an error of Flower's own leaves without its text.
    - It does not start beside a Flower that it was not checked against, nor where a name that it
      replaces is missing or no longer called, nor from a directory of unpacked bundles.
    - Each message has a process of its own, which begins as this one is after its imports: before a
      task comes, nothing of the site is read but this program.
    - It ends when whoever started it ends.
"""

import argparse
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from flwr.app import Array, ArrayRecord, Context, Error, Message
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supercore.utils import get_flwr_home
from flwr.supernode.runtime import run_clientapp as flower

import client
import core
from client.app import CLIENT_APP_ERROR, FAILED, respond
from client.guard import FIRST_PAUSE_SECONDS, replace_in
from core.errors import UserError
from core.parcel import close_parcel, open_parcel

LOG = logging.getLogger("fedmermed.site")
AHEAD: Final = ("core.site_round", "core.private_round", "client.evaluation")
"""What a message's process imports when it needs it, torch among it."""
READY: Final = b"\n"
"""What it says, once, when its imports are done."""


@dataclass(frozen=True)
class Order:
    """A task: where the SuperNode is, and by which token it gives the message."""

    runtime_api_address: str
    token: str
    insecure: bool
    root_certificates: str | None
    parent_pid: int | None
    """Flower's task ends when this process does."""


def main() -> None:
    """Start a process for each order, until there can be no more."""
    _log_ours()
    site_file = _parser().parse_args().site
    try:
        check_own_code()
        replace_in(flower, flower.run_clientapp, Task(site_file).replacements())
        pull = "pull_and_inflate_object_from_tree"
        sooner = partial(vars(flower)[pull], initial_backoff=FIRST_PAUSE_SECONDS)
        replace_in(flower, flower.pull_task_input, {pull: sooner})
    except UserError as error:
        sys.exit(f"error: {error}")
    import_ahead()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries who has ended
    with suppress(BrokenPipeError):  # whom to tell is gone, and so are the orders
        os.write(0, READY)
    # Without a buffer: what is read ahead here would be a token in another task's process.
    with open(0, "rb", buffering=0, closefd=False) as orders:
        while line := orders.readline():
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                run(Order(**json.loads(line)))


def import_ahead() -> None:
    """Import what takes long; what cannot be imported is told of, and again by who needs it.

    Nothing here may ask for a GPU: a process that has cannot share it with what it forks.
    """
    for module in AHEAD:
        try:
            importlib.import_module(module)
        except ImportError as error:
            LOG.warning("%s cannot be imported: %s", module, error)


def run(order: Order) -> None:
    """Have Flower work on one task, then end."""
    flower.run_clientapp(
        runtime_api_address=order.runtime_api_address,
        token=order.token,
        insecure=order.insecure,
        certificates=validate_and_resolve_root_certificates(
            order.root_certificates, order.insecure
        ),
        parent_pid=order.parent_pid,
        runtime_dependency_install=False,
    )


def check_own_code() -> None:
    """Hold that our packages are one installation, and none that came over the wire.

    Raises:
        UserError: they are not.
    """
    roots = {Path(str(package.__file__)).resolve().parents[1] for package in (client, core)}
    bundles = get_flwr_home().resolve() / "apps"
    foreign = [path for path in sys.path if Path(path).resolve().is_relative_to(bundles)]
    if len(roots) > 1 or foreign or any(root.is_relative_to(bundles) for root in roots):
        found = ", ".join(f"'{path}'" for path in [*sorted(map(str, roots)), *foreign])
        raise UserError(
            f"code would be read from {found}; expected one installation, outside '{bundles}': "
            "correct PYTHONPATH, or install this program anew"
        )


class Task:
    """What is known of the one message: its bundle, and the reply that may leave."""

    def __init__(self, site_file: Path) -> None:
        self._site_file = site_file
        self._bundle = ""
        self._reply: Message | None = None
        self._push = flower.push_message

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Flower's name -> what it shall mean here."""
        return {
            "install_from_fab": self.receive_bundle,
            "install_app_dependencies": self.install_nothing,
            "get_load_client_app_fn": self.find_app,
            "push_message": self.push_message,
        }

    def receive_bundle(self, content: bytes, *_: object, **__: object) -> None:
        """Note which bundle came, by our own count; leave it where it is."""
        self._bundle = hashlib.sha256(content).hexdigest()

    def install_nothing(self, *_: object, **__: object) -> None:
        """Refuse to install what a bundle asks for."""
        raise UserError("a bundle's dependencies are not installed at this site")

    def find_app(self, *_: object, **__: object) -> Callable[..., Callable[..., Message]]:
        """Stand in for a search among unpacked bundles."""
        return lambda *_: self.answer

    def answer(self, message: Message, context: Context) -> Message:
        """Have our app answer, for this site and as sent with this bundle."""
        config = {**context.node_config, "site": str(self._site_file)}
        mine = Context(context.run_id, context.node_id, config, context.state, {})
        for record in _arrays_of(message):
            open_parcel(record, Array)
        self._reply = respond(message, mine, self._bundle)
        for record in _arrays_of(self._reply):
            close_parcel(record, Array)
        return self._reply

    def push_message(self, connection: Any, message: Message, context: Context) -> None:
        """Push a reply, if our app made it; an error that Flower made loses its text."""
        if message is not self._reply:
            message.error = Error(CLIENT_APP_ERROR, FAILED)  # raises if it holds anything else
        self._push(connection, message, context)


def _arrays_of(message: Message) -> list[ArrayRecord]:
    return list(message.content.array_records.values()) if message.has_content() else []


def _log_ours() -> None:
    """Print our own warnings; Flower's lines would tell of steps that do not happen here."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("fedmermed")
    logger.addHandler(handler)
    logger.propagate = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
