"""A worker process: it reads one file at a time, under limits, and says what became of it.

It runs decoders on files that nobody has checked, so it is confined: little memory, a clock that
kills it, no file that it may write, nothing of its output kept. `pool` feeds and replaces it.
"""

import contextlib
import logging
import math
import os
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from client.ingest.duplicates import fingerprint
from client.ingest.patients import patient_key
from client.ingest.types import Item, Outcome, Reading, Reason, Rejected, Rules

ORPHAN_SECONDS: Final = 10
"""A worker whose parent is gone ends itself this long after the file's time is over."""


@dataclass(frozen=True)
class Setup:
    """What every worker of a run is given."""

    rules: Rules
    secret: bytes
    memory_bytes: int
    """of address space that a worker may have, libraries included"""
    timeout_s: float
    """for one file"""
    read: Callable[[Item, Rules], Reading]
    """gives the pictures of a file or raises Rejected"""


def serve(connection: Connection, setup: Setup) -> None:
    """Say that the worker is ready, then answer each item with its outcome until the pipe closes.

    **Guarantees**: nothing that a file makes a decoder print, log or write leaves the process, nor
    does its memory image; what leaves is the outcome alone.
    """
    _confine(setup.memory_bytes)
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(None)
        while True:
            item = connection.recv()
            # The parent keeps the time; this alarm is for a worker that has no parent any more.
            # It is the system's, as native code does not return to Python's handlers.
            signal.alarm(math.ceil(setup.timeout_s) + ORPHAN_SECONDS)
            outcome = read_item(item, setup)
            signal.alarm(0)
            connection.send(outcome)


def read_item(item: Item, setup: Setup) -> Outcome:
    """Read one file; whatever its reader raises becomes a reason of the closed list."""
    try:
        reading = setup.read(item, setup.rules)
        return Outcome(
            pictures=reading.pictures,
            fingerprints=tuple(fingerprint(picture.pixels) for picture in reading.pictures),
            patient=patient_key(setup.secret, reading.identity),
            kind=reading.kind,
            vendor=reading.vendor,
            text=reading.text,
        )
    except Rejected as rejected:
        return Outcome(reason=rejected.reason)
    except MemoryError:
        return Outcome(reason=Reason.TOO_MUCH_MEMORY)
    except BaseException as error:  # a decoder's Rust panic is no Exception
        return Outcome(reason=Reason.READER_FAILED, note=type(error).__name__)


def _confine(memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Decoders and pydicom quote values of the file in what they print, warn and log.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # Where the machine runs out of memory all the same, Linux shall end a worker, not its parent.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
