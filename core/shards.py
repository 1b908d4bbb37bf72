"""Shards: a site's prepared images, in the one format that every reader here uses.

A shard is a directory that trains without decoding:
  manifest.json   format version, name, count, px, channels, classes, sha256 of the other two, and
                  the window in Hounsfield units by which its CT images were made, if they were
  images.npy      uint8 [N, px, px, channels], opened as a memory map
  table.csv       modality,patient,label,split: one line an image; label is a class name or empty
Patients are numbers, which mean something within the shard alone, or keyed hashes, which are the
same in all shards of a site: a shard holds no name or identifier of a person. A shard that
fits in memory is written by `write_shard`; a larger one file by file by who makes it, with the
helpers that `write_shard` uses.
"""

import csv
import io
import shutil
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError

from core.checkpoint import commit_directory, sha256_file, write_json
from core.errors import UserError
from core.modalities import MODALITIES
from core.strict import Strict

SPLITS: Final = ("train", "val", "test")
FILES: Final = ("manifest.json", "images.npy", "table.csv")
COLUMNS: Final = ["modality", "patient", "label", "split"]
HEADER_BYTES: Final = 128
"""What numpy writes before the pixels; the same for any number of images below 10^21."""


@dataclass(frozen=True)
class Shard:
    """Images with what is known of each; all arrays have N entries in the same order."""

    name: str
    images: NDArray[np.uint8]
    """[N, px, px, C] with C 1 or 3; a read-only memory map when opened from disk"""
    modality: NDArray[np.int16]
    """[N] index into core.modalities.MODALITIES"""
    patient: NDArray[np.int64]
    """[N] number of the patient within this shard"""
    label: NDArray[np.int64]
    """[N] index into classes[modality], -1 where there is none"""
    split: NDArray[np.str_]
    """[N] 'train', 'val' or 'test'"""
    classes: dict[str, tuple[str, ...]]
    """modality -> class names, for each modality in the shard; () where nothing is labelled"""
    keys: NDArray[np.bytes_] | None = None
    """[P] what the table calls each patient, by which all shards of the site know them; empty where
    that is a number, which says nothing beyond this shard; None: everywhere"""


def _known_modality(name: str) -> str:
    if name not in MODALITIES:
        raise ValueError(f"must be one of {', '.join(MODALITIES)}")
    return name


class Manifest(Strict):
    """The facts of a shard, checked against its other files when it is opened."""

    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    count: Annotated[int, Field(ge=0)]
    px: Annotated[int, Field(ge=1)]
    channels: Literal[1, 3]
    classes: dict[Annotated[str, AfterValidator(_known_modality)], tuple[str, ...]]
    sha256: dict[Literal["images.npy", "table.csv"], str]
    ct_window: tuple[float, float] | None = None


