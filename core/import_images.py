"""Read folders and tables of image files (PNG, JPEG, TIFF, ...) into shards.

Every image is decoded once, its shorter side resized to the shard's pixel size, and its centre
cropped. Nothing of a file's name or metadata enters the shard but class and split.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import SPLITS, Shard, check_shard, number_patients

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
GREY_MODES: Final = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I", "F")
TRAIN_SHARE: Final = 0.70
VAL_SHARE: Final = 0.15


@dataclass(frozen=True)
class Entry:
    """One image file and what is known of it."""

    path: Path
    modality: str
    label: str
    """class name, or empty"""
    split: str
    patient: str


Track = Callable[[Sequence[Entry]], Iterable[Entry]]


def list_folder(directory: Path, modality: str | None = None) -> list[Entry]:
    """The images of a folder laid out as modality/class/file, modality/file, or class/file.

    Args:
        directory: The folder; names that begin with a dot are passed over.
        modality: Modality of all images; sub-folders are then classes. By default the first
            level of sub-folders names the modalities.

    Returns:
        Entries in path order; each image is its own patient and is split by its relative path.

    Raises:
        UserError: the folder is missing, holds no image, or is laid out otherwise.
    """
    if not directory.is_dir():
        raise UserError(f"image folder '{directory}' does not exist; check the path")
    if modality:
        entries = _list_classes(directory, directory, modality)
    else:
        entries = []
        for sub in sorted(directory.glob("[!.]*")):
            if not sub.is_dir() or sub.name not in MODALITIES:
                raise UserError(
                    f"'{sub}': expected folders named {', '.join(MODALITIES)} here; "
                    "rename it, or name the modality of all images with --modality"
                )
            entries += _list_classes(directory, sub, sub.name)
    if not entries:
        raise UserError(f"image folder '{directory}' holds no image ({', '.join(SUFFIXES)})")
    return entries


def list_csv(table: Path) -> list[Entry]:
    """The images named by a CSV with columns image_path,modality[,label,split,patient].

    Paths are relative to the CSV. Rows without a patient are their own patients; where the table
    has no split column, patients are split by a hash of their keys.

    Raises:
        UserError: the table is missing or has no rows, or a row is incomplete or names an unknown
            modality or split; the message gives the line.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{table}' cannot be read as CSV: {error}") from None
    missing = {"image_path", "modality"} - set(columns)
    unknown = set(columns) - {"image_path", "modality", "label", "split", "patient"}
    if missing or unknown:
        raise UserError(
            f"'{table}': expected columns image_path,modality[,label,split,patient], "
            f"found {','.join(columns) or 'nothing'}; correct the first line"
        )
    if not rows:
        raise UserError(f"'{table}' has no rows; give one line an image")
    return [_csv_entry(table, line, row) for line, row in enumerate(rows, start=2)]


def read_folder(
    directory: Path, px: int, modality: str | None = None, track: Track = iter
) -> Shard:
    """Read a folder of images into a shard in memory; see `list_folder` and `read_entries`."""
    return read_entries(directory.name, list_folder(directory, modality), px, track)


def read_csv(table: Path, px: int, track: Track = iter) -> Shard:
    """Read the images of a CSV into a shard in memory; see `list_csv` and `read_entries`."""
    return read_entries(table.stem, list_csv(table), px, track)


