"""What crosses the wire a round and site, what half precision costs in accuracy, and in the model.

    python benchmarks/wire.py bytes                       bytes, and the error of delta16
    python benchmarks/wire.py effect --data DIR [--out runs/wire] [--seeds 0 1 2]

bytes: the records that server and site build, for the initial weights of three recipes and an
update that moves every tensor by a thousandth of its norm; 64 prototypes of one modality up, of
seven down. No file of pretrained weights is read.
effect: three of the hospitals of configs/seven_sites.toml with their real images (seven_sites.py
says which), 2 blocks of width 96, 20 rounds of 3 steps, four ways of sending. Measured: AUROC of
the recipe's kNN vote on the validation split, on which nothing trains, and how far the last student
is from that of float32, in units of the way which that one went. Resumes after a kill.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from seven_sites import prepare

from core.backbone import Network
from core.checkpoint import Arrays
from core.config import EvaluationConfig, Recipe, load_recipe
from core.modalities import MODALITIES
from core.site_round import knn_auroc
from core.sites import open_site
from core.train import load_network
from core.transport import Transport, pack_state, pack_update, unpack_state, unpack_update
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.engines import run_in_process
from server.history import open_run, read_history
from server.replies import count_bytes, to_record
from server.simulate import write_site_file
from server.study import initial_state

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[Transport, str]] = {
    "float32": ("float32", "average"),
    "float32, rebuilt": ("float32", "rebuild"),
    "delta16": ("delta16", "average"),
    "delta16, rebuilt": ("delta16", "rebuild"),
}
SITES = ("pathology", "dermatology", "ct")
"""Those with the most images, so that chance moves AUROC least."""
ROUNDS = 20
RECIPES = ("seven_sites", "vits16", "vitb16")


def read(name: str, transport: Transport, teacher: str) -> Recipe:
    recipe = load_recipe(ROOT / "configs" / f"{name}.toml")
    federation = recipe.federation.model_copy(update={"transport": transport, "teacher": teacher})
    model = recipe.model.model_copy(update={"init_file": ""})
    return recipe.model_copy(update={"federation": federation, "model": model})


def prototypes(recipe: Recipe, modalities: tuple[str, ...]) -> Prototypes:
    rows = np.eye(64, recipe.model.embedding_dim, dtype=np.float32)
    counts = np.full(64, 10, np.float32)
    return Prototypes(dict.fromkeys(modalities, rows), dict.fromkeys(modalities, counts))


def moved(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """Every tensor moved by a thousandth of its norm."""
    result = {}
    for name, array in arrays.items():
        step = rng.standard_normal(array.shape, np.float32)
        step *= np.float32(1e-3) * np.linalg.norm(array) / max(np.linalg.norm(step), 1e-12)
        result[name] = array + step
    return result


def messages(recipe: Recipe, state: GlobalState) -> tuple[int, int]:
    """Bytes down and up of one round at one site."""
    transport = recipe.federation.transport
    down = pack_state(state.to_arrays(), transport)
    config = ConfigRecord({"study": "0" * 32, "round": 1, "step": 0, "recipe": recipe.to_json()})
    sent = count_bytes(RecordDict({"arrays": to_record(down), "config": config}))
    rng = np.random.default_rng(0)
    averages = recipe.federation.teacher == "average"
    update = SiteUpdate(
        student=moved(state.student, rng), teacher=moved(state.teacher, rng) if averages else {},
        prototypes=prototypes(recipe, MODALITIES[:1]), num_examples={}, metrics={},
    )  # fmt: skip
    up = pack_update(update.to_arrays(), unpack_state(down, transport), transport)
    metrics = MetricRecord({"num_examples/ct": 1000, "loss/ct": 1.0, "seconds_train": 1.0})
    return sent, count_bytes(RecordDict({"arrays": to_record(up), "metrics": metrics}))


def errors(recipe: Recipe, state: GlobalState) -> tuple[float, float]:
    """Error of weights down and of differences up, as norms of error and of what is sent."""
    arrays = {n: a for n, a in state.to_arrays().items() if n.startswith("student/")}
    received = unpack_state(pack_state(arrays, "delta16"), "delta16")
    update = moved(received, np.random.default_rng(0))
    decoded = unpack_update(pack_update(update, received, "delta16"), arrays, "delta16")
    down = distance(received, arrays) / distance(arrays, None)
    change = {name: update[name] - received[name] for name in arrays}
    told = {name: decoded[name] - arrays[name] for name in arrays}
    return down, distance(told, change) / distance(change, None)


def distance(one: Arrays, other: Arrays | None) -> float:
    parts = (a.astype(np.float64) - (0 if other is None else other[n]) for n, a in one.items())
    return float(np.sqrt(sum(np.square(part).sum() for part in parts)))


def print_bytes() -> None:
    print("| model | parameters | way | down, MB | up, MB | together | of float32 |")
    print("|---|---:|---|---:|---:|---:|---:|")
    told = {}
    for name in RECIPES:
        whole = 0
        for way, (transport, teacher) in WAYS.items():
            recipe = read(name, transport, teacher)
            start = initial_state(recipe)
            state = GlobalState(
                student=start.student, teacher=start.teacher,
                prototypes=prototypes(recipe, MODALITIES),
            )  # fmt: skip
            down, up = messages(recipe, state)
            whole = whole or down + up
            parameters = sum(array.size for array in start.student.values()) / 1e6
            print(
                f"| {name} | {parameters:.1f} million | {way} | {down / 1e6:.1f} | {up / 1e6:.1f} "
                f"| {(down + up) / 1e6:.1f} | {100 * (down + up) / whole:.0f} % |",
                flush=True,
            )
        told[name] = errors(recipe, state)
    for name, (down, up) in told.items():
        print(f"{name}: delta16 errs by {down:.1e} of the weights, {up:.1e} of the difference")


def effect(data: Path, out: Path, seeds: list[int]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # a thread a site: equal bits
    torch.set_num_threads(1)
    paths = {name: path for name, path in prepare(data, out).items() if name in SITES}
    shards = [shard for path in paths.values() for shard in open_site(path)]
    rows: dict[str, list[tuple[dict[str, float], float]]] = {way: [] for way in WAYS}
    for seed in seeds:
        reference: GlobalState | None = None
        for way, ways in WAYS.items():
            recipe = shortened(read("seven_sites", *ways), seed)
            state = federate(recipe, paths, out / "runs" / f"{way}-{seed}")
            reference = reference or state
            went = distance(reference.student, initial_state(recipe).student)
            apart = distance(state.student, reference.student) / went
            network = Network(recipe.model, recipe.views.global_px)
            load_network(network, state.teacher)
            rows[way].append((knn_auroc(recipe, network.backbone.eval(), shards), apart))
            print(f"seed {seed}, {way}: {rows[way][-1]}", file=sys.stderr, flush=True)
    print(f"| way | kNN AUROC, mean (seeds) | {' | '.join(SITES)} | from float32 |")
    print("|---|---|" + "---:|" * (len(SITES) + 1))
    for way, measured in rows.items():
        means = [float(np.mean(list(auroc.values()))) for auroc, _ in measured]
        each = [np.mean([auroc[f"knn_auroc/{site}"] for auroc, _ in measured]) for site in SITES]
        cells = [f"{np.mean(means):.4f} ({', '.join(f'{m:.4f}' for m in means)})"]
        cells += [f"{value:.4f}" for value in each]
        print(f"| {way} | {' | '.join(cells)} | {np.mean([far for _, far in measured]):.3f} |")


def shortened(recipe: Recipe, seed: int) -> Recipe:
    """Many rounds of few steps, a network small enough for minutes of one core."""
    options = {"patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
    changes = {
        "model": recipe.model.model_copy(update={"options": options}),
        "views": recipe.views.model_copy(update={"local_views": 0}),
        "federation": recipe.federation.model_copy(update={"rounds": ROUNDS, "local_steps": 3}),
        "evaluation": EvaluationConfig(every_rounds=0),
    }
    return recipe.model_copy(update={**changes, "seed": seed})


def federate(recipe: Recipe, paths: dict[str, Path], out: Path) -> GlobalState:
    """Run or resume a federation in this process; its last state."""
    run = open_run(out, recipe)
    if len(read_history(out)) < ROUNDS:
        run_in_process(out, [write_site_file(out, n, path, recipe) for n, path in paths.items()])
    return run.load(lambda: initial_state(recipe)).state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bytes", "effect"])
    parser.add_argument("--data", type=Path, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "wire")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.what == "bytes":
        print_bytes()
        return
    if options.data is None:
        parser.error("effect needs --data")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    effect(options.data, out, options.seeds)
    print(f"processor minutes: {time.process_time() / 60:.1f}")


if __name__ == "__main__":
    main()
