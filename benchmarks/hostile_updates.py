"""What one hostile site of six does to the global model, undefended and with each defence.

    OMP_NUM_THREADS=1 python benchmarks/hostile_updates.py --data DIR [--out DIR] [--seed 0]

Real images at 64 px, six hospitals of one to two modalities each, every modality but two at two of
them (patients apart); the real strategy and ClientApps in this process, a ViT of 0.2 million
parameters, four rounds of four steps. The site `lake` trains as all others do, and from round 2 on
its replies are changed on their way. Nobody is put in quarantine, so that the harm of all rounds is
seen.

Undefended is the weighted mean of whatever comes, without admission, as Flower's FedAvg does it
(with our weights). Distances are between students after the last round, in units of the distance
that honest training covered: 0 is the honest model, 1 is as far from it as the untrained one. AUROC
is the kNN vote's on the validation images, mean over the seven modalities.

Also: norms and cosines of honest sites, here and with one modality a site (`--honest`, more
rounds). Finished runs are kept, so that a stopped table goes on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from flwr.app import Message
from hostile_faults import KINDS, Fault

from core.checkpoint import load_arrays, read_json, write_json
from core.config import Recipe, recipe_from_json
from core.export import export_teacher, load_model
from core.shards import Shard, write_shard
from core.site_round import knn_auroc
from core.sites import open_site, open_sites
from core.wire import (
    COUNTS,
    PROTOTYPES,
    STUDENT,
    TEACHER,
    GlobalState,
    Prototypes,
    SiteUpdate,
    take,
)
from server.engines import load_client_app
from server.grid import InProcessGrid
from server.history import open_run, read_history
from server.screening import Screened
from server.study import run_study

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "lake"
ROUNDS = 4
MIXED = {
    "coast": (("dermatology", 0), ("cfp", 0)),
    "east": (("pathology", 0), ("cfp", 1)),
    "lake": (("dermatology", 1), ("oct", 0)),
    "north": (("ct", None), ("cxr", 0)),
    "south": (("cxr", 1), ("us", None)),
    "west": (("pathology", 1), ("oct", 1)),
}
"""Site -> modalities, and which half of the patients; None: all."""
SINGLE = {m: ((m, None),) for m in ("ct", "cxr", "us", "pathology", "cfp", "oct", "dermatology")}
DEFENCES = ("undefended", "norm_bound", "trimmed_mean")
REJECTED = ("nan", "replay", "old_round", "oversized", "malformed")
"""By admission, before any average: the third column repeats the second."""


def make_recipe(seed: int, rounds: int, robust: str) -> Recipe:
    table = {
        "name": "hostile",
        "seed": seed,
        "model": {
            "options": {"patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3},
            "head_hidden": 128,
            "embedding_dim": 32,
        },
        "views": {"global_area": [0.3, 1.0], "local_area": [0.1, 0.4], "local_views": 2},
        "memory": {"centred": True, "entries_per_modality": 128},
        "loss": {"koleo_weight": 0.02},
        "optim": {"batch_size": 8, "learning_rate": 0.032, "ema_momentum": 0.9},
        "federation": {
            "rounds": rounds, "local_steps": 4, "min_sites": 5, "robust": robust,
            "quarantine_after": 0, "prototypes_per_modality": 8, "prototype_min_patients": 5,
        },
        "evaluation": {"every_rounds": 0, "max_images": 150},
    }  # fmt: skip
    return recipe_from_json(json.dumps(table), "benchmark")


def write_sites(data: Path, out: Path, sites: dict[str, Any]) -> list[Path]:
    """Site files and shards; half a modality is every other patient."""
    shards = {
        modality: next(s for s in found if s.classes[modality])
        for modality, found in open_sites(data).items()
    }
    files = []
    for name, parts in sites.items():
        for modality, half in parts:
            target = out / name / "data" / modality
            if not target.exists():
                write_shard(target, _half(shards[modality], half))
        file = out / name / "site.toml"
        if not file.exists():
            file.write_text(
                f"name = '{name}'\nshards = ['data']\nthreads = 1\ndevice = 'cpu'\n"
                "[policy]\nmin_patients_per_prototype = 5\n"
            )
        files.append(file)
    return files


def _half(shard: Shard, half: int | None) -> Shard:
    if half is None:
        return shard
    held = np.flatnonzero(shard.patient % 2 == half)
    return dataclasses.replace(
        shard, images=np.asarray(shard.images)[held], modality=shard.modality[held],
        patient=shard.patient[held], label=shard.label[held], split=shard.split[held],
    )  # fmt: skip


class Grid(InProcessGrid):
    """Changes the train replies of one site."""

    def __init__(self, files: list[Path], fault: Callable[[Message, Message], Message] | None):
        super().__init__(load_client_app(), [{"site": str(file)} for file in files])
        places = zip(files, self.get_node_ids(), strict=True)
        self.hostile = {n for f, n in places if f.parent.name == HOSTILE}
        self.fault = fault

    def deliver(self, message: Message) -> Message | None:
        """Call the ClientApp; the hostile site's answer is changed."""
        reply = super().deliver(message)
        here = message.metadata.dst_node_id in self.hostile
        if self.fault and here and message.metadata.message_type == "train" and reply:
            return self.fault(message, reply)
        return reply


