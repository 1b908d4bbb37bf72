"""What record privacy costs in accuracy on real images: six arms, three seeds, one table.

Two hospitals share the training images of all seven modalities by patient (4,706 patients, 10,556
images at 64 px). Arms:
  random      the weights before anything is learnt
  init        pretrained on phantoms, which are public
  continued   from init, without privacy: a memory bank, KoLeo, all weights, batches of 56; as many
              images of the hospitals as in private.toml
  noiseless   configs/private.toml from init, with next to no noise: the method without its noise
  epsilon 8, 3, 1   the same with the least noise that keeps epsilon, at delta 1e-5

All training runs through `fedmermed-server`. Measured on the test split: AUROC of a linear
probe (strength chosen on val, class and mean patch tokens of the last three blocks), and of a
20-nearest-neighbour vote; colour fundus on its single-source images only, see real_images.py. A
seed fixes weights, views and phantoms; what privacy draws comes from the operating system, so that
private arms differ between runs.

Run: python benchmarks/private_utility.py --data DIR [--out runs/private_utility] [--seeds 0 1 2]
     [--arms random init ...] [--jobs 2]
It resumes after a kill. Prints the tables in Markdown.
"""

import argparse
import dataclasses
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_images import ROOT, prepare, run_all, toml_text
from scenario_measure import LAST_BLOCKS, NEIGHBOURS

from core.checkpoint import read_json, write_json
from core.config import load_recipe
from core.evaluate import auroc, extract, knn_scores, labelled_tasks, probe_scores
from core.export import Model, load_model
from core.modalities import MODALITIES, TITLES
from core.privacy.accounting import epsilon, noise_for, study_events
from core.shards import Shard, write_shard
from core.sites import open_sites

PRIVATE = ROOT / "configs" / "private.toml"
PRETRAIN = ("--steps", "200", "--phantoms", "500")
HOSPITALS = ("north", "south")
EPSILONS = {"epsilon 8": 8.0, "epsilon 3": 3.0, "epsilon 1": 1.0}
ARMS = ("random", "init", "continued", "noiseless", *EPSILONS)
UNTRAINED = ARMS[:2]
"""On the hospitals' images, at least."""
CONTINUED = {
    "memory": {"centred": True},
    "loss": {"koleo_weight": 0.02},
    "optim": {"batch_size": 56, "learning_rate": 0.0046, "ema_momentum": 0.95},
}
NEXT_TO_NOTHING = 1e-6


def share(out: Path) -> Path:
    """Write the two hospitals' shards once: every other patient's training images each."""
    for shards in open_sites(out / "data").values():
        for shard in shards:
            for number, hospital in enumerate(HOSPITALS):
                target = out / "hospitals" / hospital / shard.name
                if not target.exists():
                    write_shard(target, _part(shard, number))
    return out / "hospitals"


def _part(shard: Shard, number: int) -> Shard:
    of_training = np.unique(shard.patient[shard.split == "train"])
    rows = np.flatnonzero(np.isin(shard.patient, of_training[number :: len(HOSPITALS)]))
    return dataclasses.replace(
        shard, images=np.asarray(shard.images)[rows], modality=shard.modality[rows],
        patient=np.unique(shard.patient[rows], return_inverse=True)[1], label=shard.label[rows],
        split=shard.split[rows],
    )  # fmt: skip


def recipe_file(out: Path, arm: str, seed: int) -> Path:
    """The recipe of an arm."""
    values: dict[str, Any] = tomllib.loads(PRIVATE.read_text())
    values["model"]["init_file"] = str(start_file(out, seed))
    if arm == "random":
        values["seed"] = seed
        del values["model"]["init_file"]
    elif arm == "continued":
        del values["privacy"]
        values |= CONTINUED
        private, batch = load_recipe(PRIVATE), CONTINUED["optim"]["batch_size"]
        patients = private.federation.local_steps * private.privacy.expected_patients
        values["federation"]["local_steps"] = round(patients / batch)
    else:
        values["privacy"]["noise_multiplier"] = noise(out).get(arm, NEXT_TO_NOTHING)
    path = out / "recipes" / f"{arm}-{seed}.toml".replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml_text(values))
    return path


