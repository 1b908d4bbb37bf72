"""The two parts of a site that has joined: one speaks to the coordinator, the other trains.

    coordinator <--TLS-- SuperNode <--secret-- trainer --> one process a message

The SuperNode needs no image; the trainer needs no network but the SuperNode. They meet at the
SuperNode's runtime API, plain HTTP on the loopback or on a network that they share alone; who takes
a task from it must know the secret in a file that both read.
"""

import ctypes
import json
import logging
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from site import getsitepackages, getusersitepackages
from typing import Final, NoReturn

from client.site import SiteConfig
from core.checkpoint import write_atomically
from core.errors import UserError

LOG = logging.getLogger("fedmermed.join")
QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
POLL: Final = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
POLL_SECONDS: Final = "0.25"
"""How often the trainer looks for a task; Flower's own is a second."""
PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that this process gets when the one that started it dies."""


@dataclass(frozen=True)
class Meeting:
    """Where the two parts meet."""

    host: str
    """Address on which the SuperNode's runtime API listens."""
    port: int
    runtime: str
    """host:port at which the trainer finds it."""
    secret: Path
    """A file of mode 0600: made by the SuperNode's part if missing, awaited by the trainer's."""


def supernode_words(coordinator: Mapping[str, str], site_file: Path, meet: Meeting) -> list[str]:
    """The SuperNode's command line.

    Args:
        coordinator: superlink, root_certificates and private_key, all checked.
        site_file: The site's file.
        meet: Where the trainer finds it.
    """
    config = json.dumps(str(site_file.absolute()), ensure_ascii=False)
    return [
        *(sys.executable, "-P", "-m", "client.supernode"),
        *("--superlink", coordinator["superlink"]),
        *("--root-certificates", coordinator["root_certificates"]),
        *("--auth-supernode-private-key", coordinator["private_key"]),
        *("--isolation", "process", "--superexec-auth-secret-file", str(meet.secret)),
        *("--host", meet.host, "--port", str(meet.port), "--node-config", f"site={config}"),
    ]


def trainer_words(site_file: Path, meet: Meeting) -> list[str]:
    """The trainer's command line."""
    return [
        *(sys.executable, "-P", "-m", "client.trainer", str(site_file.absolute())),
        *("--insecure", "--runtime-api-address", meet.runtime),
        *("--superexec-auth-secret-file", str(meet.secret)),
    ]


def become(words: list[str], environment: Mapping[str, str], parent: int = 0) -> NoReturn:
    """Turn this process into a program.

    Args:
        words: Its command line.
        environment: Its environment.
        parent: The process without which it shall not go on; 0: none.
    """
    if parent:
        end_with(parent)
    os.execve(words[0], words, dict(environment))


def end_with(parent: int) -> None:
    """Get SIGTERM when the parent dies, by whatever signal (Linux), also after an exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before
        sys.exit(1)


def make_secret(file: Path) -> None:
    """Make the secret if it is missing.

    Raises:
        UserError: it cannot be made, or others may read it.
    """
    try:
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(file, secrets.token_hex(32).encode(), mode=0o600)
    except OSError as error:
        raise UserError(
            f"secret '{file}' cannot be made: {error.strerror}; name another place by --secret"
        ) from None
    check_secret(file)


def await_secret(file: Path, seconds: float = 0.5) -> None:
    """Wait until the SuperNode's part has made the secret.

    Raises:
        UserError: others may read it, or we may not.
    """
    if not file.exists():
        LOG.info("waiting for the SuperNode's part to make '%s'", file)
    while not file.exists():
        time.sleep(seconds)
    check_secret(file)


def check_secret(file: Path) -> None:
    """Hold that the secret is ours alone.

    Raises:
        UserError: it is not.
    """
    try:
        mode = file.stat().st_mode & 0o777
        file.read_bytes()
    except OSError as error:
        raise UserError(
            f"secret '{file}' cannot be read: {error.strerror}; both parts must run as one user"
        ) from None
    if mode & 0o077:
        raise UserError(
            f"secret '{file}' is open to others on this machine (mode {mode:o}); run: "
            f"chmod 600 {shlex.quote(str(file))}"
        )


def make_state_directory(site: SiteConfig) -> None:
    """Make the directory of the site's state, for its owner alone.

    Raises:
        UserError: it cannot be made.
    """
    try:
        site.state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"state_dir '{site.state_path}' cannot be made: {error.strerror}; correct state_dir in "
            "the site file, or who may write there"
        ) from None


def supernode_environment(site: SiteConfig, outer: Mapping[str, str]) -> dict[str, str]:
    """No call home, our Python's programs first, and Flower's files beside the site's state."""
    if "FLWR_HOME" not in outer:
        make_state_directory(site)
    path = [str(Path(sys.executable).parent), outer.get("PATH", os.defpath)]
    return {
        "FLWR_HOME": str(site.state_path / "flower"),
        **outer,
        **QUIET,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": python_path(outer),
    }


def trainer_environment(site: SiteConfig, outer: Mapping[str, str]) -> dict[str, str]:
    """As the SuperNode's, less what would lead elsewhere: it speaks to the SuperNode alone."""
    environment = {POLL: POLL_SECONDS, **supernode_environment(site, outer)}
    return {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}


def python_path(outer: Mapping[str, str]) -> str:
    """PYTHONPATH by which a child finds our packages: where they are, and never a current folder.

    Args:
        outer: The environment; of its PYTHONPATH absolute directories stay.
    """
    given = outer.get("PYTHONPATH", "").split(os.pathsep)
    root = str(Path(__file__).resolve().parents[1])
    installed = [*getsitepackages(), getusersitepackages()]
    first = [] if root in installed else [root]
    return os.pathsep.join(
        dict.fromkeys([*first, *(path for path in given if os.path.isabs(path))])
    )
