"""The engine of real processes: what a coordinator and its sites run, on free loopback ports.

OUT/coordinator is provisioned for this machine, the coordinator's service is started from it, every
site joins with its own key over TLS through the gateway, and the study runs on that.
"""

import json
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from core.checkpoint import write_atomically
from core.lock import held
from server.admit import admit
from server.control import control
from server.launch import follow
from server.provision import provision
from server.serve import environment, open_service
from server.supervisor import Part, Supervisor, stopped_by_sigterm

START_SECONDS = 120.0
LEAVE_SECONDS = 40.0
MARK = "\n# From here on: written anew by every simulation.\n"


def run_processes(run_dir: Path, site_files: Sequence[Path]) -> None:
    """Run a study, to its end, on a service and sites that live as long as it.

    A directory that an earlier simulation left, killed or not, is used again: keys and site state
    stay; ports and the SuperLink's database are new, for runs and nodes of earlier ones are gone.

    Raises:
        UserError: a process refused what it was given, or the study failed.
    """
    run_dir = run_dir.absolute()
    place, sites = run_dir / "coordinator", {file.parent.name: file for file in site_files}
    address = f"localhost:{free_port()}"
    known = (place / "provision.json").exists()
    for _ in provision(place, address=address, sites=list(sites), renew_server=known):
        pass  # what a coordinator would do next is done here
    for leftover in (*place.glob("superlink.db*"), run_dir / "run.json"):
        leftover.unlink(missing_ok=True)
    service = open_service(
        place, listen=address.replace("localhost", "127.0.0.1"), port=free_port()
    )
    with stopped_by_sigterm(), Supervisor() as supervisor:
        service.start(supervisor)
        with control(place, patience_seconds=START_SECONDS, tend=supervisor.check) as calls:
            for _ in admit(calls, place):
                pass
            for name, file in sites.items():
                _connect(file, address, place, name)
                _await_leave(file, supervisor.check)
                supervisor.start(_site(place, name, file))
            follow(calls, run_dir, len(sites), tend=supervisor.check)


def free_port() -> int:
    """A TCP port on the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _connect(file: Path, address: str, place: Path, name: str) -> None:
    """Write into a site's file where its coordinator is, and where its kit."""
    kit = place / "kits" / name
    values = {
        "superlink": address,
        "root_certificates": str(kit / "ca.crt"),
        "private_key": str(kit / "site.key"),
    }
    section = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    text = file.read_text(encoding="utf-8").partition(MARK)[0]
    write_atomically(file, f"{text}{MARK}[coordinator]\n{section}".encode())


def _await_leave(file: Path, tend: Callable[[], None]) -> None:
    """Let a site that a killed simulation left behind stop its processes; it holds its state."""
    with suppress(ValueError):  # `join` tells what is wrong with a site file
        state = tomllib.loads(file.read_text(encoding="utf-8")).get("state_dir", "state")
        deadline = time.monotonic() + LEAVE_SECONDS
        while held(file.parent / str(state) / "join.lock") and time.monotonic() < deadline:
            tend()
            time.sleep(0.3)


def _site(place: Path, name: str, file: Path) -> Part:
    """What a hospital runs."""
    command = [sys.executable, "-m", "client", "join", str(file), "--port", str(free_port())]
    home = environment(file.absolute().parent / "flower")
    log = place / "logs" / f"site-{name}.log"
    return Part(f"site {name}", command, home, log, last_word=signal.SIGTERM)
