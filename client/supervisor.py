"""Keep programs running: start each, start it again when it ends, and stop all in order."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Final

LOG = logging.getLogger("fedmermed.join")
PAUSES: Final = (1, 2, 4, 8, 15)
"""Seconds to wait before a program is started again; the last one from then on."""
STEADY_SECONDS: Final = 60.0
"""A program that ran so long begins again with the first pause."""
STOP_SECONDS: Final = 8.0
"""Time to end after SIGTERM: Flower gives itself five seconds, but not always keeps to them."""
COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Program:
    """What to keep running."""

    name: str
    words: Sequence[str]
    meanings: Mapping[str, str] = field(default_factory=dict)
    """What it may print -> what that means to a person; told once until something else is."""


def supervise(programs: Sequence[Program], environment: Mapping[str, str]) -> None:
    """Run programs until SIGTERM or SIGINT comes; then stop them in the order given."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    children = [_Child(program, environment) for program in programs]
    while not stopping.is_set():
        for child in children:
            child.tend()
        stopping.wait(0.3)
    LOG.info("stopping")
    for child in children:
        child.stop()
    LOG.info("stopped")


class _Child:
    """One program and the process that runs it now."""

    def __init__(self, program: Program, environment: Mapping[str, str]) -> None:
        self._program = program
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._next = time.monotonic()
        self._failures = 0
        self._told = ""

    def tend(self) -> None:
        """Start the program if it is time to; notice that it has ended."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._next:
                self._start(now)
        elif (status := self._process.poll()) is not None:
            self._failures = 0 if now - self._started > STEADY_SECONDS else self._failures + 1
            pause = PAUSES[min(self._failures, len(PAUSES)) - 1] if self._failures else PAUSES[0]
            self._next = now + pause
            self._signal(signal.SIGKILL)  # what it started and did not end
            self._process = None
            how = f"status {status}" if status >= 0 else signal.Signals(-status).name
            LOG.info("%s ended (%s); it starts again in %d s", self._program.name, how, pause)

    def stop(self) -> None:
        """End the program and all that it started."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _start(self, now: float) -> None:
        self._process = subprocess.Popen(
            self._program.words,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(self._environment), start_new_session=True,
        )  # fmt: skip
        self._started = now
        LOG.info("%s started (process %d)", self._program.name, self._process.pid)
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, output: IO[bytes]) -> None:
        """Pass on what the program prints, and say in plain words what matters of it."""
        for coloured in output:
            line = COLOUR.sub(b"", coloured)
            if line.strip() in (b"", b"INFO :"):  # Flower's way to leave a line free
                continue
            with suppress(OSError, ValueError):  # nobody reads us any more; the program goes on
                sys.stdout.buffer.write(f"{self._program.name}: ".encode() + line)
                sys.stdout.buffer.flush()
            text = line.decode(errors="replace")
            for sign, meaning in self._program.meanings.items():
                if sign in text and meaning != self._told:
                    self._told = meaning
                    LOG.info("%s", meaning)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # it leads a group of its own
