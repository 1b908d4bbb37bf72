"""Damaged and hostile files against the whole of `fedmermed-site prepare`.

First the crafted files of hostile_files.py, each with the outcomes that are right for it; then
batches of mutated files (mutations.py) of every kind we read, until --files or --minutes are over.
Each batch is one real command with workers of its own, and a few good files lie in it. After each:
- the command ended by itself, with status 0 and no traceback;
- every file is counted once, with pictures or with a reason, and the good ones gave pictures;
- no process had more memory than a worker may have, or is left; no file is in the working
  directory that was not there before;
- no wait is left unexplained: a second a file and the time limits of those that took too long.
A batch that fails one of these stays in --home for a closer look, and the exit status is 1.

Run: python benchmarks/fuzz_readers.py --data DIR [--minutes 20] [--files 10000] [--seed 0]
     [--jobs 2] [--batch 500] [--json OUT] [--home DIR]
DIR: real files to begin from, such as the DICOM files that come with pydicom; whatever lies in it.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dicom_bytes import dicom
from hostile_files import PICTURE, good_pixels, write_hostile
from memory import Watch
from mutations import mutate
from seeds import load_seeds

from client.ingest.types import Reason
from core.shards import open_shard

FOLDERS = ("", "ct", "cxr", "us", "pathology", "cfp", "oct", "dermatology")
POLICIES = ("accept", "mask", "skip")
MEMORY_GIB = 2
TIMEOUT_S = 20
GOOD = 4
"""Good files in every batch."""


@dataclass
class Tally:
    """What has been seen so far."""

    reasons: Counter[str] = field(default_factory=Counter)
    files: int = 0
    batches: int = 0
    seconds: float = 0.0
    worker_mib: float = 0.0
    """most resident memory of a worker"""
    parent_mib: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One finished command."""

    status: int
    seconds: float
    watch: Watch
    output: str
    report: dict[str, Any]
    rejected: dict[str, str]
    """absolute path, as rejected.csv writes it -> name of the reason"""

    def reasons(self) -> Counter[str]:
        """Name of a reason -> files that the report counts under it."""
        rows = self.report.get("rejected", [])
        return Counter({Reason(row["reason"]).name: row["files"] for row in rows})