def noise(out: Path) -> dict[str, float]:
    """Arm -> noise multiplier of its gradients."""
    path = out / "noise.json"
    if not path.exists():
        recipe = load_recipe(PRIVATE)
        others = [e for e in study_events(recipe) if e.kind != "gradients"]
        rate, delta = recipe.privacy.sampling_rate, recipe.privacy.delta
        found = {
            a: noise_for(e, delta, rate, recipe.total_steps, others) for a, e in EPSILONS.items()
        }
        write_json(path, found)
    rows: dict[str, float] = read_json(path)
    return rows


def run_directory(out: Path, arm: str, seed: int) -> Path:
    """Where an arm's run of a seed lives."""
    return out / "runs" / f"{arm}-{seed}".replace(" ", "-")


def start_file(out: Path, seed: int) -> Path:
    """The backbone pretrained on phantoms."""
    return out / "starts" / f"{seed}.safetensors"


def pretraining(out: Path, seed: int) -> list[str]:
    """The command line that makes it."""
    words = [sys.executable, "-m", "server", "pretrain", str(PRIVATE), *PRETRAIN]
    return [*words, "--device", "cpu", "--seed", str(seed), str(start_file(out, seed))]


def federation(out: Path, arm: str, seed: int, hospitals: Path) -> list[str]:
    """The command line of an arm that learns from the hospitals."""
    return [
        sys.executable, "-m", "server", "simulate", str(recipe_file(out, arm, seed)),
        "--data", str(hospitals), "--seed", str(seed), "--out", str(run_directory(out, arm, seed)),
    ]  # fmt: skip


def trained(arm: str, out: Path, seed: int) -> Path:
    """What is measured of an arm."""
    if arm == "init":
        return start_file(out, seed)
    if arm == "random":
        return recipe_file(out, arm, seed)
    return run_directory(out, arm, seed) / "model.safetensors"


def measure(arm: str, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Modality -> probe and kNN AUROC on the test split; kept on disk."""
    path = out / "measured" / f"{arm}-{seed}.json".replace(" ", "-")
    if not path.exists():
        torch.set_num_threads(1)
        path.parent.mkdir(exist_ok=True)
        write_json(path, dict(_rows(load_model(trained(arm, out, seed)), out)))
    rows: dict[str, dict[str, float]] = read_json(path)
    return rows


def _rows(model: Model, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    shards = [shard for part in open_sites(out / "data").values() for shard in part]
    for task in labelled_tasks(shards):
        train, val, test = (task.labels(i) for i in (task.train, task.val, task.test))
        deep = [
            extract(
                model.backbone, task.shard.images[indices], task.name, model.px,
                last_blocks=LAST_BLOCKS,
            )
            for indices in (task.train, task.val, task.test)
        ]  # fmt: skip
        last = deep[0].shape[1] // LAST_BLOCKS
        probe = probe_scores(deep[0], train, deep[1], val, deep[2])
        vote = knn_scores(deep[0][:, -last:], train, deep[2][:, -last:], neighbours=NEIGHBOURS)
        yield task.name, {"probe_auroc": auroc(probe, test), "knn_auroc": auroc(vote, test)}


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
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "private_utility")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    out, seeds, arms = arguments.out.resolve(), arguments.seeds, arguments.arms
    prepare(arguments.data, out)
    hospitals = share(out)
    starts = [pretraining(out, seed) for seed in seeds if not start_file(out, seed).exists()]
    run_all(starts, arguments.jobs)
    run_all(
        [
            federation(out, arm, seed, hospitals)
            for arm in arms
            if arm not in UNTRAINED
            for seed in seeds
        ],
        arguments.jobs,
    )
    results: dict[str, dict[str, Any]] = {}
    pairs = [(arm, seed) for arm in arms for seed in seeds]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = pool.map(measure, *zip(*[(arm, out, seed) for arm, seed in pairs], strict=True))
        for (arm, seed), row in zip(pairs, rows, strict=True):
            results.setdefault(arm, {})[str(seed)] = row
    for arm in (arm for arm in EPSILONS if arm in arms):
        recipe = load_recipe(recipe_file(out, arm, seeds[0]))
        spent = epsilon(study_events(recipe), recipe.privacy.delta)
        print(f"{arm}: noise {recipe.privacy.noise_multiplier:g} clips, epsilon {spent:.2f}")
    for key in ("probe_auroc", "knn_auroc"):
        print(f"\n{key}\n\n{table(results, arms, key)}", flush=True)


if __name__ == "__main__":
    main()