def read_entries(name: str, entries: Sequence[Entry], px: int, track: Track = iter) -> Shard:
    """Decode listed images into a shard in memory.

    Args:
        name: The shard's name.
        entries: What to read, at least one.
        px: Side of the square images to make, in pixels.
        track: Goes over the entries in order; wrap it to show progress.

    Returns:
        A shard of one channel when every file is stored in grey, of three otherwise.

    Raises:
        UserError: a file is not a whole image, or a patient is in two splits.
    """
    if px < 8:
        raise UserError(f"expected images of at least 8 px, found {px}; raise --px")
    channels = 1 if all(_is_grey(entry.path) for entry in entries) else 3
    images = np.empty((len(entries), px, px, channels), dtype=np.uint8)
    for index, entry in enumerate(track(entries)):
        images[index] = read_image(entry.path, px, channels)
    classes = {
        modality: tuple(sorted({e.label for e in entries if e.modality == modality and e.label}))
        for modality in MODALITIES
        if any(e.modality == modality for e in entries)
    }
    shard = Shard(
        name=name,
        images=images,
        modality=np.array([MODALITIES.index(e.modality) for e in entries], dtype=np.int16),
        patient=number_patients(e.patient for e in entries),
        label=np.array(
            [classes[e.modality].index(e.label) if e.label else -1 for e in entries],
            dtype=np.int64,
        ),
        split=np.array([e.split for e in entries]),
        classes=classes,
    )
    check_shard(shard)
    return shard


def read_image(path: Path, px: int, channels: int) -> NDArray[np.uint8]:
    """Decode one image to uint8 [px, px, channels].

    Grey of more than 8 bits is stretched from its own lowest to its highest value.

    Raises:
        UserError: the file is missing, damaged, too large, or holds several images.
    """
    with _open(path) as image:
        try:
            # Phones write several pictures into one MPO file; the first is the photo.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError("it holds several images, save each as a file")
            upright = ImageOps.exif_transpose(image)
            deep = upright.mode in ("I", "F") or upright.mode.startswith("I;16")
            eight_bit = _stretch(upright) if deep else upright
            square = ImageOps.fit(
                eight_bit.convert("L" if channels == 1 else "RGB"),
                (px, px),
                Image.Resampling.BICUBIC,
            )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from None
    return np.asarray(square, dtype=np.uint8).reshape(px, px, channels)


def split_of(patient: str) -> str:
    """The split of a patient, fixed by the key alone: about 70 % train, 15 % val, 15 % test."""
    digest = hashlib.sha256(patient.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "val" if share < TRAIN_SHARE + VAL_SHARE else "test"


def _list_classes(root: Path, directory: Path, modality: str) -> list[Entry]:
    """Files right in a modality's folder have no label; its sub-folders are the classes."""
    entries = []
    for path in sorted(directory.glob("[!.]*")):
        files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        label = path.name if path.is_dir() else ""
        for file in files:
            if file.is_dir():
                raise UserError(
                    f"'{file}': expected modality/class/file, found a folder deeper; "
                    "move its images up, or list them in a CSV"
                )
            if file.suffix.lower() in SUFFIXES:
                key = file.relative_to(root).as_posix()
                entries.append(Entry(file, modality, label, split_of(key), key))
    return entries


def _csv_entry(table: Path, line: int, row: dict[str | Any, str | Any]) -> Entry:
    values = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
    where = f"'{table}', line {line}"
    if None in row or not values["image_path"]:
        raise UserError(f"{where}: has no image_path or too many values; correct the line")
    if values["modality"] not in MODALITIES:
        raise UserError(
            f"{where}: expected a modality of {', '.join(MODALITIES)}, "
            f"found '{values['modality']}'; correct the line"
        )
    patient = values.get("patient") or f"image {values['image_path']}"
    split = values.get("split", split_of(patient))
    if split not in SPLITS:
        raise UserError(f"{where}: expected split train, val or test, found '{split}'; correct it")
    path = table.parent / values["image_path"]
    return Entry(path, values["modality"], values.get("label", ""), split, patient)


def _open(path: Path) -> Image.Image:
    """Open an image's header."""
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _is_grey(path: Path) -> bool:
    with _open(path) as image:
        return image.mode in GREY_MODES


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"image '{path}' does not exist; correct the list or copy the file")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"image '{path}' cannot be decoded: {reason}; replace or remove the file and run again"
    )


def _stretch(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = values.min(), values.max()
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