def prepare(home: Path, *options: str, jobs: int, patience_s: float) -> Run:
    """Run the command on HOME/source and read what it reports."""
    source, target = home / "source", home / "shard"
    words = ["prepare", str(source), str(target), "--secret", str(home / "secret")]
    words += ["--jobs", str(jobs), "--memory", str(MEMORY_GIB), "--timeout", str(TIMEOUT_S)]
    words += ["--px", "32", "--duplicates", "keep", "--frames", "4", *options]
    (home / "cwd").mkdir()
    began = time.monotonic()
    with open(home / "output.txt", "w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "client", *words],
            cwd=home / "cwd",
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(process.pid)
        while process.poll() is None and time.monotonic() - began < patience_s:
            watch.look()
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if process.poll() is None:
            process.kill()
        status = process.wait()
    text = (home / "output.txt").read_text(errors="replace")
    report, rejected = {}, {}
    if status == 0:
        there = target.with_name("shard.report")
        report = json.loads((there / "report.json").read_text())
        with open(there / "rejected.csv", encoding="utf-8", newline="") as file:
            rejected = {row["path"]: Reason(row["reason"]).name for row in csv.DictReader(file)}
    return Run(status, seconds, watch, text, report, rejected)


def problems(run: Run, files: int, good: list[str], home: Path, patience_s: float) -> list[str]:
    """What a finished batch did that it must not do."""
    found = []
    if run.seconds >= patience_s:
        found.append(f"did not end within {patience_s:.0f} s")
    if run.status != 0 or "Traceback" in run.output:
        found.append(f"status {run.status}: {run.output[-2000:]}")
    if run.status == 0:
        counted, unused = run.report["files"], run.reasons().total()
        if not files == counted["all"] == counted["used"] + unused:
            found.append(f"{files} files, in the report {counted}, {unused} with a reason")
        if len(run.rejected) != unused:
            found.append(f"{len(run.rejected)} lines in rejected.csv, not {unused}")
        if missed := [name for name in good if shown(home, name) in run.rejected]:
            found.append(f"good files rejected: {missed}")
        images = len(open_shard(home / "shard", verify=True).images)
        if images != sum(sum(splits.values()) for splits in run.report["pictures"].values()):
            found.append(
                f"the shard holds {images} pictures, in the report {run.report['pictures']}"
            )
    if run.watch.worker_mib > MEMORY_GIB * 1024:
        found.append(f"a worker held {run.watch.worker_mib:.0f} MiB")
    if left := run.watch.left():
        found.append(f"processes are left: {left}")
    if litter := list((home / "cwd").iterdir()):
        found.append(f"left in the working directory: {litter}")
    late = run.reasons()[Reason.TIMED_OUT.name]
    if run.seconds > 30 + files + late * (TIMEOUT_S + 5):
        found.append(f"{run.seconds:.0f} s for {files} files, {late} of which timed out")
    return found


def shown(home: Path, name: str) -> str:
    """A file's path as rejected.csv writes it."""
    return os.fsencode(home / "source" / name).decode("utf-8", "backslashreplace")


def crafted_batch(tally: Tally, home: Path, jobs: int) -> list[str]:
    """The crafted files: each must have one of its right outcomes."""
    (home / "source").mkdir()
    right = write_hostile(home / "source")
    patience_s = 60.0 + len(right) * (TIMEOUT_S + 5)
    options = ("--modality", "ct", "--burned-in", "accept")
    run = prepare(home, *options, jobs=jobs, patience_s=patience_s)
    good = [name for name, outcomes in right.items() if outcomes == (PICTURE,)]
    found = problems(run, len(right), good, home, patience_s)
    for name, outcomes in right.items():
        outcome = run.rejected.get(shown(home, name), PICTURE)
        if run.status == 0 and outcome not in outcomes:
            found.append(f"{name!r}: {outcome or 'gave pictures'}, expected {outcomes}")
    add(tally, run, len(right))
    return found


def mutated_batch(
    tally: Tally, home: Path, seeds: list[bytes], count: int, seed: int, jobs: int
) -> list[str]:
    """So many mutated files and a few good ones, in folders that name a modality or do not."""
    source = home / "source"
    draws = np.random.default_rng([seed, tally.batches])
    for folder in FOLDERS:
        (source / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        data = mutate(seeds, int(draws.integers(len(seeds))), draws)
        folder = FOLDERS[int(draws.integers(len(FOLDERS)))]
        (source / folder / f"{number:05d}").write_bytes(data)
    good = [f"good-{number}.dcm" for number in range(GOOD)]
    for name in good:
        (source / name).write_bytes(dicom(good_pixels()))
    patience_s = 120.0 + count * TIMEOUT_S
    policy = POLICIES[tally.batches % len(POLICIES)]
    run = prepare(home, "--burned-in", policy, jobs=jobs, patience_s=patience_s)
    add(tally, run, count + GOOD)
    return problems(run, count + GOOD, good, home, patience_s)


def add(tally: Tally, run: Run, files: int) -> None:
    tally.batches += 1
    tally.files += files
    tally.seconds += run.seconds
    tally.worker_mib = max(tally.worker_mib, run.watch.worker_mib)
    tally.parent_mib = max(tally.parent_mib, run.watch.parent_mib)
    tally.reasons += run.reasons()
    tally.reasons[PICTURE] += run.report["files"]["used"] if run.report else 0


def table(tally: Tally) -> str:
    """The counts as Markdown."""
    lines = ["| outcome | files |", "|---|---:|"]
    names = {PICTURE: "gave pictures"} | {reason.name: str(reason) for reason in Reason}
    lines += [f"| {names[name]} | {count:,} |" for name, count in tally.reasons.most_common()]
    lines.append(f"| **all** | **{tally.files:,}** |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of real files")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--home", type=Path, help="where batches are written")
    parser.add_argument("--no-crafted", action="store_true")
    options = parser.parse_args()
    seeds, tally, began = load_seeds(options.data), Tally(), time.monotonic()
    while tally.files < options.files and time.monotonic() - began < options.minutes * 60:
        home = Path(tempfile.mkdtemp(prefix=f"fuzz-{tally.batches}-", dir=options.home))
        if tally.batches == 0 and not options.no_crafted:
            found = crafted_batch(tally, home, options.jobs)
        else:
            count = min(options.batch, max(options.files - tally.files - GOOD, 1))
            found = mutated_batch(tally, home, seeds, count, options.seed, options.jobs)
        for text in found:
            print(f"{home}: {text}", flush=True)
        tally.failures += found
        if not found:
            shutil.rmtree(home)
        print(f"{tally.files:,} files, {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(tally))
    rate = tally.files / tally.seconds
    print(
        f"\n{tally.batches} batches from {len(seeds)} seeds, {rate:.1f} files/s; at most "
        f" {tally.worker_mib:.0f} MiB in a worker (limit {MEMORY_GIB * 1024}), "
        f"{tally.parent_mib:.0f} MiB in the parent; {len(tally.failures)} failures"
    )
    if options.json:
        options.json.write_text(json.dumps(vars(tally), indent=1) + "\n")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
