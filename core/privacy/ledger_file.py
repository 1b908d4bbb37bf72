"""A file of JSON lines that only grows and never forgets a line that was settled.

x.jsonl  a JSON object a line, its last key the sha256 of the line's other text and of all before it
x.head   how many lines are settled, and the last one's sha256: lines cannot tell that some are gone

A line is settled when the head tells of it, and `append` returns only then. A kill or a power cut
leaves at most one line that is not. If that one is whole it counts, as it may be all that is left
of what somebody wrote down; if it is not, its `append` never returned, and the next writes over it.
Anything else that does not fit is damage, and nothing is read or written until a person has looked.

This shows accidents. Whoever may write both files can forge them, or put old ones back.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Final, NoReturn

from pydantic import Field, ValidationError

from core.checkpoint import write_atomically
from core.errors import UserError
from core.strict import Strict

START: Final = "0" * 64


class Head(Strict):
    """So many settled lines, and the digest of the last."""

    lines: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass
class OpenFile:
    """The file while this process alone may change it."""

    file: IO[bytes]
    head_path: Path
    lines: list[bytes]
    """All that count, with their line ends."""

    @property
    def entries(self) -> list[bytes]:
        """Each line as it was given to `append`."""
        return [_entry(line) for line in self.lines]

    def append(self, entry: bytes) -> None:
        """Add a line, a JSON object; once this returns it is on the disk, and the head tells of it.

        Raises:
            OSError: it could not be written.
        """
        self.lines.append(_line(_last_digest(self.lines), entry))
        self.settle()

    def settle(self) -> None:
        """Write the last line, again if it is there, cut off what follows, and tell of it.

        Again, because what a killed process wrote may be in memory alone, or may have failed on its
        way to the disk without a trace.
        """
        *before, last = self.lines
        start = sum(map(len, before))
        self.file.truncate(start + len(last))
        self.file.seek(start)
        self.file.write(last)
        self.file.flush()
        os.fsync(self.file.fileno())
        head = Head(lines=len(self.lines), sha256=_last_digest(self.lines))
        write_atomically(self.head_path, head.model_dump_json().encode() + b"\n", mode=0o600)


@dataclass(frozen=True)
class LedgerFile:
    """The two files, x.jsonl at `path`."""

    path: Path

    def read(self) -> list[bytes]:
        """Each line as it was given to `append`; none if there is no file.

        Raises:
            UserError: the file is damaged or cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # a line and the head that tells of it go together
                return [_entry(line) for line in self._checked(file, self._head())]
        except FileNotFoundError:
            if self._head() is not None:
                self._damaged("is missing")
            return []
        except OSError as error:
            raise UserError(f"ledger '{self.path}' cannot be read: {error.strerror}") from None

    @contextmanager
    def opened(self) -> Iterator[OpenFile]:
        """Hold the file against other processes, every line of it settled.

        Raises:
            UserError: the file is damaged, or cannot be read or written.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.path, "r+b", opener=_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                head = self._head()
                opened = OpenFile(file, self._head_path, self._checked(file, head))
                if len(opened.lines) > (head.lines if head else 0):
                    opened.settle()
                yield opened
        except OSError as error:
            raise UserError(
                f"ledger '{self.path}' cannot be written: {error.strerror}; nothing leaves before "
                "it can: make room on its disk, or make it writable"
            ) from None

    def _checked(self, file: IO[bytes], head: Head | None) -> list[bytes]:
        """The lines that count, held against each other and against the head."""
        *whole, _ = file.read().split(b"\n")
        lines = [line + b"\n" for line in whole]
        settled = head.lines if head else 0
        if len(lines) < settled:
            self._damaged(f"ends before line {len(lines) + 1:,} of {settled:,}")
        digest, good = START, 0
        for line in lines:
            if line != _line(digest, _entry(line)):
                break
            digest, good = _digest(line), good + 1
        if good < settled:
            self._damaged(
                f"line {good + 1:,} was changed, or is not the one that was written there"
            )
        if len(lines) > settled + 1:
            self._damaged(
                f"has {len(lines):,} lines, and {self._head_path.name} tells of {settled:,}"
            )
        if head and _digest(lines[settled - 1]) != head.sha256:
            self._damaged(f"line {settled:,} is not the one that {self._head_path.name} tells of")
        return lines[:good]

    def _head(self) -> Head | None:
        try:
            return Head.model_validate_json(self._head_path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            self._damaged(f"has a damaged {self._head_path.name} beside it")

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(
            f"ledger '{self.path}' {what}; what was spent is not known, so nothing leaves. Put "
            f"back it and {self._head_path.name} from the last backup, and ask your privacy office "
            "about the rounds that the audit file shows since then"
        )

    @property
    def _head_path(self) -> Path:
        return self.path.with_suffix(".head")


def _line(digest: str, entry: bytes) -> bytes:
    """A line: the entry, a JSON object, with one more key."""
    own = hashlib.sha256(digest.encode() + entry).hexdigest()
    return entry[:-1] + b', "sha256": "' + own.encode() + b'"}\n'


_TAIL: Final = len(_line(START, b"{}")) - 1
"""Bytes of a line after its entry's last but one."""


def _entry(line: bytes) -> bytes:
    return line[:-_TAIL] + b"}"


def _digest(line: bytes) -> str:
    return line[-67:-3].decode()


def _last_digest(lines: list[bytes]) -> str:
    return _digest(lines[-1]) if lines else START


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)
