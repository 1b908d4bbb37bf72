"""A file of JSON lines in which each line holds the digest of all lines before it.

audit.jsonl   {"previous": DIGEST, ...} a line; DIGEST is sha256(DIGEST before + line before), of
              zeros before the first
audit.head    how many lines there are, their digest, and while lines are being written the digests
              that they will give: a chain cannot tell by itself that its end was cut off, its last
              line changed or one added

A process may die at any instant: the file then ends where audit.head says it was, in the middle of
a line that audit.head announced, or after it. None of these is a fault. Half a line stays, and the
next to be written is preceded by one that records it. Where audit.head does not fit, which is a
fault, such a line keeps that for good.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from core.checkpoint import write_atomically
from core.errors import UserError
from core.strict import Strict

FILE = "audit.jsonl"
HEAD = "audit.head"
START = "0" * 64
CUT_SHORT = "a line was cut short by a kill, a crash or a full disk; this line records it"
NO_FIT = f"{HEAD} did not fit the lines"

Entry = dict[str, Any]


class Head(Strict):
    """So many lines, and their digest."""

    lines: Annotated[int, Field(ge=0)]
    sha256: str
    announced: tuple[str, ...] = ()
    """The digest after each line that is being written."""


@dataclass(frozen=True)
class Chain:
    """What reading a whole file found."""

    entries: tuple[Entry, ...]
    """What each line holds; empty for one that is no JSON object."""
    head: Head
    """Of all whole lines."""
    problem: str
    """The first fault, with the number of its line; empty when there is none."""
    first_chained: int
    """Number of the first line that holds a digest, 0 if none does."""
    head_fits: bool
    """Whether audit.head tells of these lines."""
    unrecorded: bool
    """Whether a line was cut short and none after it records that."""


def link(digest: str, line: bytes) -> str:
    """The digest of some lines and one more."""
    return hashlib.sha256(digest.encode() + line).hexdigest()


def append(directory: Path, fields: Entry) -> None:
    """Add a line and sync it to disk; several processes may."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(directory / FILE, "a+b", opener=_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a line and the head that tells of it belong together
        file.seek(0)
        data = file.read()
        chain = walk(data, _read_head(directory))
        entries = [fields]
        if not chain.head_fits:
            entries.insert(0, _note(fields, NO_FIT))
        if chain.unrecorded:
            entries.insert(0, _note(fields, CUT_SHORT))
        half = data.rpartition(b"\n")[2]
        new, digests = _chained(chain.head.sha256, half, entries)
        if chain.head_fits:  # else the old head is the evidence, until the note is on the disk
            head = chain.head.model_copy(update={"announced": tuple(digests)})
            _write_head(directory, head)
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
        head = Head(lines=chain.head.lines + len(digests), sha256=digests[-1])
        _write_head(directory, head)


def _chained(digest: str, half: bytes, entries: list[Entry]) -> tuple[bytes, list[str]]:
    """What to write after some lines and perhaps half a one, and the digest after each line."""
    new, digests = b"", [digest]
    if half:
        new, digests = b"\n", [digest, link(digest, half)]
    for entry in entries:
        line = json.dumps({"previous": digests[-1], **entry}).encode()
        new += line + b"\n"
        digests.append(link(digests[-1], line))
    return new, digests[1:]


def read(directory: Path) -> Chain:
    """Read the file and hold every line against the ones before it.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = directory / FILE
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return walk(file.read(), _read_head(directory))
    except FileNotFoundError:
        if (head := _read_head(directory)) is not None:
            return walk(b"", head)
        raise UserError(
            f"'{path}' does not exist: no message has reached this site yet, or the site file's "
            "'state_dir' is not the one that the SuperNode uses"
        ) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None


def walk(data: bytes, stored: Head | None) -> Chain:
    """Hold every line of a file against the ones before it, and all against audit.head."""
    *lines, half = data.split(b"\n")
    entries, digests = [], [START]
    problem, first_chained, unrecorded = "", 0, False
    for number, line in enumerate(lines, 1):
        entry = _parse(line)
        if "previous" in entry:
            first_chained = first_chained or number
            problem = problem or _problem(number, entry, digests[-1], unrecorded)
            unrecorded = False
        elif first_chained or not entry:
            unrecorded = True
        entries.append(entry)
        digests.append(link(digests[-1], line))
    if stored is None:
        misfit = f"{HEAD} is missing or damaged; it tells where lines end" if first_chained else ""
    else:
        misfit = _misfit(digests, bool(half), stored)
    return Chain(
        entries=tuple(entries),
        head=Head(lines=len(lines), sha256=digests[-1]),
        problem=problem or misfit,
        first_chained=first_chained,
        head_fits=not misfit,
        unrecorded=unrecorded or bool(half),
    )


def _problem(number: int, entry: Entry, digest: str, unrecorded: bool) -> str:
    """What is wrong with a line that holds a digest."""
    before = f"line {number - 1:,}" if number > 1 else "the start"
    if entry["previous"] != digest:
        return (
            f"line {number:,} does not follow from {before}: one of them was changed, inserted or "
            "moved, or a line between them was removed"
        )
    if unrecorded and entry.get("note") != CUT_SHORT:
        return f"{before} holds no digest, and line {number:,} records no reason"
    if entry.get("note") == NO_FIT:
        return f"when line {number:,} was written, {HEAD} did not fit the lines before"
    return ""


def _misfit(digests: list[str], half: bool, stored: Head) -> str:
    """What is wrong between the lines and audit.head."""
    count = len(digests) - 1
    if count < stored.lines:
        return (
            f"line {count + 1:,} is missing: {HEAD} tells of {stored.lines:,} lines and the file "
            f"has {count:,}"
        )
    if digests[stored.lines] != stored.sha256:
        return f"line {stored.lines:,}, or one before it, is not what {HEAD} tells of"
    added = digests[stored.lines + 1 :]
    if tuple(added) != stored.announced[: len(added)] or (half and not stored.announced):
        return f"after line {stored.lines:,} something was added of which {HEAD} does not tell"
    return ""


def _note(fields: Entry, text: str) -> Entry:
    """A line about the file itself."""
    return {"time": fields["time"], "message": "audit", "note": text, "decision": text}


def _parse(line: bytes) -> Entry:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _read_head(directory: Path) -> Head | None:
    """What audit.head tells; None if it is missing or damaged, which `walk` reports."""
    try:
        return Head.model_validate_json((directory / HEAD).read_bytes())
    except (OSError, ValidationError):
        return None


def _write_head(directory: Path, head: Head) -> None:
    write_atomically(directory / HEAD, head.model_dump_json().encode() + b"\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
