"""From a journal in which every file has its outcome to a shard in place.

All of it streams, and all of it may be killed and done again: the shard is built in the work
directory and renamed into place, and the journal remembers which shard that was.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from client.ingest.journal import Journal
from client.ingest.recorder import RAW
from client.ingest.types import Reason, Rules, Summary
from core.checkpoint import commit_directory, sha256_file, write_json
from core.modalities import MODALITIES
from core.shards import (
    HEADER_BYTES,
    SPLITS,
    Manifest,
    Shard,
    images_header,
    manifest_json,
    write_table,
)

SAMPLES: Final = 240
"""Pictures of a modality from which a contact sheet chooses."""
BLOCK_BYTES: Final = 16 * 1024**2

Rejection = tuple[Path, Reason, str]
Tick = Callable[[str], None]


def summarise(journal: Journal, name: str, seconds: float, read: int) -> Summary:
    """Count what became of every file.

    Args:
        journal: With an outcome for every file.
        name: The shard's name.
        seconds: How long this run took.
        read: Files read in this run.
    """

    def count(query: str) -> dict[str, int]:
        return dict(journal.connection.execute(query).fetchall())

    tallies = "SELECT {0}, count(*) FROM outcomes WHERE reason IS NULL AND {0} != '' GROUP BY {0}"
    reasons = "SELECT reason, count(*) FROM outcomes WHERE reason IS NOT NULL GROUP BY reason"
    exact = journal.one("SELECT coalesce(sum(exact), 0) FROM outcomes")
    near = journal.one("SELECT coalesce(sum(near), 0) FROM outcomes")
    pictures = journal.connection.execute(
        "SELECT modality, split, count(*) FROM pictures JOIN patients ON patients.id = patient"
        " GROUP BY modality, split"
    ).fetchall()
    return Summary(
        name=name,
        pictures={
            (modality, split): number
            for modality, split, number in sorted(
                pictures, key=lambda row: (MODALITIES.index(row[0]), SPLITS.index(row[1]))
            )
        },
        patients=journal.one("SELECT count(*) FROM patients"),
        files=journal.listed or 0,
        used=journal.one("SELECT count(*) FROM outcomes WHERE reason IS NULL"),
        reasons={Reason(reason): number for reason, number in count(reasons).items()},
        duplicate_pictures={
            reason: number
            for reason, number in ((Reason.DUPLICATE, exact), (Reason.NEAR_DUPLICATE, near))
            if number
        },
        kinds=count(tallies.format("kind")),
        vendors=count(tallies.format("vendor")),
        text=count(tallies.format("text")),
        seconds=seconds,
        read=read,
    )


def rejected_files(journal: Journal) -> Iterator[Rejection]:
    """(path, reason, note) of every file that gave no picture, in the order of the list."""
    query = (
        "SELECT path, outcomes.reason, note FROM outcomes JOIN items ON items.id = item"
        " WHERE outcomes.reason IS NOT NULL ORDER BY item"
    )
    for path, reason, note in journal.connection.execute(query):
        yield Path(os.fsdecode(path)), Reason(reason), note


def put_in_place(journal: Journal, target: Path, name: str, rules: Rules, tick: Tick) -> None:
    """Build the shard and rename it to `target`; nothing is done where that has been done.

    Args:
        journal: With an outcome for every file and at least one picture.
        target: Where the shard goes; a shard there is replaced.
        name: The shard's name.
        rules: What the pictures were made by.
        tick: Told what is going on.
    """
    stage = journal.work / "shard"
    if journal.fact("built") == "yes" and not stage.exists():
        return  # it was renamed
    journal.note("built", "no")
    journal.commit()
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir()
    tick("writing the pictures")
    count, channels = _write_images(journal, stage / "images.npy", rules.px)
    tick("writing the table")
    write_table(stage / "table.csv", _rows(journal))
    classes = _classes(journal)
    tick("hashing")
    facts = Manifest(
        name=name,
        count=count,
        px=rules.px,
        channels=3 if channels == 3 else 1,
        classes=classes,
        sha256={
            "images.npy": sha256_file(stage / "images.npy"),
            "table.csv": sha256_file(stage / "table.csv"),
        },
        ct_window=rules.ct_window if "ct" in classes else None,
    )
    write_json(stage / "manifest.json", manifest_json(facts))
    journal.note("built", "yes")
    journal.commit()
    commit_directory(stage, target)


def sample(journal: Journal, name: str, rules: Rules) -> Shard:
    """A shard in memory of some pictures of each modality, for contact sheets."""
    classes = _classes(journal)
    # Multiplied by Knuth's constant the numbers are in an order that is as good as random.
    query = (
        "SELECT offset, channels, modality, patient, label, split FROM (SELECT * FROM pictures"
        " WHERE modality = ? ORDER BY id * 2654435761 % 4294967296 LIMIT ?) AS some"
        " JOIN patients ON patients.id = patient ORDER BY some.id"
    )
    rows = [row for m in classes for row in journal.connection.execute(query, (m, SAMPLES))]
    images = np.empty((len(rows), rules.px, rules.px, max(row[1] for row in rows)), np.uint8)
    with open(journal.work / RAW, "rb") as raw:
        for image, (offset, channels, *_) in zip(images, rows, strict=True):
            raw.seek(offset)
            data = np.frombuffer(raw.read(rules.px**2 * channels), np.uint8)
            image[...] = data.reshape(rules.px, rules.px, channels)
    return Shard(
        name=name,
        images=images,
        modality=np.array([MODALITIES.index(row[2]) for row in rows], dtype=np.int16),
        patient=np.array([row[3] for row in rows], dtype=np.int64),
        label=np.array([classes[row[2]].index(row[4]) if row[4] else -1 for row in rows]),
        split=np.array([row[5] for row in rows]),
        classes=classes,
    )


def _write_images(journal: Journal, path: Path, px: int) -> tuple[int, int]:
    """Write images.npy; gives the number of images and their channels."""
    count, least, most = journal.connection.execute(
        "SELECT count(*), min(channels), max(channels) FROM pictures"
    ).fetchone()
    raw = journal.work / RAW
    if least == most:
        # Behind its header the file holds what is wanted already; another name costs no disk.
        with open(raw, "r+b") as file:
            file.write(images_header(count, px, most))
        path.unlink(missing_ok=True)
        try:
            os.link(raw, path)
        except OSError:  # file systems without links
            shutil.copyfile(raw, path)
    else:
        _write_in_colour(journal, raw, path, px, count)
    return count, most


def _write_in_colour(journal: Journal, raw: Path, path: Path, px: int, count: int) -> None:
    with open(raw, "rb") as source, open(path, "wb", buffering=BLOCK_BYTES) as images:
        images.write(images_header(count, px, 3))
        source.seek(HEADER_BYTES)
        for (channels,) in journal.connection.execute("SELECT channels FROM pictures ORDER BY id"):
            pixels = np.frombuffer(source.read(px * px * channels), np.uint8)
            images.write(pixels.repeat(3 // channels).tobytes())


def _rows(journal: Journal) -> Iterator[tuple[str, str, str, str]]:
    query = (
        "SELECT modality, key, label, split FROM pictures JOIN patients ON patients.id = patient"
        " ORDER BY pictures.id"
    )
    yield from journal.connection.execute(query)


def _classes(journal: Journal) -> dict[str, tuple[str, ...]]:
    query = "SELECT DISTINCT modality, label FROM pictures ORDER BY modality, label"
    names: dict[str, list[str]] = {}
    for modality, label in journal.connection.execute(query):
        names.setdefault(modality, [])
        if label:
            names[modality].append(label)
    return {m: tuple(names[m]) for m in MODALITIES if m in names}
