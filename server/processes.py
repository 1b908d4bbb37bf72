"""The engine of real processes: a SuperLink and a SuperNode a site, on free loopback ports.

The same programs that hospitals run, without TLS, which a loopback does not need. Each is started
in a session of its own, so that what it starts in turn can be stopped with it.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from core.checkpoint import read_json, write_atomically
from core.errors import UserError
from server.history import describe_round, read_history, read_recipe

LOG = logging.getLogger("fedmermed.server")
START_SECONDS = 120.0
STOP_SECONDS = 5.0
CONNECTION = "simulation"

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
"""


def run_processes(run_dir: Path, site_files: Sequence[Path]) -> None:
    """Run a study on a SuperLink and one SuperNode a site, then stop them all.

    Raises:
        UserError: a process did not start or ended early; the message names its log.
    """
    run_dir = run_dir.absolute()
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = _environment(run_dir, port)
    with _stopped_by_sigterm(), _Processes(logs, environment) as processes:
        processes.start(
            "superlink",
            "flower-superlink --insecure --disable-runtime-dependency-installation "
            f"--host 127.0.0.1 --port {port}".split(),
        )
        processes.wait_until(lambda: _healthy(port), "the SuperLink to answer")
        for file in site_files:
            processes.start(
                f"site-{file.parent.name}",
                [
                    *f"flower-supernode --insecure --superlink 127.0.0.1:{port}".split(),
                    *f"--host 127.0.0.1 --port {free_port()} --node-config".split(),
                    f"site={json.dumps(str(file.absolute()))}",
                ],
            )
        settings = {
            "recipe": str(run_dir / "recipe.json"),
            "run-dir": str(run_dir),
            "sites": len(site_files),
        }
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        # --stream ends with the run, and ends with 0 after a crash too: the history tells.
        processes.start(
            "run",
            ["flwr", "run", str(run_dir / "app"), CONNECTION, "--stream", "--run-config", config],
        )
        processes.follow(run_dir, "run")
    if (failure := run_dir / "failure.json").exists():
        raise UserError(read_json(failure)["reason"])
    if len(read_history(run_dir)) < _rounds(run_dir):
        raise UserError(f"the run ended early; see 'superlink.log' and 'run.log' in '{logs}'")


def free_port() -> int:
    """A TCP port on the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Processes:
    """Child processes with their logs; leaving the context stops each with all its children."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = environment
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        family = _descendants({process.pid for process in self._started.values()})
        # The SuperLink goes last: a SuperNode without one retries instead of stopping.
        for name in sorted(self._started, key=lambda name: name == "superlink"):
            process = self._started[name]
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._started.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)
            process.wait()
        for pid in family:  # Flower's apps lead groups of their own and notice late
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self, name: str, command: list[str]) -> None:
        """Start one of Flower's programs; what it prints goes to logs/NAME.log."""
        program = Path(sys.executable).parent / command[0]
        if not program.exists():
            raise UserError(f"'{program}' does not exist; install flwr beside this Python")
        with open(self._logs / f"{name}.log", "wb") as log:
            self._started[name] = subprocess.Popen(
                [str(program), *command[1:]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=dict(self._environment), cwd=self._logs, start_new_session=True,
            )  # fmt: skip

    def check(self, *, but: str = "") -> None:
        """Raise when a process has ended, except the one named."""
        for name, process in self._started.items():
            if name != but and process.poll() is not None:
                raise UserError(
                    f"'{name}' ended with status {process.returncode}; see "
                    f"'{self._logs / name}.log'"
                )

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for a condition while all processes live."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise UserError(
                    f"waited {START_SECONDS:g} s for {what} in vain; see the logs in '{self._logs}'"
                )
            time.sleep(0.3)

    def follow(self, run_dir: Path, name: str) -> None:
        """Report rounds as they are done, until the process of this name ends."""
        told, rounds = len(read_history(run_dir)), _rounds(run_dir)
        while self._started[name].poll() is None:
            time.sleep(0.5)
            self.check(but=name)
            for line in read_history(run_dir)[told:]:
                told = line["round"]
                LOG.info("%s", describe_round(line, rounds), extra={"line": line})


def _descendants(parents: set[int]) -> set[int]:
    """Processes that these started, directly or not (from /proc; none where there is no /proc)."""
    found: set[int] = set()
    while parents:
        children = set()
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it may end while we look
                # pid (name) state parent ...; the name may hold anything
                if int(file.read_text().rpartition(")")[2].split()[1]) in parents:
                    children.add(int(file.parent.name))
        parents = children - found
        found |= children
    return found


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of the group have ended
        os.killpg(process.pid, number)  # the process leads a group of its own


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that children are stopped."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(run_dir: Path, port: int) -> dict[str, str]:
    """Flower's files under the run directory, no call home, and our packages found anywhere."""
    home, app = run_dir / "flower", run_dir / "app"
    write_atomically(app / "pyproject.toml", APP.encode())
    connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    connection += f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    write_atomically(home / "config.toml", connection.encode())
    packages = str(Path(__file__).resolve().parent.parent)
    search = [packages, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(path for path in search if path),
    }


def _rounds(run_dir: Path) -> int:
    return read_recipe(run_dir / "recipe.json").federation.rounds


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
