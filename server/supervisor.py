"""Child processes that are kept alive: each started again when it ends, all stopped together."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError

LOG = logging.getLogger("fedmermed.server")
STOP_SECONDS = 10.0
STEADY_SECONDS = 20.0
"""A process that lived so long is started again at once; a run survives a minute without one."""
MAX_WAIT_SECONDS = 30.0
MAX_LOG_BYTES = 32 * 2**20
BAD_INPUT = 2
"""The status of our own commands when what they were given is wrong: again would not help."""

TETHER = """\
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))   # PR_SET_PDEATHSIG; it outlives exec
    if os.getppid() != int(sys.argv[1]):           # the parent died before that
        sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True)
class Part:
    """One program to keep running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    """What it prints goes here; also why it ended, if it knows."""
    serves: bool = False
    """Whether others need it to take their leave."""
    last_word: signal.Signals = signal.SIGKILL
    """What it gets when this process dies: SIGTERM, if it has processes of its own to stop."""


@dataclass
class _Child:
    part: Part
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    failures: int = 0
    """How often in a row it ended soon after its start."""
    again_at: float | None = None
    """When to start it again; None while it runs."""


class Supervisor:
    """Keeps parts running; leaving its context stops them.

    Guarantees:
        A part that ends is started again: at once if it was steady, else after a wait that grows
        to `MAX_WAIT_SECONDS`.
        A part that ends with status 2 has refused its input: `check` raises its last line.
        When this process dies, by SIGKILL too, its parts are sent their last word (Linux).
        No log grows beyond `MAX_LOG_BYTES` and its predecessor.
    """

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, part: Part) -> None:
        """Start a part and keep it running from now on."""
        self._children[part.name] = _Child(part, _spawn(part))

    def check(self) -> None:
        """Start again what has ended; to be called about twice a second.

        Raises:
            UserError: a part refused what it was given.
        """
        for name, child in self._children.items():
            _bound(child.part.log)
            if child.again_at is None and (status := child.process.poll()) is not None:
                if status == BAD_INPUT:
                    raise UserError(f"'{name}': {_last_line(child.part.log)}")
                steady = time.monotonic() - child.began > STEADY_SECONDS
                child.failures = 0 if steady else child.failures + 1
                wait = min(2.0 ** (child.failures - 1), MAX_WAIT_SECONDS) if child.failures else 0
                child.again_at = time.monotonic() + wait
                when = f"in {wait:g} s" if wait else "at once"
                LOG.warning(
                    "'%s' ended %s; started again %s; it writes to '%s'",
                    name, _how(status), when, child.part.log,
                )  # fmt: skip
            if child.again_at is not None and time.monotonic() >= child.again_at:
                child.process = _spawn(child.part)
                child.began, child.again_at = time.monotonic(), None

    def stop(self) -> None:
        """SIGTERM to each, SIGKILL to what is left after a while; those that serve go last."""
        children = [child for child in self._children.values() if child.again_at is None]
        family = _descendants({child.process.pid for child in children})
        for serves in (False, True):
            group = [child for child in children if child.part.serves is serves]
            for child in group:
                _signal_group(child.process, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            for child in group:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.1, deadline - time.monotonic()))
                _signal_group(child.process, signal.SIGKILL)
                child.process.wait()
        for pid in family:  # Flower's apps lead groups of their own and notice late
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._children.clear()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that children are stopped."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _spawn(part: Part) -> subprocess.Popen[bytes]:
    part.log.parent.mkdir(parents=True, exist_ok=True)
    tether = [sys.executable, "-IS", "-c", TETHER, str(os.getpid()), str(int(part.last_word))]
    with open(part.log, "ab") as log:
        return subprocess.Popen(
            [*tether, *part.command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=dict(part.environment), cwd=part.log.parent, start_new_session=True,
        )  # fmt: skip


def _bound(log: Path) -> None:
    """Begin a log anew; its process appends, and so goes on at the new end."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def _how(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with status {status}"


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"see '{log}'")


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
