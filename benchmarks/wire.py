"""What crosses the wire a round and site, what fewer bits cost in accuracy, and in the model.

    python benchmarks/wire.py bytes
    python benchmarks/wire.py effect --data DIR [--out runs/wire] [--seeds 0 1 2]
    python benchmarks/wire.py scales --data DIR [--out runs/wire]

bytes: the records that server and site build, for the initial weights of three recipes and an
update that moves every tensor by a thousandth of its norm; 64 prototypes of one modality go up. No
file of pretrained weights is read.
effect: three of the hospitals of configs/seven_sites.toml with their real images (real_images.py
says which), 2 blocks of width 96, random first weights, 20 rounds of 3 steps, each way of sending.
Measured: AUROC of the recipe's kNN vote on the validation split, on which nothing trains, the loss
of the last round, and how far the last student is from that of float32, in units of the way which
that one went. Resumes after a kill. `half` sends weights in float16 both ways, without differences
or scales: it is here to compare with, and no transport of ours.
scales: the error of one such federation's weights and changes in eight bits, in rounds 1, 10 and
19, with a scale for each tensor, row or block.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from real_images import PLAIN_VIT, prepare

from core.backbone import Network
from core.checkpoint import Arrays
from core.config import EvaluationConfig, Recipe, load_recipe
from core.rounding import EIGHT, decode
from core.site_round import knn_auroc
from core.sites import open_site
from core.train import load_network
from core.transport import Transport, pack_state, pack_update, unpack_state
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.engines import run_in_process
from server.history import open_run, read_history
from server.replies import count_bytes, to_record
from server.simulate import write_site_file
from server.study import initial_state

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[Transport, str]] = {
    "float32": ("float32", "average"),
    "half": ("float32", "average"),
    "delta16": ("delta16", "average"),
    "delta8": ("delta8", "average"),
    "float32, rebuilt": ("float32", "rebuild"),
    "delta16, rebuilt": ("delta16", "rebuild"),
    "delta8, rebuilt": ("delta8", "rebuild"),
}
WEIGHTS = ("student/", "teacher/")
SITES = ("pathology", "dermatology", "ct")
"""Those with the most images, so that chance moves AUROC least."""
ROUNDS = 20
RECIPES = ("seven_sites", "vits16", "vitb16")


def read(name: str, transport: Transport, teacher: str) -> Recipe:
    recipe = load_recipe(ROOT / "configs" / f"{name}.toml")
    federation = recipe.federation.model_copy(update={"transport": transport, "teacher": teacher})
    recipe = recipe.from_scratch
    return recipe.model_copy(update={"federation": federation})


def prototypes(recipe: Recipe) -> Prototypes:
    rows = np.eye(64, recipe.model.embedding_dim, dtype=np.float32)
    return Prototypes({"ct": rows}, {"ct": np.full(64, 10, np.float32)})


def moved(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """Every tensor moved by a thousandth of its norm."""
    result = {}
    for name, array in arrays.items():
        step = rng.standard_normal(array.shape, np.float32)
        step *= np.float32(1e-3) * np.linalg.norm(array) / max(np.linalg.norm(step), 1e-12)
        result[name] = array + step
    return result


def halved(arrays: Arrays) -> Arrays:
    """Weights in float16."""
    return {n: a.astype(np.float16) if n.startswith(WEIGHTS) else a for n, a in arrays.items()}


def messages(recipe: Recipe, state: GlobalState, way: str) -> tuple[int, int]:
    """Bytes down and up of one round at one site."""
    transport = recipe.federation.transport
    cast = halved if way == "half" else dict
    down = pack_state(state.to_arrays(), transport)
    config = ConfigRecord({"study": "0" * 32, "round": 1, "step": 0, "recipe": recipe.to_json()})
    sent = count_bytes(RecordDict({"arrays": to_record(cast(down)), "config": config}))
    rng = np.random.default_rng(0)
    averages = recipe.federation.teacher == "average"
    update = SiteUpdate(
        round_number=1, student=moved(state.student, rng),
        teacher=moved(state.teacher, rng) if averages else {},
        prototypes=prototypes(recipe), num_examples={}, metrics={},
    )  # fmt: skip
    up = pack_update(update.to_arrays(), unpack_state(down, transport), transport)
    metrics = MetricRecord({"num_examples/ct": 1000, "loss/ct": 1.0, "seconds_train": 1.0})
    return sent, count_bytes(RecordDict({"arrays": to_record(cast(up)), "metrics": metrics}))


def distance(one: Arrays, other: Arrays | None) -> float:
    parts = (a.astype(np.float64) - (0 if other is None else other[n]) for n, a in one.items())
    return float(np.sqrt(sum(np.square(part).sum() for part in parts)))


def print_bytes() -> None:
    print("| model | parameters | way | down, MB | up, MB | together | of float32 |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name in RECIPES:
        whole = 0
        for way, (transport, teacher) in WAYS.items():
            recipe = read(name, transport, teacher)
            state = initial_state(recipe)
            down, up = messages(recipe, state, way)
            whole = whole or down + up
            parameters = sum(array.size for array in state.student.values()) / 1e6
            print(
                f"| {name} | {parameters:.1f} million | {way} | {down / 1e6:.1f} | {up / 1e6:.1f} "
                f"| {(down + up) / 1e6:.1f} | {100 * (down + up) / whole:.0f} % |",
                flush=True,
            )


def effect(data: Path, out: Path, seeds: list[int]) -> None:
    paths = hospitals(data, out)
    shards = [shard for path in paths.values() for shard in open_site(path)]
    rows: dict[str, list[tuple[dict[str, float], float, float]]] = {way: [] for way in WAYS}
    for seed in seeds:
        reference: GlobalState | None = None
        for way, ways in WAYS.items():
            recipe = shortened(read("seven_sites", *ways), seed)
            run = out / "runs" / f"{way}-{seed}"
            with in_half() if way == "half" else nullcontext():
                state = federate(recipe, paths, run)
            reference = reference or state
            went = distance(reference.student, initial_state(recipe).student)
            apart = distance(state.student, reference.student) / went
            network = Network.of(recipe)
            load_network(network, state.teacher)
            metrics = read_history(run)[-1]["metrics"]
            loss = float(np.mean([v for n, v in metrics.items() if n.startswith("loss/")]))
            rows[way].append((knn_auroc(recipe, network.backbone.eval(), shards), loss, apart))
            print(f"seed {seed}, {way}: {rows[way][-1]}", file=sys.stderr, flush=True)
    print(f"| way | kNN AUROC, mean (seeds) | {' | '.join(SITES)} | loss | from float32 |")
    print("|---|---|" + "---:|" * (len(SITES) + 2))
    for way, measured in rows.items():
        aurocs, losses, far = zip(*measured, strict=True)
        means = [float(np.mean(list(auroc.values()))) for auroc in aurocs]
        each = [np.mean([auroc[f"knn_auroc/{site}"] for auroc in aurocs]) for site in SITES]
        cells = [f"{np.mean(means):.4f} ({', '.join(f'{m:.4f}' for m in means)})"]
        cells += [f"{value:.4f}" for value in each]
        print(f"| {way} | {' | '.join(cells)} | {np.mean(losses):.4f} | {np.mean(far):.3f} |")


def hospitals(data: Path, out: Path) -> dict[str, Path]:
    """The sites' shards; from here on this process has one thread: equal bits."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    return {name: path for name, path in prepare(data, out).items() if name in SITES}


