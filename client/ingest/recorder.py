"""Record outcomes in the journal and keep their pictures: in order, once, whatever kills the run.

Pictures are written one after the other to pictures.raw, behind room for the header of images.npy.
They are on the disk before the transaction that counts them; what a kill leaves behind the last
counted one is cut off when the run continues.
"""

import os
import time
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from client.ingest.duplicates import DuplicateIndex
from client.ingest.journal import Journal
from client.ingest.patients import split_of
from client.ingest.types import Outcome, Picture, Reason, Rules
from core.errors import UserError
from core.shards import HEADER_BYTES

RAW: Final = "pictures.raw"
COMMIT_SECONDS: Final = 5.0
"""A kill costs the reading of so long."""


class Recorder:
    """Takes the outcomes of the list's files in their order.

    **Guarantees**: after a kill at any instant the journal opens in the state of some moment of
    the run, with exactly the pictures that it counts; so a run that is continued ends with the same
    pictures, numbers and order as one that never stopped. All pictures of a patient are in one
    split. No two pictures are copies, if `rules.duplicates` is "remove".
    """

    def __init__(self, journal: Journal, rules: Rules) -> None:
        """Continue where the journal is.

        Raises:
            UserError: pictures that the journal counts are missing.
        """
        self._journal = journal
        self._connection = journal.connection
        self._px = rules.px
        self._next = journal.done + 1
        self._pictures: int = journal.one("SELECT count(*) FROM pictures")
        self._labelled = journal.fact("labelled") == "1"
        self._end = _end_of_pictures(journal, rules.px)
        self._raw = _open_raw(journal, self._end)
        self._committed = time.monotonic()
        self._duplicates = None
        if rules.duplicates == "remove":
            self._duplicates = DuplicateIndex(self._connection, self._picture_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._raw)

    def record(self, label: str, split: str, outcome: Outcome) -> Reason | None:
        """Record the outcome of the next file of the list and keep its new pictures.

        Args:
            label: Class of the file, or empty.
            split: What a CSV says of its split, or empty.
            outcome: What became of it.

        Returns:
            Why the file gave no picture, or None.
        """
        reason, exact, near = outcome.reason, 0, 0
        for index, picture in enumerate(outcome.pictures):
            copy = self._find_copy(outcome, index)
            exact += copy == "exact"
            near += copy == "near"
            if not copy:
                self._keep(picture, self._patient(outcome.patient, split), label)
                if self._duplicates:
                    self._duplicates.add(self._pictures, outcome.fingerprints[index])
                self._pictures += 1
        if reason is None and exact + near == len(outcome.pictures):
            reason = Reason.NEAR_DUPLICATE if near else Reason.DUPLICATE
        seen = (outcome.kind, outcome.vendor, outcome.text)
        self._connection.execute(
            "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._next, reason, outcome.note, exact, near, *seen),
        )
        self._next += 1
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()
        return reason

    def commit(self) -> None:
        """Put everything so far on the disk: first the pictures, then what counts them."""
        os.fsync(self._raw)
        self._journal.commit()
        self._committed = time.monotonic()

    def _find_copy(self, outcome: Outcome, index: int) -> str:
        if not self._duplicates:
            return ""
        return self._duplicates.find(outcome.fingerprints[index], outcome.pictures[index].pixels)

    def _keep(self, picture: Picture, patient: int, label: str) -> None:
        channels = picture.pixels.shape[2]
        assert picture.pixels.shape == (self._px, self._px, channels)
        self._connection.execute(
            "INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)",
            (self._pictures, self._end, channels, picture.modality, patient, label),
        )
        data = picture.pixels.tobytes()
        while data:  # a full disk may take a part before it refuses
            written = os.pwrite(self._raw, data, self._end)
            self._end += written
            data = data[written:]

    def _patient(self, key: str, split: str) -> int:
        """The patient's number; a patient stays in the split of the first picture."""
        number: int | None = self._journal.one("SELECT id FROM patients WHERE key = ?", key)
        if number is None:
            split = split or (split_of(key) if self._labelled else "train")
            insert = "INSERT INTO patients (key, split) VALUES (?, ?)"
            number = self._connection.execute(insert, (key, split)).lastrowid
            assert number is not None
        return number

    def _picture_at(self, picture: int) -> NDArray[np.uint8]:
        query = "SELECT offset, channels FROM pictures WHERE id = ?"
        offset, channels = self._connection.execute(query, (picture,)).fetchone()
        data = os.pread(self._raw, self._px**2 * channels, offset)
        return np.frombuffer(data, np.uint8).reshape(self._px, self._px, channels)


def _end_of_pictures(journal: Journal, px: int) -> int:
    query = "SELECT offset, channels FROM pictures ORDER BY id DESC LIMIT 1"
    offset, channels = journal.connection.execute(query).fetchone() or (HEADER_BYTES, 0)
    return int(offset) + px**2 * int(channels)


def _open_raw(journal: Journal, end: int) -> int:
    raw = os.open(journal.work / RAW, os.O_RDWR | os.O_CREAT, 0o666)  # becomes the shard's
    if end > HEADER_BYTES and os.fstat(raw).st_size < end:
        os.close(raw)
        raise UserError(
            f"'{journal.work / RAW}' has lost pictures that its journal counts; "
            "begin anew with --restart"
        )
    os.ftruncate(raw, end)
    return raw