def judge_nothing(
    reply: Message, *, round_number: int, **_: Any
) -> tuple[SiteUpdate | None, dict[str, Any]]:
    """Take what comes: averaging without admission."""
    if reply.has_error():  # an honest site that was sent a broken model
        return None, {"outcome": "error", "reason": reply.error.reason}
    arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
    metrics = dict(reply.content["metrics"])
    counts = {n.partition("/")[2]: v for n, v in metrics.items() if n.startswith("num_examples/")}
    prototypes = Prototypes(take(arrays, PROTOTYPES), take(arrays, COUNTS))
    update = SiteUpdate(
        round_number=round_number, student=take(arrays, STUDENT), teacher=take(arrays, TEACHER),
        prototypes=prototypes, num_examples=counts, metrics={},
    )  # fmt: skip
    return update, {"outcome": "admitted", "num_examples": counts, "metrics": {}}


def screen_nothing(recipe: Any, state: Any, lines: Any, updates: Any, outcomes: Any) -> Screened:
    return Screened(dict(updates), [])


def run(path: Path, recipe: Recipe, files: list[Path], kind: str, *, defended: bool) -> None:
    """One study to its end, or to the round that dies."""
    fault = Fault(KINDS[kind][1]) if kind in KINDS else None
    chosen = [f for f in files if kind != "without" or f.parent.name != HOSTILE]
    open_run(path, recipe)
    grid = Grid(chosen, fault)
    if defended:
        run_study(grid, recipe, path)
        return
    with (
        mock.patch("server.intake.judge", judge_nothing),
        mock.patch("server.strategy.screen", screen_nothing),
    ):
        run_study(grid, recipe, path)


def figures(path: Path, recipe: Recipe, sites: Path, honest: GlobalState | None) -> dict[str, Any]:
    """Distance and AUROC of a run's last state, and what its history says of the hostile site."""
    lines = read_history(path)
    arrays, _ = load_arrays(path / f"round-{recipe.federation.rounds:04d}.safetensors")
    start, _ = load_arrays(path / "round-0000.safetensors")
    state, initial = GlobalState.from_arrays(arrays), GlobalState.from_arrays(start)
    honest = honest or state
    outcomes = [line["sites"].get(HOSTILE, {"outcome": "absent"}) for line in lines[1:]]
    flagged = [{o["site"] for o in line.get("outliers", ())} for line in lines[1:]]
    finite = all(np.isfinite(a).all() for a in arrays.values())
    return {
        "distance": distance(state, honest) / distance(honest, initial) if finite else None,
        "auroc": _auroc(path, recipe, state, sites) if finite else None,
        "rejected": sum(o["outcome"] == "rejected" for o in outcomes),
        "cut": sum("scaled_by" in o for o in outcomes),
        "flagged": sum(HOSTILE in names for names in flagged),
        "others_flagged": sum(len(names - {HOSTILE}) for names in flagged),
        "prototypes": _share_of_prototypes(arrays),
        "reason": next((o["reason"] for o in outcomes if o["outcome"] == "rejected"), ""),
    }


def distance(one: GlobalState, other: GlobalState) -> float:
    return float(
        np.sqrt(sum(
            np.square(a.astype(np.float64) - other.student[n]).sum() for n, a in one.student.items()
        ))
    )  # fmt: skip


def _auroc(path: Path, recipe: Recipe, state: GlobalState, sites: Path) -> float:
    export_teacher(recipe, state, path / "model.safetensors")
    backbone = load_model(path / "model.safetensors").backbone
    scores: dict[str, list[float]] = {}
    for name in MIXED:
        for key, value in knn_auroc(recipe, backbone, open_site(sites / name / "data")).items():
            scores.setdefault(key, []).append(value)
    return float(np.mean([np.mean(values) for values in scores.values()]))


