"""What crosses the wire a round and site, what half precision costs in accuracy, and in the model.

    python benchmarks/wire.py bytes                       bytes, and the error of delta16
    python benchmarks/wire.py effect --data DIR [--out runs/wire] [--seeds 0 1 2] [--jobs 1]

bytes: the records that server and site build, for the initial weights of three recipes and an
update that moves every tensor by a thousandth of its norm; 64 prototypes of one modality up, of
seven down. No file of pretrained weights is read.
effect: configs/seven_sites.toml on its real images (see seven_sites.py), cut to 12 rounds of 3
steps, in four ways of sending; on the test split, and how far the last student is from the one of
float32, in units of the way that one went. Each run is resumed after a kill.
"""

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from seven_sites import _toml, measured, prepare, run_all, run_directory

from core.checkpoint import Arrays, load_arrays
from core.config import Recipe, load_recipe
from core.modalities import MODALITIES
from core.transport import Transport, pack_state, pack_update, unpack_state, unpack_update
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.replies import count_bytes, to_record
from server.study import initial_state

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[Transport, str]] = {
    "float32": ("float32", "average"),
    "float32, rebuilt": ("float32", "rebuild"),
    "delta16": ("delta16", "average"),
    "delta16, rebuilt": ("delta16", "rebuild"),
}
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
    """Root mean square error of weights down and differences up, in units of their own size."""
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


def effect(data: Path, out: Path, seeds: list[int], jobs: int) -> None:
    sites = prepare(data, out)
    linked = out / "sites"
    linked.mkdir(exist_ok=True)
    for name, path in sites.items():
        if not (linked / name).exists():
            (linked / name).symlink_to(path.resolve(), target_is_directory=True)
    commands = []
    for seed in seeds:
        for way, (transport, teacher) in WAYS.items():
            table: dict[str, Any] = tomllib.loads((ROOT / "configs/seven_sites.toml").read_text())
            table["federation"] |= {"rounds": 12, "local_steps": 3}
            table["federation"] |= {"transport": transport, "teacher": teacher}
            table["evaluation"]["every_rounds"] = 0
            file = out / f"{way}.toml"
            file.write_text(_toml(table))
            target = run_directory(out, way, seed)
            commands.append([
                sys.executable, "-m", "server", "simulate", str(file), "--data", str(linked),
                "--seed", str(seed), "--out", str(target),
            ])  # fmt: skip
    run_all(commands, jobs)
    print("| way | kNN AUROC | probe AUROC | student from float32's |\n|---|---|---|---|")
    for way in WAYS:
        rows = [measured(way, out, seed) for seed in seeds]
        cells = []
        for key in ("knn_auroc", "probe_auroc"):
            values = [float(np.mean([r[key] for r in row.values()])) for row in rows]
            each = ", ".join(f"{value:.4f}" for value in values)
            cells.append(f"{np.mean(values):.4f} ({each})")
        apart = [distance_from_float32(out, way, seed) for seed in seeds]
        print(f"| {way} | {' | '.join(cells)} | {np.mean(apart):.3f} |", flush=True)


def distance_from_float32(out: Path, way: str, seed: int) -> float:
    last, first = "round-0012.safetensors", "round-0000.safetensors"

    def student(way: str, file: str) -> Arrays:
        arrays, _ = load_arrays(run_directory(out, way, seed) / file)
        return GlobalState.from_arrays(arrays).student

    end, start = student("float32", last), student("float32", first)
    return distance(student(way, last), end) / distance(end, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bytes", "effect"])
    parser.add_argument("--data", type=Path, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "wire")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.what == "bytes":
        print_bytes()
        return
    if options.data is None:
        parser.error("effect needs --data")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    effect(options.data, out, options.seeds, options.jobs)
    print(f"processor minutes: {sum(os.times()[:4]) / 60:.1f}")


if __name__ == "__main__":
    main()
