"""The SuperLink's control service, as Flower's own commands call it, without their start-up time.

It has no login, so it is reached on the coordinator's machine alone. Its address is the one that
Flower's commands read: DIR/flower/config.toml, which the SuperLink's part of `serve` writes.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from core.checkpoint import write_atomically
from core.errors import UserError
from server.connection import read_connection

APP = """\
[project]
name = "fedmermed"
version = "0.1.0"

[tool.flwr.app]
publisher = "fedmermed"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
recipe = ""
run-dir = ""
sites = 0
registered = ""
"""
"""All of the app that a run submits: where the installed packages have the real ones."""
FINISHED = "finished"


@dataclass(frozen=True)
class Node:
    """A key that the SuperLink knows."""

    node_id: int
    public_key: bytes
    """As Flower stores it: PEM."""
    admitted: bool
    """False once it was unregistered, for good."""


class Control:
    """Calls of the control service; each raises `UserError` when the SuperLink is away."""

    def __init__(self, client: ControlHttpClient, address: str, directory: Path) -> None:
        self.directory = directory
        self._client = client
        self._address = address

    def nodes(self) -> list[Node]:
        """Every key that was ever registered."""
        with self._explained():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(n.node_id, n.public_key, n.status != "unregistered") for n in found]

    def register(self, public_key: bytes, name: str) -> int:
        """Admit a key; returns the node's id."""
        with self._explained():
            request = RegisterNodeRequest(public_key=public_key, name=name)
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        """Refuse a node's key from now on, and for good."""
        with self._explained():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self, config: Mapping[str, str | int]) -> int:
        """Submit our app; returns the run's id."""
        content, digest = app_bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(digest, content, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        with self._explained():
            return int(self._client.StartRun(request).run_id)

    def run_ended(self, run_id: int) -> str:
        """How a run ended, in a word; empty while it waits or runs."""
        with self._explained():
            try:
                runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.NOT_FOUND:
                    return "unknown"  # the database is another
                raise
        status = runs[run_id].status
        return status.sub_status if status.status == FINISHED else ""

    def stop_run(self, run_id: int) -> None:
        """End a run and drop its messages, if it has not ended."""
        with suppress(UserError), self._explained():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = " ".join(error.response.text.split())[:300]
            raise UserError(
                f"the SuperLink at {self._address} refused: HTTP {error.response.status_code} "
                f"{said}"
            ) from None
        except httpx.TransportError as error:
            raise UserError(
                f"the SuperLink at {self._address} does not answer ({error}); start it with "
                "'fedmermed-server serve', or wait until it is back"
            ) from None


@contextmanager
def control(
    directory: Path, *, patience_seconds: float = 60.0, tend: Callable[[], None] = lambda: None
) -> Iterator[Control]:
    """Reach the control service of a coordinator's directory, which may be starting up.

    Args:
        directory: What `provision` made and `serve` runs from.
        patience_seconds: How long it may be away.
        tend: Called while it is.

    Raises:
        UserError: it does not answer in time.
    """
    for name in ("NO_PROXY", "no_proxy"):  # the calls stay on this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1"]))
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            with _opened(directory) as found:
                found.nodes()
            break
        except UserError:
            if time.monotonic() > deadline or not (directory / "ca.crt").exists():
                raise
            tend()
            time.sleep(0.3)
    with _opened(directory) as found:
        yield found


@contextmanager
def _opened(directory: Path) -> Iterator[Control]:
    address = read_connection(directory)  # which a service that starts may write anew
    with ControlHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=_authority(directory),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    ) as client:
        yield Control(client, address, directory.absolute())


def _authority(directory: Path) -> bytes:
    try:
        return (directory / "ca.crt").read_bytes()
    except OSError as error:
        raise UserError(f"'{directory / 'ca.crt'}' cannot be read: {error.strerror}") from None


@cache
def app_bundle() -> tuple[bytes, str]:
    """The app as Flower packs it, and its sha256, which is the same on every machine."""
    from flwr.cli.build import build_fab_from_disk  # Flower's command line: half a second

    with tempfile.TemporaryDirectory(prefix="fedmermed-") as place:
        app = Path(place) / "fedmermed"
        write_atomically(app / "pyproject.toml", APP.encode())
        content = build_fab_from_disk(app)
    return content, sha256(content).hexdigest()