def write_shard(directory: Path, shard: Shard) -> Path:
    """Write a shard as one atomic step: built aside, synced, renamed.

    Args:
        directory: Target; a shard of the same name that is already there is replaced.
        shard: What to write.

    Returns:
        `directory`.

    Raises:
        UserError: the target holds something else, the shard has no images or has a patient in
            two splits, or the disk refuses.
    """
    check_shard(shard)
    check_target(directory, shard.name)
    directory = directory.absolute()
    aside = directory.with_name(f".{directory.name}.partial")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        np.save(aside / "images.npy", shard.images, allow_pickle=False)
        write_table(aside / "table.csv", _table_rows(shard))
        manifest = Manifest(
            name=shard.name,
            count=len(shard.images),
            px=shard.images.shape[1],
            channels=shard.images.shape[3],
            classes=shard.classes,
            sha256={name: sha256_file(aside / name) for name in ("images.npy", "table.csv")},
        )
        write_json(aside / "manifest.json", manifest_json(manifest))
        commit_directory(aside, directory)
    except OSError as error:
        raise UserError(f"shard '{directory}' cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def images_header(count: int, px: int, channels: int) -> bytes:
    """The `HEADER_BYTES` that make images.npy of the pixels of `count` images behind them."""
    header = io.BytesIO()
    shape = (count, px, px, channels)
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    assert len(header.getvalue()) == HEADER_BYTES
    return header.getvalue()


def write_table(path: Path, rows: Iterable[tuple[str, object, str, str]]) -> None:
    """Write a shard's table from (modality, patient, class name or empty, split), row by row."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """What manifest.json holds; a shard without a window does not name one."""
    return manifest.model_dump(mode="json", exclude_none=True)


def open_shard(directory: Path, *, verify: bool = False) -> Shard:
    """Open a shard; its images stay on disk until they are used.

    Args:
        directory: A directory written by `write_shard`.
        verify: Also hash the images, which reads all of them. The table is always hashed.

    Raises:
        UserError: the shard is missing, empty, damaged, or of a format we do not read.
    """
    manifest = _read_manifest(directory)
    if manifest.count == 0:
        raise UserError(f"shard '{directory}' is empty (0 images); prepare it again")
    images = _map_images(directory / "images.npy", manifest)
    for name in ("table.csv", "images.npy") if verify else ("table.csv",):
        if sha256_file(_existing(directory / name)) != manifest.sha256.get(name):
            raise _damaged(directory / name, "its sha256 is not the manifest's")
    shard = _read_table(directory / "table.csv", manifest, images)
    check_shard(shard)
    return shard


def check_shard(shard: Shard) -> None:
    """Refuse a shard without images, or with one patient in two splits (a leak into evaluation)."""
    count = len(shard.images)
    columns = (shard.modality, shard.patient, shard.label, shard.split)
    assert shard.images.ndim == 4
    assert all(column.shape == (count,) for column in columns)
    if count == 0:
        raise UserError(f"shard '{shard.name}' is empty (0 images); nothing can be trained on it")
    _, first, patient = np.unique(shard.patient, return_index=True, return_inverse=True)
    split = shard.split[first][patient]
    wrong = np.flatnonzero(shard.split != split)
    if len(wrong):
        image = wrong[0]
        raise UserError(
            f"shard '{shard.name}': patient number {shard.patient[image]} is in '{split[image]}' "
            f"and '{shard.split[image]}'; keep all images of a patient in one split"
        )


def check_target(directory: Path, name: str) -> None:
    """Refuse to write where something else than a shard of this name (or nothing) is."""
    if not directory.exists():
        return
    if not directory.is_dir() or {path.name for path in directory.iterdir()} - set(FILES):
        raise UserError(
            f"'{directory}' exists and is not a shard; it is left as it is: give another target"
        )
    if (directory / "manifest.json").exists():
        found = _read_manifest(directory).name
        if found != name:
            raise UserError(
                f"'{directory}' holds shard '{found}', not '{name}'; it is left as it is: "
                "remove it or give another target"
            )


def number_patients(keys: Iterable[Any]) -> NDArray[np.int64]:
    """Numbers for patient keys, 0, 1, ... in order of first appearance."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _table_rows(shard: Shard) -> Iterable[tuple[str, object, str, str]]:
    columns = (shard.modality, shard.patient, shard.label, shard.split)
    for m, patient, label, split in zip(*(column.tolist() for column in columns), strict=True):
        modality = MODALITIES[m]
        key = shard.keys[patient].decode() if shard.keys is not None else ""
        label_name = shard.classes[modality][label] if label >= 0 else ""
        yield modality, key or patient, label_name, split


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"'{path}' is damaged: {why}; prepare the shard again")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise _damaged(path, "the file is missing")
    return path


def _read_manifest(directory: Path) -> Manifest:
    path = directory / "manifest.json"
    if not path.is_file():
        raise UserError(f"'{directory}' is not a shard (no manifest.json); check the path")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _damaged(path, f"{key}: {first['msg'].lower()}") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None


def _map_images(path: Path, manifest: Manifest) -> NDArray[np.uint8]:
    try:
        images: NDArray[np.uint8] = np.load(_existing(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    expected = (manifest.count, manifest.px, manifest.px, manifest.channels)
    if images.dtype != np.uint8 or images.shape != expected:
        raise _damaged(path, f"expected uint8 {expected}, found {images.dtype} {images.shape}")
    return images


def _read_table(path: Path, manifest: Manifest, images: NDArray[np.uint8]) -> Shard:
    label_of = {(m, ""): -1 for m in manifest.classes}
    label_of |= {(m, c): i for m, names in manifest.classes.items() for i, c in enumerate(names)}
    # Numbers and not rows: a table may have 10^7 of them.
    modality, patient, label, split = array("h"), array("q"), array("q"), array("b")
    numbers: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            right = next(rows, []) == COLUMNS
            for line, row in enumerate(rows if right else (), start=2):
                if len(row) != 4 or (row[0], row[2]) not in label_of or row[3] not in SPLITS:
                    # Not the row itself: it holds a patient's key.
                    raise _damaged(path, f"line {line} does not fit the manifest")
                modality.append(MODALITIES.index(row[0]))
                patient.append(numbers.setdefault(row[1], len(numbers)))
                label.append(label_of[row[0], row[2]])
                split.append(SPLITS.index(row[3]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, str(error)) from None
    if not right or len(label) != manifest.count:
        raise _damaged(path, f"expected columns {','.join(COLUMNS)} and {manifest.count} rows")
    return Shard(
        name=manifest.name,
        images=images,
        modality=np.frombuffer(modality, dtype=np.int16),
        patient=np.frombuffer(patient, dtype=np.int64),
        label=np.frombuffer(label, dtype=np.int64),
        split=np.array(SPLITS)[np.frombuffer(split, dtype=np.int8)],
        classes=dict(manifest.classes),
        keys=_keys(numbers),
    )


def _keys(table_names: Iterable[str]) -> NDArray[np.bytes_] | None:
    # A keyed hash has 32 digits, and may by chance have no letter.
    keys = [b"" if n.isdecimal() and len(n) < 20 else n.encode() for n in table_names]
    return np.array(keys) if any(keys) else None
