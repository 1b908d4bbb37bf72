"""Answer one message of the SuperNode by the site's own ClientApp, whatever bundle came with it.

Flower's `flwr-clientapp` unpacks the bundle that the coordinator sent, and imports it. This program
takes its place: it has Flower fetch the message and push the reply, and does the rest itself.

**Guarantees**, for every bundle and message:
    - The bundle is hashed, and neither unpacked, installed, written to disk nor imported.
    - What answers is `client.app` of the installation that this program belongs to.
    - Only a reply that `client.app` made leaves; an error of Flower's own leaves without its text.
    - It does not start beside a Flower that it was not checked against, nor where a name that it
      replaces is missing or no longer called, nor from a directory of unpacked bundles.
"""

import argparse
import hashlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

from flwr.app import Array, ArrayRecord, Context, Error, Message
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supercore.utils import get_flwr_home
from flwr.supernode.runtime import run_clientapp as flower

import client
import core
from client.app import CLIENT_APP_ERROR, FAILED, respond
from core.errors import UserError
from core.parcel import close_parcel, open_parcel

FLOWER: Final = "1.41.0"
"""The version whose insides these lines were checked against."""


def main() -> None:
    """Run the task whose token stands on the first line of standard input."""
    _log_ours()
    arguments = _parser().parse_args()
    try:
        check_own_code()
        task = Task(arguments.site)
        replace_in(flower, flower.run_clientapp, task.replacements())
    except UserError as error:
        sys.exit(f"error: {error}")
    flower.run_clientapp(
        runtime_api_address=arguments.runtime_api_address,
        token=sys.stdin.readline().strip(),
        insecure=arguments.insecure,
        certificates=validate_and_resolve_root_certificates(
            arguments.root_certificates, arguments.insecure
        ),
        parent_pid=arguments.parent_pid,
        runtime_dependency_install=False,
    )


def replace_in(
    module: ModuleType, caller: Callable[..., Any], names: dict[str, Callable[..., Any]]
) -> None:
    """Give names in one of Flower's modules another meaning, if it still is what we know.

    Args:
        module: Where the names are.
        caller: The function of that module that calls them.
        names: Name -> what it shall mean.

    Raises:
        UserError: Flower is of another version, or a name is missing or not called any more.
    """
    version = importlib.metadata.version("flwr")
    if version != FLOWER:
        raise UserError(
            f"Flower {version} is installed, and this program guards against bundles in Flower "
            f"{FLOWER} alone; run: pip install flwr=={FLOWER}"
        )
    assert isinstance(caller, FunctionType)
    for name in names:
        if not callable(getattr(module, name, None)) or name not in caller.__code__.co_names:
            raise UserError(
                f"Flower {version} has no '{name}' in '{module.__name__}' that can be replaced, so "
                "a bundle that is sent could run; nothing is started. Install this program and "
                "Flower anew"
            )
    for name, meaning in names.items():
        setattr(module, name, meaning)


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
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--root-certificates")
    parser.add_argument("--parent-pid", type=int)
    return parser


if __name__ == "__main__":
    main()
