"""What the federation is worth on real images: seven ways to get features, three seeds, one table.

Arms, all with the recipe's backbone and, where they train on real images, the same number of views:
  random      weights as they are drawn
  init        the weights before round 1: pretrained on phantoms, no real image seen
  local       each hospital alone, as many steps as in the federation; measured on its own modality
  federation  the recipe
  pooled      all images on one machine, one batch of all modalities a step, the same learning rate
  frozen      the federation with a teacher that stays as it began, measured on the student: what
              distillation alone gives
  pixels      the image shrunk to 16 x 16 pixels, without a network
and, to choose between ways of federating:
  refilled    the memory bank filled anew at every round's start, instead of kept
  rebuild     the server continues the teacher's average from the students, instead of the sites'

Measured on the test split: AUROC of a linear probe (strength chosen on val, class and mean patch
tokens of the last three blocks) and accuracy of a 20-nearest-neighbour vote. Colour fundus is
measured on its single-source images only, because class and source are confounded in the others.

Run: python benchmarks/seven_sites.py --data DIR [--out runs/seven_sites] [--seeds 0 1 2] [--jobs 2]
     [--arms random federation ...]
It resumes after a kill; each job is pinned to one processor, so a seed gives the same bits again.
Adds to benchmarks/seven_sites.json and prints the tables in Markdown.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

from core.backbone import BACKBONE
from core.checkpoint import load_arrays, read_json, write_json
from core.config import load_recipe
from core.evaluate import (
    Features,
    Task,
    extract,
    knn_scores,
    labelled_tasks,
    measures,
    probe_scores,
)
from core.export import load_model
from core.modalities import MODALITIES, TITLES
from core.shards import Shard, write_shard
from core.sites import open_sites
from core.wire import GlobalState

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "seven_sites.toml"
ARMS = ("random", "init", "local", "federation", "pooled", "frozen", "pixels")
CHOICES = ("refilled", "rebuild")
UNTRAINED = ("random", "init", "pixels")
RESULTS = ROOT / "benchmarks" / "seven_sites.json"
LAST_BLOCKS, NEIGHBOURS = 3, 20


def prepare(data: Path, out: Path) -> dict[str, Path]:
    """Write the hospitals' shards once; labels of confounded fundus images are dropped."""
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


def start_file(out: Path, seed: int) -> Path:
    """The weights before round 1: the federation's own start, which all arms of a seed share."""
    return run_directory(out, "federation", seed) / "round-0000.safetensors"


def recipe_file(out: Path, arm: str, seed: int, num_sites: int) -> Path:
    """The recipe of an arm, derived from the study's."""
    table: dict[str, Any] = tomllib.loads(RECIPE.read_text())
    if arm != "federation":
        table["model"] |= {"phantom_steps": 0, "init_file": str(start_file(out, seed))}
    optim, federation = table.setdefault("optim", {}), table.setdefault("federation", {})
    if arm in ("local", "pooled"):
        federation["min_sites"] = 1
    if arm == "pooled":  # one batch of all modalities; the rate is for 256 images, so it is divided
        optim["batch_size"] *= num_sites
        optim["learning_rate"] /= num_sites
    if arm == "frozen":
        optim["ema_momentum"] = 1.0
    if arm == "refilled":
        table.setdefault("memory", {})["at_round_start"] = "refilled"
    if arm == "rebuild":
        federation["teacher"] = "rebuild"
    path = out / "recipes" / f"{arm}-{seed}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml_text(table))
    return path


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


def commands(out: Path, arm: str, seed: int, sites: dict[str, Path]) -> list[list[str]]:
    """Commands of an arm and seed: one federation, or for `local` one a hospital."""
    recipe = recipe_file(out, arm, seed, len(sites))
    runs = {"all": sites}
    if arm == "local":
        runs = {name: {name: path} for name, path in sites.items()}
    result = []
    for label, chosen in runs.items():
        data = out / "sites" / (arm if label == "all" else f"{arm}-{label}")
        if arm == "pooled":  # one site that holds everybody's shards
            links = {
                data / "pooled" / shard.name: shard for p in sites.values() for shard in p.iterdir()
            }
        else:
            links = {data / name: path for name, path in chosen.items()}
        for link, target in links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(target.resolve(), target_is_directory=True)
        result.append([
            sys.executable, "-m", "server", "simulate", str(recipe), "--data", str(data),
            "--seed", str(seed), "--out", str(run_directory(out, arm, seed, label)),
        ])  # fmt: skip
    return result


def run_directory(out: Path, arm: str, seed: int, label: str = "all") -> Path:
    """Where an arm's run of a seed lives."""
    return out / "runs" / f"{arm}-{label}-{seed}"


