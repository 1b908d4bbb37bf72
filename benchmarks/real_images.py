"""Real images for the benchmarks: hospitals' shards, a recipe's text, and commands in parallel."""

import dataclasses
import itertools
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, Final

import numpy as np

from core.shards import Shard, write_shard
from core.sites import open_sites

ROOT: Final = Path(__file__).resolve().parents[1]
RECIPE: Final = ROOT / "configs" / "seven_sites.toml"
"""One hospital a modality, 64 px."""
PLAIN_VIT: Final[dict[str, Any]] = {
    "backbone": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "phantom_steps": 0,
}
"""The recipe's blocks on patches of pixels, drawn at random: `[model]` of benchmarks that look at
patches or compare with what has no convolutions."""


def prepare(data: Path, out: Path) -> dict[str, Path]:
    """Write the hospitals' shards once.

    Colour fundus keeps labels on the images of one source alone: in the others, class and source
    are confounded.
    """
    sites = open_sites(data)
    for name, shards in sites.items():
        for shard in shards:
            target = out / "data" / name / shard.name
            if not target.exists():
                write_shard(target, _single_source(shard, data) if name == "cfp" else shard)
    return {name: out / "data" / name for name in sites}


def _single_source(shard: Shard, data: Path) -> Shard:
    (file,) = data.glob("cfp*.npz")
    with np.load(file, allow_pickle=False) as arrays:
        source = np.concatenate([arrays[f"{split}_source"] for split in ("train", "val", "test")])
    kept = np.where(source == "odir_like", shard.label, -1)
    held = np.unique(kept[kept >= 0])
    label = np.full(len(kept), -1)
    for new, old in enumerate(held):
        label[kept == old] = new
    names = tuple(shard.classes["cfp"][old] for old in held)
    return dataclasses.replace(shard, label=label, classes={"cfp": names})


def toml_text(table: dict[str, Any]) -> str:
    """Enough TOML for a recipe: scalars, arrays, inline tables, one level of sections."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{k} = {text(v)}" for k, v in value.items()) + " }"
        return json.dumps(value)

    top = [f"{k} = {text(v)}" for k, v in table.items() if not isinstance(v, dict)]
    sections = [
        f"[{name}]\n" + "\n".join(f"{k} = {text(v)}" for k, v in section.items())
        for name, section in table.items()
        if isinstance(section, dict)
    ]
    return "\n".join([*top, *sections]) + "\n"


def run_all(commands: Sequence[list[str]], jobs: int, *, pinned: bool = True) -> None:
    """Run commands `jobs` at a time, each pinned to a processor of its own or free to use all."""
    processors: Queue[int] = Queue()
    for processor in itertools.islice(sorted(os.sched_getaffinity(0)), jobs):
        processors.put(processor)

    def run(command: list[str]) -> None:
        processor = processors.get()
        try:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                ["taskset", "-c", str(processor), *command] if pinned else command,
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            print("done:", Path(command[-1]).name, flush=True)
        finally:
            processors.put(processor)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))
