"""The journal of a preparation: what is listed, read and kept, so that a kill loses nothing.

It lives in a work directory beside the shard to be:
  journal.sqlite   settings, the list of files in its fixed order, outcomes, patients, pictures
  pictures.raw     the kept pictures; see `recorder`
Paths are in it, so only its owner may read it, and it goes away with the work directory; of
patients it holds keys alone.
"""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

from client.ingest.patients import patient_key
from client.ingest.types import Item, Reason
from core.errors import UserError

LIST_ROWS: Final = 10_000
"""Files listed between two commits."""
CACHE_KIB: Final = 65_536
CHECKPOINT_PAGES: Final = 10_000
"""Of 4 KiB, written ahead before they go to their places."""

SCHEMA: Final = {
    "facts": "(name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # Names of files may be no text: bytes.
    "items": "(id INTEGER PRIMARY KEY, path BLOB, key BLOB, modality TEXT, label TEXT, split TEXT,"
    " patient TEXT, reason TEXT)",
    "outcomes": "(item INTEGER PRIMARY KEY, reason TEXT, note TEXT, exact INTEGER, near INTEGER,"
    " kind TEXT, vendor TEXT, text TEXT)",
    "patients": "(id INTEGER PRIMARY KEY, key TEXT UNIQUE, split TEXT)",
    "pictures": "(id INTEGER PRIMARY KEY, offset INTEGER, channels INTEGER, modality TEXT,"
    " patient INTEGER, label TEXT)",
}


class Journal:
    """An open journal; one process at a time holds it.

    **Guarantees**: after a kill at any instant it opens in the state of some moment of the run,
    with exactly the pictures of the outcomes it holds; outcomes are recorded in the order of the
    list, so a run that is continued ends like one that never stopped.
    """

    def __init__(self, work: Path) -> None:
        """Open the journal file of a work directory and hold it.

        Raises:
            UserError: another process holds it.
            sqlite3.Error: it is damaged, or the disk refuses.
        """
        self.work = work
        self.connection = _connect(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; what was not committed is forgotten."""
        self.connection.close()

    def commit(self) -> None:
        """Put everything so far on the disk."""
        self.connection.execute("COMMIT")
        self.connection.execute("BEGIN IMMEDIATE")

    def fact(self, name: str) -> str | None:
        """What was noted under a name."""
        value: str | None = self.one("SELECT value FROM facts WHERE name = ?", name)
        return value

    def note(self, name: str, value: str) -> None:
        """Note something, with the next commit."""
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def one(self, query: str, *values: Any) -> Any:
        """The first value of the first row, or None."""
        row = self.connection.execute(query, values).fetchone()
        return row[0] if row else None

    @property
    def listed(self) -> int | None:
        """How many files the list has, or None while it is not whole."""
        count = self.fact("listed")
        return None if count is None else int(count)

    @property
    def done(self) -> int:
        """How many of them have an outcome: the first ones of the list."""
        return int(self.one("SELECT coalesce(max(item), 0) FROM outcomes"))

    def list_items(self, items: Iterable[Item], secret: bytes) -> Iterator[int]:
        """Take the list of files; yields how many there are so far, and at last the whole number.

        Raises:
            UserError: a CSV puts one patient into two splits.
        """
        source, count = iter(items), 0
        while rows := [_item_row(item, secret) for item in islice(source, LIST_ROWS)]:
            self.connection.executemany(
                "INSERT INTO items (path, key, modality, label, split, patient, reason)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            count += len(rows)
            self.commit()
            yield count
        self._check_splits()
        known = "SELECT EXISTS (SELECT 1 FROM items WHERE label != '' OR split != '')"
        self.note("labelled", str(self.one(known)))
        self.note("listed", str(count))
        self.commit()
        yield count

    def _check_splits(self) -> None:
        query = (
            "SELECT min(key), max(key) FROM items WHERE patient != '' AND split != ''"
            " GROUP BY patient HAVING min(split) != max(split) LIMIT 1"
        )
        found = self.connection.execute(query).fetchone()
        if found:
            first, last = (os.fsdecode(key).partition("/")[2] for key in found)
            raise UserError(
                f"the CSV puts a patient into two splits (images '{first}' and '{last}'); "
                "keep all images of a patient in one split"
            )

    def items_left(self) -> Iterator[Item]:
        """The files without an outcome, in the order of the list."""
        query = (
            "SELECT id, path, key, modality, label, split, patient, reason FROM items"
            " WHERE id > ? ORDER BY id LIMIT 1000"
        )
        number = self.done
        while rows := self.connection.execute(query, (number,)).fetchall():
            for _, path, key, modality, label, split, patient, reason in rows:
                yield Item(
                    Path(os.fsdecode(path)),
                    os.fsdecode(key),
                    modality,
                    label,
                    split,
                    patient,
                    Reason(reason) if reason else None,
                )
            number = rows[-1][0]


def open_journal(work: Path, settings: Mapping[str, Any], *, restart: bool = False) -> Journal:
    """Open the journal of a work directory, or begin one.

    A list of files that was not finished is thrown away: nothing has been read by it.

    Args:
        work: The work directory; made if it is missing.
        settings: Everything that must be the same in a run that continues: JSON values by the
            option that gives them.
        restart: Whether to throw away what is there.

    Raises:
        UserError: another process holds it, or it was begun with other settings.
        sqlite3.Error: it is damaged, or the disk refuses.
    """
    if restart and work.exists():
        with contextlib.suppress(sqlite3.DatabaseError):  # damaged: all the better
            Journal(work).close()  # raises while another process is at work in it
        shutil.rmtree(work)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = Journal(work)
    try:
        begun = journal.one("SELECT count(*) FROM sqlite_master WHERE name = 'facts'")
        if begun and journal.listed is not None:
            _check_settings(json.loads(journal.fact("settings") or "{}"), settings)
        else:
            for table, columns in SCHEMA.items():
                journal.connection.execute(f"DROP TABLE IF EXISTS {table}")
                journal.connection.execute(f"CREATE TABLE {table} {columns}")
            journal.note("settings", json.dumps(settings))
            journal.commit()
    except BaseException:
        journal.close()
        raise
    return journal


def _connect(work: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(work / "journal.sqlite", isolation_level=None, timeout=0.5)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        # Written ahead, pages that do not fit the cache need no sync of their own; and held alone,
        # it shares no memory, which network file systems do not have.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("BEGIN IMMEDIATE")
        return connection
    except sqlite3.DatabaseError as error:
        connection.close()
        if getattr(error, "sqlite_errorname", "") == "SQLITE_BUSY":
            raise UserError(f"'{work}' is in use: another prepare is at work on it") from None
        raise


def _check_settings(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for option, value in json.loads(json.dumps(settings)).items():
        if begun.get(option) != value:
            what = (
                "the secret has changed"
                if option == "--secret"
                else f"{option} was {_shown(begun.get(option))} and now is {_shown(value)}"
            )
            raise UserError(
                f"this preparation was begun otherwise: {what}; give the same to continue it, "
                "or --restart to begin anew"
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={choice}" for key, choice in value.items())
    if isinstance(value, list):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return "not given" if value is None else str(value)


def _item_row(item: Item, secret: bytes) -> tuple[Any, ...]:
    """A row of the list; what a CSV calls a patient is hashed first (readers hash it again)."""
    patient = patient_key(secret, f"csv:{item.patient}") if item.patient else ""
    return (
        os.fsencode(item.path),
        os.fsencode(item.key),
        item.modality,
        item.label,
        item.split,
        patient,
        item.reason,
    )