@contextmanager
def in_half() -> Iterator[None]:
    """What travels in float32 has been through float16."""

    def rounded(arrays: Arrays) -> Arrays:
        return {name: array.astype(np.float32) for name, array in halved(arrays).items()}

    with (
        patch("server.strategy.pack_state", lambda arrays, _: rounded(arrays)),
        patch("client.rounds.pack_update", lambda update, *_: rounded(update)),
    ):
        yield


Scaled = Callable[[np.ndarray], np.ndarray]
"""A tensor -> rows of which each has a scale."""


def in_blocks(size: int) -> Scaled:
    return lambda tensor: np.pad(tensor.reshape(-1), (0, -tensor.size % size)).reshape(-1, size)


SCALED: dict[str, Scaled] = {
    "a tensor": lambda tensor: tensor.reshape(1, -1),
    "a row": lambda tensor: tensor.reshape(len(tensor) if tensor.ndim > 1 else 1, -1),
    "1,024": in_blocks(1024),
    "256": in_blocks(256),
    "64": in_blocks(64),
}


def eight_bit_error(arrays: Arrays, scaled: Scaled) -> float:
    """Length of what eight bits take from all tensors."""
    total = 0.0
    for tensor in arrays.values():
        for row in scaled(tensor):
            codes, scale = EIGHT.encode(row)
            total += float(np.square((row - decode(codes, np.float32(scale))), dtype=float).sum())
    return float(np.sqrt(total))


def scales(data: Path, out: Path) -> None:
    asked = (1, 10, 19)
    seen: list[tuple[Arrays, Arrays]] = []

    def look(update: Arrays, started_from: Arrays, transport: Transport) -> Arrays:
        names = [name for name in update if name.startswith("student/")]
        change = {name: update[name] - started_from[name] for name in names}
        seen.append((change, started_from))
        return pack_update(update, started_from, transport)

    paths, recipe = hospitals(data, out), shortened(read("seven_sites", "float32", "average"), 0)
    with patch("client.rounds.pack_update", look):
        federate(recipe, paths, out / "runs" / f"scales-{time.time_ns()}")
    print("| round | of the change, a scale for " + " | ".join(SCALED), end=" |")
    print(" student, of the change | teacher from student, of the teacher |")
    print("|---:|" + "---:|" * (len(SCALED) + 2))
    for number in asked:
        change, start = seen[len(paths) * (number - 1)]
        student = {name: start[name] for name in change}
        teacher = {n.removeprefix("teacher/"): a for n, a in start.items() if "teacher/" in n}
        apart = {n: a - start[f"student/{n}"] for n, a in teacher.items()}
        whole = distance(change, None)
        cells = [f"{100 * eight_bit_error(change, of) / whole:.2f} %" for of in SCALED.values()]
        per_tensor = SCALED["a tensor"]
        cells += [f"{eight_bit_error(student, per_tensor) / whole:.1f} times"]
        cells += [f"{eight_bit_error(apart, per_tensor) / distance(teacher, None):.1e}"]
        print(f"| {number} | {' | '.join(cells)} |")


def shortened(recipe: Recipe, seed: int) -> Recipe:
    """Many rounds of few steps, a network small enough for minutes of one core."""
    options = {"patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
    network = {**PLAIN_VIT, "options": options}
    changes = {
        "model": recipe.model.model_copy(update=network),
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
    parser.add_argument("what", choices=["bytes", "effect", "scales"])
    parser.add_argument("--data", type=Path, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "wire")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.what == "bytes":
        print_bytes()
        return
    if options.data is None:
        parser.error("effect and scales need --data")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.what == "scales":
        scales(options.data, out)
    else:
        effect(options.data, out, options.seeds)
    print(f"processor minutes: {time.process_time() / 60:.1f}")


if __name__ == "__main__":
    main()
