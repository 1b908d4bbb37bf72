"""ViT-B/16 at 224 px, student, teacher and head, through real Flower processes.

    python benchmarks/large_state.py [--transports float32 delta16] [--teacher average] [--sites 2]
        [--rounds 1] [--home DIR]

The command is `simulate --engine processes` with phantoms, a batch of two images, one step a round
and no local views: what takes time and memory is the state, 737 MB as float32. Peaks are what the
kernel recorded (VmHWM) for each process below the command, the largest of a kind. A site's training
needs 4 GB, and sites train at once.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from core.phantoms import make_phantoms
from core.shards import write_shard
from server.history import read_history

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "ServerApp": r"serverapp",
    "SuperLink": r"superlink ",
    "SuperNode": r"supernode ",
    "ClientApp": r"clientapp|client\.launcher",
}
"""In this order: a SuperNode's command line names its SuperLink too."""
RECIPE = """\
name = "large-state"
[model]
backbone = "vit_base_patch16_224"
head_hidden = 2048
embedding_dim = 256
[views]
global_px = 224
local_views = 0
[memory]
entries_per_modality = 64
[optim]
batch_size = 2
[federation]
rounds = {rounds}
local_steps = 1
min_sites = {sites}
transport = "{transport}"
teacher = "{teacher}"
prototype_min_patients = 2
[evaluation]
every_rounds = 0
"""


class Family:
    """Peak memory of a process and of all that it starts, by kind."""

    def __init__(self, pid: int) -> None:
        self.known = {pid}
        self.peaks = dict.fromkeys(KINDS, 0)

    def look(self) -> None:
        """Note what the kernel has recorded so far."""
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError, ValueError):  # it may end while we look
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                pid = int(directory.name)
                if parent not in self.known and pid not in self.known:
                    continue
                self.known.add(pid)
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                command = re.sub(r"--superlink \S+", "", command)
                kinds = [kind for kind, words in KINDS.items() if re.search(words, command)]
                status = (directory / "status").read_text().partition("VmHWM:")[2]
                if kinds and status:
                    peak = int(status.split()[0]) * 1024
                    self.peaks[kinds[0]] = max(self.peaks[kinds[0]], peak)


def draw_sites(home: Path, count: int) -> None:
    for number in range(count):
        modality = ("ct", "us", "oct", "cxr")[number % 4]
        shard = make_phantoms(modality, patients=10, images_per_patient=1, px=64, seed=number)
        write_shard(home / "data" / f"hospital-{number}" / modality, shard)


def measure(home: Path, transport: str, options: argparse.Namespace) -> None:
    recipe, out = home / f"{transport}.toml", home / transport
    values = {"rounds": options.rounds, "sites": options.sites, "teacher": options.teacher}
    recipe.write_text(RECIPE.format(transport=transport, **values))
    command = [sys.executable, "-m", "server", "simulate", str(recipe), "--out", str(out)]
    command += ["--data", str(home / "data"), "--engine", "processes"]
    began = time.monotonic()
    with open(home / f"{transport}.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        family = Family(process.pid)
        while process.poll() is None:
            family.look()
            time.sleep(0.2)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit((home / f"{transport}.log").read_text()[-3000:])
    lines = read_history(out)
    assert all(o["outcome"] == "admitted" for line in lines for o in line["sites"].values())
    exchange = [sum(line["seconds"].values()) for line in lines]
    down, up = (lines[0][f"bytes_{way}"] / options.sites / 1e6 for way in ("down", "up"))
    peaks = " | ".join(f"{peak / 1e6:.0f}" for peak in family.peaks.values())
    rounds = ", ".join(f"{value:.0f}" for value in exchange)
    print(
        f"| {transport} | {down:.0f} | {up:.0f} | {rounds} | {seconds:.0f} | {peaks} |", flush=True
    )
    print(json.dumps([line["seconds"] for line in lines]), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transports", nargs="+", default=["float32", "delta16"])
    parser.add_argument("--teacher", default="average")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--home", type=Path, help="a directory on a disk with room")
    options = parser.parse_args()
    print(
        "| transport | down, MB | up, MB | seconds of each round | in all | "
        + " | ".join(f"{kind}, MB" for kind in KINDS)
        + " |\n|---|" + "---:|" * (4 + len(KINDS))
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.home) as home:
        draw_sites(Path(home), options.sites)
        for transport in options.transports:
            measure(Path(home), transport, options)


if __name__ == "__main__":
    main()