def _share_of_prototypes(arrays: dict[str, Any]) -> float | None:
    """Of the merged prototypes of its modalities, how many lie nearest to one of the hostile's."""
    mine, all_of_them = 0, 0
    for modality, _ in MIXED[HOSTILE]:
        given = [
            (name.split("/")[1], rows)
            for name, rows in arrays.items()
            if name.startswith("site_prototypes/") and name.endswith(f"/{modality}")
        ]
        for row in arrays.get(f"prototypes/{modality}", ()):
            nearest = max(given, key=lambda item: float((item[1] @ row).max()))
            mine, all_of_them = mine + (nearest[0] == HOSTILE), all_of_them + 1
    return mine / all_of_them if all_of_them else None


def measured(out: Path, files: list[Path], seed: int, kind: str, defence: str) -> dict[str, Any]:
    """Run once and keep the figures."""
    file = out / f"{kind}-{defence}-{seed}.json"
    if file.exists():
        found: dict[str, Any] = read_json(file)
        return found
    path, began = out / "runs" / f"{kind}-{defence}-{seed}", time.process_time()
    robust = "none" if defence == "undefended" else defence
    recipe = make_recipe(seed, ROUNDS, robust)
    try:
        run(path, recipe, files, kind, defended=defence != "undefended")
    except Exception as error:
        row: dict[str, Any] = {"died": f"{type(error).__name__}: {error}"[:200]}
    else:
        reference = out / "runs" / f"honest-undefended-{seed}" / f"round-{ROUNDS:04d}.safetensors"
        honest = GlobalState.from_arrays(load_arrays(reference)[0])
        row = figures(path, recipe, out / "sites", honest)
    row["cpu_seconds"] = time.process_time() - began
    write_json(file, row)
    return row


def cell(row: dict[str, Any]) -> str:
    if "died" in row:
        return f"run dies ({row['died'].partition(':')[0]})"
    if row["distance"] is None:
        return "model is NaN"
    parts = [f"{row['distance']:.3g}, {row['auroc']:.3f}"]
    for word in ("rejected", "cut", "flagged"):
        if row[word]:
            parts.append(f"{word} {row[word]}")
    if row["others_flagged"]:
        parts.append(f"others flagged {row['others_flagged']}")
    return "; ".join(parts)


def honest_spread(out: Path, files: list[Path], seed: int, rounds: int, label: str) -> str:
    """Norm ratios and cosines of honest sites over a study: lowest, quantiles, highest."""
    path = out / "runs" / f"spread-{label}-{seed}"
    recipe = make_recipe(seed, rounds, "norm_bound")
    run(path, recipe, files, "honest", defended=True)
    outcomes = [o for line in read_history(path) for o in line["sites"].values()]
    cells = []
    for figure in ("norm_ratio", "cosine"):
        values = np.array([o[figure] for o in outcomes if o.get(figure) is not None])
        cells += [f"{v:.2f}" for v in np.quantile(values, (0, 0.01, 0.5, 0.99, 1))]
    cut = sum("scaled_by" in o for o in outcomes)
    flags = sum(len(line["outliers"]) for line in read_history(path))
    return f"| {label} | {len(outcomes)} | " + " | ".join(cells) + f" | {cut} | {flags} |"


def print_spread(data: Path, out: Path, seed: int, rounds: int) -> None:
    print("| sites | updates | ratio: least | 1 % | median | 99 % | most | cosine: least | 1 % "
          "| median | 99 % | most | cut | flagged |\n|---|" + "---:|" * 13)  # fmt: skip
    for label, where, sites in (
        ("two modalities", "sites", MIXED), ("one modality", "single", SINGLE),
    ):  # fmt: skip
        files = write_sites(data, out / where, sites)
        print(honest_spread(out, files, seed, rounds, label), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hostile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--honest", type=int, default=12, help="rounds of the honest sites' spread; 0: none"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, seed, began = options.out.resolve(), options.seed, time.process_time()
    files = write_sites(options.data, out / "sites", MIXED)
    if options.honest:
        print_spread(options.data, out, seed, options.honest)
    print("\n| `lake` sends | " + " | ".join(DEFENCES) + " |\n|---|" + "---|" * len(DEFENCES))
    for kind in ("honest", "without", *options.kinds):
        title = {"honest": "honest updates", "without": "nothing: it is not there"}.get(kind)
        defences = [d for d in DEFENCES if kind not in REJECTED or d != "trimmed_mean"]
        cells = [cell(measured(out, files, seed, kind, d)) for d in defences]
        print(f"| {title or KINDS[kind][0]} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.process_time() - began:.0f} CPU-seconds in this call")


if __name__ == "__main__":
    main()