def run_all(commands: Sequence[list[str]], jobs: int) -> None:
    """Run commands `jobs` at a time, each pinned to a processor of its own."""
    processors: Queue[int] = Queue()
    for processor in itertools.islice(sorted(os.sched_getaffinity(0)), jobs):
        processors.put(processor)

    def run(command: list[str]) -> None:
        processor = processors.get()
        try:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                ["taskset", "-c", str(processor), *command],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            print("done:", Path(command[-1]).name, flush=True)
        finally:
            processors.put(processor)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def features_of(arm: str, out: Path, seed: int, task: Task) -> tuple[Any, Any]:
    """Features of the three splits for the probe and for the vote."""
    splits = (task.train, task.val, task.test)
    images = [task.shard.images[indices] for indices in splits]
    if arm == "pixels":
        small = [_thumbnails(part) for part in images]
        return small, small
    if arm == "random":
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            table = tomllib.loads(RECIPE.read_text()) | {"seed": seed}
            table["model"]["phantom_steps"] = 0
            file.write(toml_text(table))
            file.flush()
            model = load_model(Path(file.name))
    elif arm == "init":
        model = load_model(start_file(out, seed))
    else:
        label = task.name if arm == "local" else "all"
        run = run_directory(out, arm, seed, label)
        model = load_model(run / "model.safetensors")
        if arm == "frozen":  # its teacher is what it was before round 1
            model.backbone.load_state_dict(_student(run))
    deep = [
        extract(model.backbone, part, task.name, model.px, last_blocks=LAST_BLOCKS)
        for part in images
    ]
    last = deep[0].shape[1] // LAST_BLOCKS
    return deep, [part[:, -last:] for part in deep]


def _student(run: Path) -> dict[str, torch.Tensor]:
    arrays, _ = load_arrays(sorted(run.glob("round-*.safetensors"))[-1])
    student = GlobalState.from_arrays(arrays).student
    return {
        name.removeprefix(BACKBONE): torch.from_numpy(array)
        for name, array in student.items()
        if name.startswith(BACKBONE)
    }


def _thumbnails(images: Any) -> Features:
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    small: Features = torch.nn.functional.interpolate(pixels, (16, 16), mode="area").numpy()
    return small.reshape(len(small), -1)


def measure(arm: str, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Modality -> probe AUROC and kNN accuracy on the test split."""
    rows = {}
    shards = [shard for part in open_sites(out / "data").values() for shard in part]
    for task in labelled_tasks(shards):
        deep, last = features_of(arm, out, seed, task)
        train, val, test = (task.labels(i) for i in (task.train, task.val, task.test))
        probe = measures(probe_scores(deep[0], train, deep[1], val, deep[2]), test)
        vote = measures(knn_scores(last[0], train, last[2], neighbours=NEIGHBOURS), test)
        rows[task.name] = {"probe_auroc": probe["auroc"], "knn_accuracy": vote["accuracy"]}
        rows[task.name] |= {"knn_auroc": vote["auroc"]}
    return rows


def measured(arm: str, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """As `measure`, kept on disk, so that a stopped comparison goes on."""
    path = out / "measured" / f"{arm}-{seed}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.set_num_threads(1)
        write_json(path, measure(arm, out, seed))
    rows: dict[str, dict[str, float]] = read_json(path)
    return rows


def table(results: dict[str, dict[str, Any]], arms: Sequence[str], key: str) -> str:
    """Markdown: a row a modality, a column an arm, mean over seeds and largest distance from it."""
    arms = [arm for arm in arms if arm in results]
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    names = [m for m in MODALITIES if m in next(iter(results[arms[0]].values()))]

    def cell(arm: str, chosen: Sequence[str]) -> str:
        values = [float(np.mean([rows[m][key] for m in chosen])) for rows in results[arm].values()]
        spread = f" ± {np.max(np.abs(values - np.mean(values))):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"

    for title, chosen in {**{TITLES[m]: [m] for m in names}, "**mean**": names}.items():
        lines.append(f"| {title} | " + " | ".join(cell(arm, chosen) for arm in arms) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seven_sites")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=[*ARMS, *CHOICES])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    out, seeds, arms = arguments.out.resolve(), arguments.seeds, arguments.arms
    sites = prepare(arguments.data, out)
    trained = [arm for arm in arms if arm not in UNTRAINED]
    if trained or "init" in arms:
        first = [c for s in seeds for c in commands(out, "federation", s, sites)]
        run_all(first, arguments.jobs)
    later = [arm for arm in trained if arm != "federation"]
    run_all(
        [c for s in seeds for arm in later for c in commands(out, arm, s, sites)], arguments.jobs
    )
    recipe = hashlib.sha256(load_recipe(RECIPE).to_json().encode()).hexdigest()
    facts: dict[str, Any] = {"recipe_sha256": recipe, "torch": torch.__version__}
    results: dict[str, dict[str, Any]] = {}
    if (
        RESULTS.exists()
        and (before := read_json(RESULTS))["recipe_sha256"] == facts["recipe_sha256"]
    ):
        results = before["results"]
    pairs = [(arm, seed) for arm in arms for seed in (seeds if arm != "pixels" else seeds[:1])]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = pool.map(measured, *zip(*[(arm, out, seed) for arm, seed in pairs], strict=True))
        for (arm, seed), row in zip(pairs, rows, strict=True):
            results.setdefault(arm, {})[str(seed)] = row
            write_json(RESULTS, facts | {"results": results})
    tables: list[Sequence[str]] = [ARMS]
    if any(arm in results for arm in CHOICES):
        tables.append(("federation", *CHOICES))
    for chosen in tables:
        for key in ("probe_auroc", "knn_accuracy"):
            print(f"\n{key}\n\n{table(results, chosen, key)}", flush=True)


if __name__ == "__main__":
    main()
