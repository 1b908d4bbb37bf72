"""How well `client.ingest.duplicates` tells copies of an image from other images, and how fast.

Three questions, each with its table:
  others  over all pairs of a set: how many are called the same or nearly, within one patient and
          between patients; how many pictures a lookup would have to leaf through among 10^6
  copies  of each image a copy is made as archives hold them (JPEG, other size, brighter, in three
          channels, cropped): the share that is caught, and the bits of the hash that flip. The
          change is made at the file's size; "own size" changes the 64 px picture itself
  lookup  milliseconds for find and add among synthetic fingerprints, evenly drawn and crowded

DATA holds images64/*.npz (train_images, train_groups, ...) and, if there is one, dicom/real/.

Run: python benchmarks/duplicates.py DATA [--lookups 1000000] [--near-pairs OUT.png]
"""

import argparse
import contextlib
import io
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_modality_lut

from client.ingest.duplicates import (
    BAND_BITS,
    BAND_ORDER,
    BANDS,
    MOST_BITS,
    DuplicateIndex,
    Fingerprint,
    alike,
    fingerprint,
)
from client.ingest.resize import square
from client.ingest.types import Rejected

Pixels = NDArray[np.uint8]
SPLITS = ("train", "val", "test")
SAMPLE = 150
"""Images of a set that are copied."""
BATCH = 500
"""Pictures added between two commits: about a second of reading."""


