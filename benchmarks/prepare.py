"""How fast `fedmermed-site prepare` is, how little memory it takes, and what its shard is worth.

A synthetic archive of DICOM files (dicom_files.py: CT uncompressed, JPEG 2000 and RLE, chest X-rays
of 12 bits, ultrasound images and cines, photographs) is prepared with one worker and with two;
then a fifth of it, to see that the parent's memory does not grow with the number of files.

Training reads images in random batches, epoch after epoch. The second table compares four ways
to do so, in turns, from files that are in the page cache:
  shard           the prepared pictures, as training reads them: a memory map
  small PNG       the same pictures as PNG files of their final size, the best case for files
  full-size PNG   the images as they came out of DICOM as 8-bit PNG files, resized each time
  DICOM           decoded, windowed and resized each time, by the reader that prepare uses

Run: python benchmarks/prepare.py [--files 5000] [--images 600] [--px 64] [--home DIR] [--json OUT]
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from dicom_files import KINDS, write_archive
from memory import Watch
from numpy.typing import NDArray
from PIL import Image

from client.ingest.dicom_file import open_dicom
from client.ingest.dicom_pixels import decode_frame
from client.ingest.read import read
from client.ingest.resize import square
from client.ingest.types import Item, Rules
from core.shards import open_shard

SHARES: Final = (30, 12, 12, 8, 4, 8, 4, 6, 8, 8)
"""Per cent of the archive, in the order of KINDS."""
BATCH: Final = 56
EPOCHS: Final = 5

SHARD_BYTES: Final = 2**29
"""The pictures are repeated up to this size: no processor's caches hold them."""

Batch = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Preparation:
    """One run of the command."""

    files: int
    jobs: int
    pictures: int
    seconds: float
    """from the first file to the last"""
    wall_seconds: float
    """of the whole command"""
    processor_seconds: float
    parent_mib: float
    worker_mib: float

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.files / self.seconds


def counts_of(files: int) -> dict[str, int]:
    return {name: files * share // 100 for name, share in zip(KINDS, SHARES, strict=True)}


def prepare(source: Path, target: Path, *, jobs: int, px: int) -> Preparation:
    """Run the command with the options that a hospital would leave as they are."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "client", "prepare", str(source), str(target)),
            *("--px", str(px), "--jobs", str(jobs), "--secret", str(target.parent / "secret")),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.DEVNULL,
    )
    watch = Watch(process.pid)
    while process.poll() is None:
        watch.look()
        time.sleep(0.1)
    wall = time.perf_counter() - began
    if process.returncode:
        sys.exit(process.returncode)
    report = json.loads((target.with_name(f"{target.name}.report") / "report.json").read_text())
    return Preparation(
        files=report["files"]["all"],
        jobs=jobs,
        pictures=len(open_shard(target).images),
        seconds=report["run"]["seconds"],
        wall_seconds=wall,
        processor_seconds=watch.processor_seconds,
        parent_mib=watch.parent_mib,
        worker_mib=watch.worker_mib,
    )


def readers(paths: list[Path], home: Path, px: int) -> dict[str, Batch]:
    """Four ways to read a batch of the same pictures; their files are written here."""
    rules = Rules(px=px, frames=1, burned_in=dict.fromkeys(Rules().burned_in, "accept"))
    small_png, large_png = [], []
    pictures = np.empty((len(paths), px, px, 3), np.uint8)
    for number, path in enumerate(paths):
        item = Item(path, path.name)
        picture = read(item, rules).pictures[0].pixels
        pictures[number] = picture
        small_png.append(_png(home / f"small-{number}.png", picture))
        with open_dicom(path) as file:
            frame = decode_frame(file, 0, rules, "")
        large_png.append(_png(home / f"large-{number}.png", frame))
    times = -(-SHARD_BYTES // pictures.nbytes)
    np.save(home / "images.npy", np.tile(pictures, (times, 1, 1, 1)))
    images = np.load(home / "images.npy", mmap_mode="r")
    draws = np.random.default_rng(1)

    def from_shard(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return images[numbers + len(paths) * draws.integers(0, times, len(numbers))]

    def from_dicom(number: int) -> NDArray[np.uint8]:
        return read(Item(paths[number], "x"), rules).pictures[0].pixels

    def from_png(files: list[Path], number: int) -> NDArray[np.uint8]:
        pixels = np.asarray(Image.open(files[number]))
        return pixels.reshape(px, px, -1) if len(pixels) == px else square(pixels, px)

    def batch(one: Callable[[int], NDArray[np.uint8]], numbers: NDArray[np.int64]) -> Any:
        return np.stack([np.broadcast_to(one(int(n)), (px, px, 3)) for n in numbers])

    return {
        "shard": from_shard,
        "small PNG": partial(batch, partial(from_png, small_png)),
        "full-size PNG": partial(batch, partial(from_png, large_png)),
        "DICOM": partial(batch, from_dicom),
    }


def _png(path: Path, pixels: NDArray[np.uint8]) -> Path:
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels).save(out, "PNG")
    path.write_bytes(out.getvalue())
    return path


def reading_rates(ways: dict[str, Batch], count: int) -> dict[str, float]:
    """Images a processor second, batches of all ways in turns."""
    images, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    draws = np.random.default_rng(0)
    order = np.concatenate([draws.permutation(count) for _ in range(EPOCHS)])
    for start in range(0, len(order) - BATCH + 1, BATCH):
        numbers = order[start : start + BATCH]
        for name, way in ways.items():
            began = time.process_time()
            for _ in range(20 if name == "shard" else 1):  # too quick for the clock otherwise
                way(numbers)
                images[name] += BATCH
            seconds[name] += time.process_time() - began
    return {name: images[name] / seconds[name] for name in ways}


def show(runs: list[Preparation], rates: dict[str, float]) -> None:
    print("| files | workers | files/s | minutes | processor s | parent MiB | worker MiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for run in runs:
        print(
            f"| {run.files:,} | {run.jobs} | {run.rate:.1f} | {run.wall_seconds / 60:.1f} "
            f"| {run.processor_seconds:.0f} | {run.parent_mib:.0f} | {run.worker_mib:.0f} |"
        )
    print("\n| a batch read from | images/s | shard is faster by |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rates['shard'] / rate:,.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--images", type=int, default=600, help="of which batches are read")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--home", type=Path, help="where the archive goes; 3 GB for 5,000 files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.home) as name:
        home = Path(name)
        archive, part = home / "archive", home / "part"
        paths = write_archive(archive, counts_of(options.files))
        write_archive(part, counts_of(options.files // 5), seed=1)
        runs = [
            prepare(source, home / f"shard-{number}", jobs=jobs, px=options.px)
            for number, (source, jobs) in enumerate([(part, 2), (archive, 2), (archive, 1)])
        ]
        every = max(1, len(paths) // options.images)
        chosen = paths[::every][: options.images]
        (home / "pictures").mkdir()
        rates = reading_rates(readers(chosen, home / "pictures", options.px), len(chosen))
    show(runs, rates)
    if options.json:
        facts = {
            "mix": counts_of(options.files),
            "prepare": [asdict(run) | {"files_per_second": run.rate} for run in runs],
            "images_per_processor_second": rates,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
