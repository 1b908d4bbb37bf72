"""The coordinator's service: SuperLink, the starter of ServerApps, and the gateway before them.

DIR/superlink.db       nodes, runs and messages; a run survives the SuperLink's death by it
DIR/superexec.secret   by which the SuperLink knows the starter of ServerApps; mode 0600
DIR/logs/              what each part prints
"""

import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from core.address import split_address
from core.checkpoint import read_json, write_atomically
from core.errors import UserError
from server.connection import write_connection
from server.supervisor import Part, Supervisor, stopped_by_sigterm

LOG = logging.getLogger("fedmermed.server")


class PartName(StrEnum):
    """What `serve` runs."""

    SUPERLINK = "superlink"
    APPS = "apps"
    GATEWAY = "gateway"


NEEDED: Mapping[PartName, tuple[str, ...]] = {
    PartName.SUPERLINK: ("ca.crt", "server.crt", "server.key"),
    PartName.APPS: ("ca.crt",),
    PartName.GATEWAY: ("ca.crt", "server.crt", "server.key"),
}
"""Files of the coordinator's directory that a part must find there."""


@dataclass(frozen=True)
class Service:
    """A coordinator's directory, and who listens where."""

    directory: Path
    secret: Path
    """A file that the SuperLink and the starter of ServerApps share."""
    listen: str
    """The gateway's public address, host:port."""
    host: str = "127.0.0.1"
    """Where the SuperLink listens. Its control service has no login: the loopback, or a network
    that holds nothing but the coordinator's own parts."""
    port: int = 8000
    superlink: str = "127.0.0.1:8000"
    """Where the other parts find it."""

    def superlink_part(self) -> Part:
        """Flower's SuperLink: TLS, keys asked of sites, no process of its own, no installations."""
        command = [
            *_module("server.superlink"),
            *("--host", self.host, "--port", str(self.port), "--isolation", "process"),
            *(
                "--ssl-ca-certfile",
                self._file("ca.crt"),
                "--ssl-certfile",
                self._file("server.crt"),
            ),
            *("--ssl-keyfile", self._file("server.key"), "--enable-supernode-auth"),
            *("--superexec-auth-secret-file", str(self.secret)),
            *(
                "--database",
                self._file("superlink.db"),
                "--disable-runtime-dependency-installation",
            ),
        ]
        return self._part(PartName.SUPERLINK, command, serves=True)

    def apps_part(self) -> Part:
        """Flower's SuperExec, which starts a ServerApp a run."""
        command = [
            *_module("server.superexec"),
            *("--runtime-api-address", self.superlink),
            *("--root-certificates", self._file("ca.crt")),
            *("--superexec-auth-secret-file", str(self.secret)),
        ]
        return self._part(PartName.APPS, command)

    def gateway_part(self) -> Part:
        """The public door to the SuperLink."""
        command = [
            *_module("server.gateway_server"),
            *(self.listen, self.superlink, str(self.directory)),
        ]
        return self._part(PartName.GATEWAY, command, serves=True)

    def start(self, supervisor: Supervisor) -> None:
        """Start all parts; they find each other."""
        write_connection(self.directory, f"127.0.0.1:{self.port}")
        for part in (self.superlink_part(), self.gateway_part(), self.apps_part()):
            supervisor.start(part)

    def _part(self, name: PartName, command: list[str], *, serves: bool = False) -> Part:
        log = self.directory / "logs" / f"{name}.log"
        return Part(str(name), command, environment(self.directory / "flower"), log, serves)

    def _file(self, name: str) -> str:
        return str(self.directory / name)


def open_service(
    directory: Path,
    parts: Sequence[PartName] = tuple(PartName),
    *,
    listen: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    superlink: str | None = None,
    secret: Path | None = None,
) -> Service:
    """Check a coordinator's directory and make the secret of its parts.

    Args:
        directory: What `provision` made.
        parts: Those that will run; what the others need may be absent.
        listen: The gateway's address; none: every interface, on the port sites were given.
        host: Where the SuperLink listens.
        port: The SuperLink's port.
        superlink: Where the other parts find the SuperLink; none: the loopback.
        secret: The file of the parts' secret; none: superexec.secret in the directory.

    Raises:
        UserError: it is not provisioned.
    """
    directory = directory.absolute()
    secret = (secret or directory / "superexec.secret").absolute()
    needed = [name for part in parts for name in NEEDED[part]]
    if missing := [name for name in needed if not (directory / name).exists()]:
        raise UserError(
            f"'{directory}' has no {missing[0]}; run 'fedmermed-server provision' first, which "
            "makes it"
        )
    if PartName.GATEWAY in parts and listen is None:
        address = str(read_json(directory / "provision.json")["address"])
        listen = f"0.0.0.0:{split_address(address)[1]}"
    if set(parts) != {PartName.GATEWAY}:
        _make_secret(secret)
    return Service(directory, secret, listen or "", host, port, superlink or f"127.0.0.1:{port}")


def serve(service: Service) -> None:
    """Run all parts until SIGTERM or Ctrl-C.

    Raises:
        UserError: a part refused what it was given.
    """
    with stopped_by_sigterm(), Supervisor() as supervisor:
        service.start(supervisor)
        logs = service.directory / "logs"
        LOG.info("sites are served at %s; logs are in '%s'", service.listen, logs)
        with suppress(KeyboardInterrupt, SystemExit):  # asked to: no failure
            while True:
                supervisor.check()
                time.sleep(0.5)


def run_part(service: Service, name: PartName) -> NoReturn:
    """Become one part, as a container's only program.

    This process ends when it ends.
    """
    if name is PartName.SUPERLINK:
        write_connection(service.directory, f"127.0.0.1:{service.port}")
    part = {
        PartName.SUPERLINK: service.superlink_part,
        PartName.APPS: service.apps_part,
        PartName.GATEWAY: service.gateway_part,
    }[name]()
    os.execve(part.command[0], list(part.command), dict(part.environment))


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs run with: no call home, our Python's programs and packages first.

    Args:
        home: Where Flower keeps its files, if FLWR_HOME does not tell.
    """
    outer: Mapping[str, str] = os.environ
    packages = str(Path(__file__).resolve().parent.parent)
    direct = "localhost,127.0.0.1"  # no proxy lies between the parts
    return {
        **outer,
        "FLWR_HOME": outer.get("FLWR_HOME", str(home)),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), outer.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [packages, outer.get("PYTHONPATH")])),
        "NO_PROXY": ",".join(filter(None, [outer.get("NO_PROXY"), direct])),
        "no_proxy": ",".join(filter(None, [outer.get("no_proxy"), direct])),
    }


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _make_secret(file: Path) -> None:
    """Once, whoever comes first: two parts that start together must hold the same."""
    if not file.exists():
        aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        write_atomically(aside, secrets.token_hex(32).encode(), mode=0o600)
        with suppress(FileExistsError):
            os.link(aside, file)
        aside.unlink()