class Stopwatch:
    """Seconds by the clock and of the processor, summed over turns."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.processor += time.process_time() - self._start[1]

    def each(self, count: int) -> str:
        """Milliseconds for one of `count`."""
        return f"{self.wall / count * 1e3:.2f} ({self.processor / count * 1e3:.2f})"


def jpeg(image: Pixels, quality: int) -> Pixels:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def scaled(image: Pixels, factor: float) -> Pixels:
    height, width = (round(side * factor) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def brighter(image: Pixels) -> Pixels:
    return np.minimum(image, 253) + np.uint8(2)


def in_colour(image: Pixels) -> Pixels:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "JPEG q90": lambda image: jpeg(image, 90),
    "JPEG q75": lambda image: jpeg(image, 75),
    "half size": lambda image: scaled(image, 0.5),
    "0.8 of the size": lambda image: scaled(image, 0.8),
    "2 levels brighter": brighter,
    "three channels, JPEG q90": lambda image: jpeg(in_colour(image), 90),
    "1 px cropped": lambda image: image[1:-1, 1:-1],
}


def read_sets(data: Path) -> Iterator[tuple[str, Pixels, NDArray[np.int64]]]:
    """Name, images and groups (patients) of each npz file."""
    for path in sorted((data / "images64").glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            splits = [split for split in SPLITS if f"{split}_images" in arrays]
            images = np.concatenate([arrays[f"{split}_images"] for split in splits])
            known = [arrays[f"{s}_groups"] for s in splits if f"{s}_groups" in arrays]
        yield path.stem, images, np.concatenate(known) if known else np.arange(len(images))


def read_dicom(data: Path) -> dict[str, Pixels]:
    """The first frame of each real DICOM file that decodes, in 8 bits."""
    images = {}
    for path in sorted((data / "dicom" / "real").glob("*")):
        try:
            dataset = pydicom.dcmread(path)
            frame = dataset.pixel_array
        except (AttributeError, RuntimeError, ValueError):
            continue
        if int(getattr(dataset, "NumberOfFrames", None) or 1) > 1:
            frame = frame[0]
        if getattr(dataset, "Modality", "") == "CT":
            values = apply_modality_lut(frame, dataset).astype(np.float64)
            frame = np.clip((values + 160) * (255 / 400), 0, 255).astype(np.uint8)
        elif frame.dtype != np.uint8:
            low, high = np.percentile(frame, [0.5, 99.5])
            frame = np.clip((frame - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)
        images[path.name] = frame
    return images


def flags_of(prints: list[Fingerprint]) -> NDArray[np.uint8]:
    return np.unpackbits(np.stack([np.frombuffer(p.bits, np.uint8) for p in prints]), axis=1)


def compare_others(data: Path) -> list[tuple[Pixels, Pixels]]:
    """Print the table of different images; returns the pairs that are called near."""
    print("\n| set | images | same | near, same patient | near, other | leafed through of 10^6 |")
    print("|---|---:|---:|---:|---:|---:|")
    found = []
    for name, images, groups in read_sets(data):
        pictures = [image.reshape(*image.shape[:2], -1) for image in images]
        prints = [fingerprint(picture) for picture in pictures]
        flags = flags_of(prints).astype(np.float32)
        differing = flags @ (1 - flags).T
        close = np.argwhere(np.triu(differing + differing.T <= MOST_BITS, 1))
        same = [(i, j) for i, j in close if prints[i].exact == prints[j].exact]
        rest = [(i, j) for i, j in close if prints[i].exact != prints[j].exact]
        near = [(i, j) for i, j in rest if alike(pictures[i], pictures[j])]
        found += [(pictures[i], pictures[j]) for i, j in near]
        own = sum(groups[i] == groups[j] for i, j in near)
        shared = 0
        for band in BAND_ORDER.reshape(BANDS, BAND_BITS):
            values = flags[:, band] @ (2.0 ** np.arange(BAND_BITS))
            _, counts = np.unique(values, return_counts=True)
            shared += int((counts * (counts - 1)).sum() // 2)
        rate = (shared - BANDS * len(same)) / (len(images) * (len(images) - 1) / 2)
        print(
            f"| {name} | {len(images):,} | {len(same)} | {own} | {len(near) - own} | "
            f"{rate * 1e6:.0f} |",
            flush=True,
        )
    return found


def catch(title: str, originals: list[Pixels], px: int) -> None:
    """Print one row: share caught, and median and largest number of flipped bits."""
    cells = []
    for change in COPIES.values():
        caught, flipped = 0, []
        for image in originals:
            before, after = square(image, px), square(change(image), px)
            bits = flags_of([fingerprint(before), fingerprint(after)])
            flipped.append(int((bits[0] != bits[1]).sum()))
            same = (bits[0] == bits[1])[BAND_ORDER].reshape(BANDS, BAND_BITS).all(axis=1)
            caught += flipped[-1] <= MOST_BITS and same.any() and alike(before, after)
        cells.append(f"{caught / len(originals):.0%} ({np.median(flipped):.0f}, {max(flipped)})")
    print(f"| {title} | {len(originals)} | {px} | " + " | ".join(cells) + " |", flush=True)


def compare_copies(data: Path, dicom: dict[str, Pixels]) -> None:
    print("\n| set | images | px | " + " | ".join(COPIES) + " |")
    print("|---|---:|---:|" + "---:|" * len(COPIES))
    draws = np.random.default_rng(0)
    large = [image for image in dicom.values() if min(image.shape[:2]) >= 128]
    for px in (64, 224):
        catch("DICOM files", large, px)
    for name, images, _ in read_sets(data):
        seen = np.flatnonzero(images.std(axis=tuple(range(1, images.ndim))) > 3)
        sample = draws.choice(seen, min(SAMPLE, len(seen)), replace=False)
        catch(f"{name}, own size", [images[i] for i in sample], 64)
        catch(f"{name}, from 256 px", [scaled(images[i], 4) for i in sample], 64)
        catch(f"{name}, from 512 px", [scaled(images[i], 8) for i in sample[:50]], 224)


def compare_dicom(dicom: dict[str, Pixels]) -> None:
    print("\nDICOM files that are called the same as an earlier one, or nearly:")
    for px in (64, 224):
        names, pictures, verdicts = [], [], []
        for name, image in dicom.items():
            with contextlib.suppress(Rejected):
                pictures.append(square(image, px))
                names.append(name)
        index = DuplicateIndex(sqlite3.connect(":memory:"), pictures.__getitem__)
        for number, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            found = fingerprint(picture)
            if verdict := index.find(found, picture):
                verdicts.append(f"{name} {verdict}")
            else:
                index.add(number, found)
        print(f"  {px} px, {len(verdicts)} of {len(names)} images: {', '.join(verdicts)}")


def time_lookups(count: int, crowded: list[Fingerprint]) -> None:
    """Fill an index with synthetic fingerprints, then ask it for others."""
    draws = np.random.default_rng(0)
    bases = flags_of(crowded)
    blank = np.zeros((64, 64, 1), np.uint8)
    blank[:32] = 255
    other = np.ascontiguousarray(blank.swapaxes(0, 1))
    print("\nIn brackets milliseconds of the processor.\n")
    print("| fingerprints | in the index | add, ms | find, ms | file, MB |")
    print("|---|---:|---:|---:|---:|")
    for title in ("evenly drawn", "crowded: real ones, 10 % of the bits redrawn"):

        def draw(number: int, title: str = title) -> Fingerprint:
            flags = draws.integers(0, 2, 256, dtype=np.uint8)
            if title != "evenly drawn":
                kept = draws.random(256) >= 0.1
                flags = np.where(kept, bases[number % len(bases)], flags).astype(np.uint8)
            return Fingerprint(draws.bytes(16), np.packbits(flags).tobytes())

        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "journal.sqlite"
            connection = sqlite3.connect(file, isolation_level=None)
            for setting in ("locking_mode=EXCLUSIVE", "synchronous=EXTRA", "cache_size=-65536"):
                connection.execute(f"PRAGMA {setting}")  # as the journal has them
            index = DuplicateIndex(connection, lambda number: blank)
            adding, finding = Stopwatch(), Stopwatch()
            for first in range(0, count, BATCH):
                batch = [draw(number) for number in range(first, min(first + BATCH, count))]
                with adding:
                    connection.execute("BEGIN")
                    for number, found in enumerate(batch, start=first):
                        index.add(number, found)
                    connection.execute("COMMIT")
            asked = [draw(number) for number in range(5000)]
            with finding:
                for found in asked:
                    index.find(found, other)
            connection.close()
            print(
                f"| {title} | {count:,} | {adding.each(count)} | {finding.each(len(asked))} | "
                f"{file.stat().st_size / 1e6:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--lookups", type=int, default=1_000_000)
    parser.add_argument("--near-pairs", type=Path, help="write the pairs called near to this PNG")
    options = parser.parse_args()
    dicom = read_dicom(options.data)
    near = compare_others(options.data)
    if options.near_pairs and near:
        rows = [np.concatenate([in_colour(p.squeeze()) for p in pair], axis=1) for pair in near]
        Image.fromarray(np.concatenate(rows[:100])).save(options.near_pairs)
    compare_copies(options.data, dicom)
    compare_dicom(dicom)
    prints = [
        fingerprint(image.reshape(64, 64, -1))
        for _, images, _ in read_sets(options.data)
        for image in images
    ]
    time_lookups(options.lookups, prints)


if __name__ == "__main__":
    main()
