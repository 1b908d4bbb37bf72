"""Keep programs running: start each, start it again when it ends, and stop all in order.

A program of its own, of one thread, that imports the standard library alone: Linux tells a child of
its parent's death once for each thread that the parent had (numpy starts some), and of two SIGTERMs
the second kills a SuperNode that is signing off.

    python -P -m client.supervisor JSON    a list of objects with the fields of Program
"""

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
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
LOOK_SECONDS: Final = 0.3
"""How often to see whether a program has ended."""
COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Program:
    """What to keep running."""

    name: str
    words: Sequence[str]
    meanings: Mapping[str, str] = field(default_factory=dict)
    """What it may print -> what that means to a person; told once until something else is."""


def main() -> None:
    """Run the programs that the command line describes."""
    logging.basicConfig(format="%(asctime)s join: %(message)s", level=logging.INFO)
    supervise([Program(**program) for program in json.loads(sys.argv[1])], os.environ)


def supervise(programs: Sequence[Program], environment: Mapping[str, str]) -> None:
    """Run programs until SIGTERM or SIGINT comes; then stop them in the order given."""
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    with selectors.DefaultSelector() as outputs:
        children = [_Child(program, environment, outputs) for program in programs]
        while not stopping:
            for child in children:
                child.tend()
            _read(outputs)
        LOG.info("stopping")
        for child in children:
            child.stop()
        LOG.info("stopped")


def _read(outputs: selectors.BaseSelector) -> None:
    """Wait a moment for something that a program prints, and pass it on."""
    for key, _ in outputs.select(LOOK_SECONDS):
        key.data(key.fileobj)


class _Child:
    """One program and the process that runs it now."""

    def __init__(
        self,
        program: Program,
        environment: Mapping[str, str],
        outputs: selectors.BaseSelector,
    ) -> None:
        self._program = program
        self._environment = environment
        self._outputs = outputs
        self._half = b""
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
        deadline = time.monotonic() + STOP_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            _read(self._outputs)
        self._signal(signal.SIGKILL)
        self._process.wait()
        _read(self._outputs)  # its last words

    def _start(self, now: float) -> None:
        self._process = subprocess.Popen(
            self._program.words,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(self._environment), start_new_session=True,
        )  # fmt: skip
        self._started = now
        LOG.info("%s started (process %d)", self._program.name, self._process.pid)
        assert self._process.stdout is not None
        self._outputs.register(self._process.stdout, selectors.EVENT_READ, self._pass_on)

    def _pass_on(self, output: IO[bytes]) -> None:
        """Print what the program prints, and say in plain words what matters of it."""
        data = os.read(output.fileno(), 65_536)
        if not data:
            self._outputs.unregister(output)
            output.close()
        *lines, self._half = (self._half + data).split(b"\n")
        for coloured in lines:
            line = COLOUR.sub(b"", coloured)
            if line.strip() in (b"", b"INFO :"):  # Flower's way to leave a line free
                continue
            with suppress(OSError, ValueError):  # nobody reads us any more; the program goes on
                sys.stdout.buffer.write(f"{self._program.name}: ".encode() + line + b"\n")
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


if __name__ == "__main__":
    main()
