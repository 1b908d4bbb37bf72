"""What a round costs beside training with 10 to 1,000 sites: measured in parts, then added up.

    python benchmarks/scale.py service --sites 4 16 64 [--width 32] [--depth 2]
    python benchmarks/scale.py engine --sites 10 100 1000
    python benchmarks/scale.py server [--models vits16 vitb16]
    python benchmarks/scale.py table [--plot scale.svg]

service: the coordinator's real service (SuperLink with its database, gateway, TLS, a key a site,
ServerApp), and scale_crowd.py as its sites; seconds of the phases and processor seconds of each
process in the rounds after the first. engine: the same sites and ServerApp in one process.
server: what one update of a model costs on one core, from reply to sum, and a checkpoint. table:
what these figures, kept in benchmarks/scale.json, say of a network of 1 Gbit/s.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from scale_crowd import answer, start_of

from core.checkpoint import Arrays
from core.config import Recipe, load_recipe, recipe_from_json
from core.initial import initial_state
from core.transport import Transport, pack_state, pack_update, unpack_state
from core.wire import GlobalState, SiteUpdate
from server.admit import admit
from server.aggregate import aggregate
from server.app import app as server_app
from server.control import control
from server.engines import server_context
from server.grid import InProcessGrid
from server.history import Checkpoint, Line, open_run, read_history
from server.launch import follow
from server.processes import START_SECONDS, free_port
from server.provision import provision
from server.replies import count_bytes, judge, to_record
from server.screening import screen
from server.serve import open_service
from server.spool import Spool
from server.supervisor import Supervisor, stopped_by_sigterm

ROOT = Path(__file__).resolve().parents[1]
FIGURES = Path(__file__).with_suffix(".json")
GROWING_SECONDS = 32.0
"""After which pauses between looks, a tenth of the wait, have grown to their longest."""
IDLE_SECONDS = 20.0
PARTS = {
    "superlink": "server.superlink",
    "gateway": "server.gateway_server",
    "serverapp": "flwr-serverapp",
}
TICK = os.sysconf("SC_CLK_TCK")


def tiny(sites: int, rounds: int, width: int, depth: int, transport: Transport) -> Recipe:
    """A network of few weights, one step of four images."""
    table = {
        "name": "scale",
        "model": {
            "options": {"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2},
            "head_hidden": 32, "embedding_dim": 16,
        },
        "views": {"global_px": 32, "local_views": 0},
        "memory": {"entries_per_modality": 64},
        "optim": {"batch_size": 4, "precision": "fp32"},
        "federation": {
            "rounds": rounds, "local_steps": 1, "min_sites": sites, "transport": transport,
            "wait_for_sites_seconds": 300,
        },
        "evaluation": {"every_rounds": 0},
    }  # fmt: skip
    return recipe_from_json(json.dumps(table), "benchmark")


def names(count: int) -> list[str]:
    return [f"site-{number:04d}" for number in range(count)]


def keep(kind: str, figures: dict[str, Any]) -> None:
    """Add figures to those that are there."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    known.setdefault(kind, []).append(figures)
    FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


def processor_seconds(root: int) -> dict[str, float]:
    """Of each part of a service among the descendants of a process."""
    parents, used, command = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICK
    ours = {root}
    for _ in range(4):
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return {
        part: sum(used[pid] for pid in ours & used.keys() if word in command[pid])
        for part, word in PARTS.items()
    }


def service(count: int, options: argparse.Namespace, home: Path) -> None:
    """A study on a real service with a crowd of sites."""
    rounds = options.rounds
    recipe = tiny(count, rounds, options.width, options.depth, options.transport)
    place, run_dir = home / "coordinator", home / "run"
    open_run(run_dir, recipe)
    address = f"localhost:{free_port()}"
    for _ in provision(place, address=address, sites=names(count)):
        pass
    opened = open_service(place, listen=address.replace("localhost", "127.0.0.1"), port=free_port())
    used: dict[int, dict[str, float]] = {}

    def tend() -> None:
        supervisor.check()
        if crowd.poll() is not None:
            raise SystemExit((home / "crowd.log").read_text()[-2000:])
        done = len(read_history(run_dir))
        if done not in used:
            used[done] = processor_seconds(os.getpid())

    with stopped_by_sigterm(), Supervisor() as supervisor:
        opened.start(supervisor)
        with control(place, patience_seconds=START_SECONDS, tend=supervisor.check) as calls:
            for _ in admit(calls, place):
                pass
            command = [sys.executable, str(Path(__file__).with_name("scale_crowd.py"))]
            command += [str(place), address, str(run_dir / "recipe.json")]
            with open(home / "crowd.log", "wb") as log:
                crowd = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while (home / "crowd.log").read_text().count("connected\n") < count:
                    supervisor.check()
                    time.sleep(1)
                time.sleep(GROWING_SECONDS)
                before = processor_seconds(os.getpid())
                time.sleep(IDLE_SECONDS)
                after = processor_seconds(os.getpid())
                follow(calls, run_dir, count, tend=tend)
                tend()
            finally:
                crowd.kill()
                crowd.wait()
    lines = read_history(run_dir)[1:]
    assert all(o["outcome"] == "admitted" for line in lines for o in line["sites"].values())
    keep("service", {
        "sites": count, "transport": options.transport, "load": round(os.getloadavg()[0], 1),
        "bytes_down": lines[-1]["bytes_down"] // count, "bytes_up": lines[-1]["bytes_up"] // count,
        "seconds": {n: mean(line["seconds"][n] for line in lines) for n in lines[-1]["seconds"]},
        "cpu": {p: round((used[rounds][p] - used[1][p]) / (rounds - 1), 3) for p in PARTS},
        "idle": {p: round((after[p] - before[p]) / IDLE_SECONDS, 4) for p in PARTS},
    })  # fmt: skip


def mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 3)


def engine(count: int, options: argparse.Namespace, home: Path) -> None:
    """The real ServerApp and Flower's serialisation in this process; sites train nothing."""
    recipe = tiny(count, options.rounds, options.width, options.depth, options.transport)
    run_dir, start, known = home / "run", start_of(recipe), names(count)
    open_run(run_dir, recipe)

    def site(message: Message, context: Context) -> Message:
        number = int(str(context.node_config["number"]))
        content = answer(message, recipe, start, known[number], number)
        return Message(content, reply_to=message)

    began = time.process_time()
    grid = InProcessGrid(site, [{"number": number} for number in range(count)])
    server_app(grid, server_context(run_dir, [Path(name) for name in known]))
    lines = read_history(run_dir)
    assert all(o["outcome"] == "admitted" for line in lines for o in line["sites"].values())
    keep("engine", {
        "sites": count, "rounds": options.rounds, "transport": options.transport,
        "cpu": round(time.process_time() - began, 1), "load": round(os.getloadavg()[0], 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds": {n: mean(line["seconds"][n] for line in lines) for n in lines[-1]["seconds"]},
    })  # fmt: skip


class Clock:
    """Processor seconds of this thread's work, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Call it, and note what that took."""
        began = time.process_time()
        result = call()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return result


def replies(recipe: Recipe, student: Arrays, count: int) -> Iterator[tuple[str, Message]]:
    """What sites send, made when its turn comes."""
    for number, site in enumerate(names(count)):
        rng = np.random.default_rng(number)
        moved = {
            n: a + np.float32(1e-4) * rng.standard_normal(a.shape, np.float32)
            for n, a in student.items()
        }
        packed = to_record(pack_update(moved, student, recipe.federation.transport))
        metrics = MetricRecord({"round": 1, "num_examples/ct": 100 + number})
        question = Message(RecordDict(), 2, "train")
        yield site, Message(RecordDict({"arrays": packed, "metrics": metrics}), reply_to=question)


def close_round(
    recipe: Recipe, state: GlobalState, student: Arrays, count: int, home: Path
) -> tuple[dict[str, float], Checkpoint, int]:
    """Processor seconds of a round's parts at the server, its result, and bytes of an update."""
    clock, size = Clock(), 0
    with Spool(home) as spool:
        updates: dict[str, SiteUpdate] = {}
        outcomes: dict[str, Line] = {}
        for site, reply in replies(recipe, student, count):
            size = count_bytes(reply.content)
            judged = partial(
                judge, reply, site=site, round_number=1, reference=state, recipe=recipe
            )
            update, outcomes[site] = clock("admit", judged)
            updates[site] = clock("spool", partial(spool.put, update))
        screened = clock("screen", lambda: screen(recipe, state, [], updates, outcomes))
        new, kept, _ = clock(
            "sum", lambda: aggregate(recipe, state, {}, screened.updates, round_number=1)
        )
    return clock.seconds, Checkpoint(1, new, kept), size


def server(model: str, options: argparse.Namespace, home: Path) -> None:
    """What an update, and a round, cost the ServerApp's one thread."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    recipe = load_recipe(ROOT / "configs" / f"{model}.toml").from_scratch
    changes = {"transport": options.transport, "teacher": options.teacher, "min_sites": 2}
    federation = recipe.federation.model_copy(update=changes)
    recipe = recipe.model_copy(update={"federation": federation})
    start = initial_state(recipe)
    state, clock = GlobalState(student=start.student, teacher=start.teacher), Clock()
    packed = clock("pack", lambda: pack_state(state.to_arrays(), options.transport))
    received = unpack_state(packed, options.transport)
    sent = {
        n: a for n, a in received.items()
        if n.startswith("student/") or options.teacher == "average"
    }  # fmt: skip
    two, _, _ = close_round(recipe, state, sent, 2, home)
    four, checkpoint, size = close_round(recipe, state, sent, 4, home)
    run = open_run(home / "run", recipe)
    began = time.monotonic()
    run.commit(checkpoint, {"round": 1})
    keep("server", {
        "model": model, "transport": options.transport, "teacher": options.teacher,
        "numbers": sum(a.size for a in sent.values()),
        "bytes_down": sum(a.nbytes for a in packed.values()), "bytes_up": size,
        "pack": round(clock.seconds["pack"], 3),
        "each": {name: round((four[name] - two[name]) / 2, 3) for name in four},
        "checkpoint": round(time.monotonic() - began, 3), "load": round(os.getloadavg()[0], 1),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["service", "engine", "server", "table"])
    parser.add_argument("--sites", type=int, nargs="+", default=[10])
    parser.add_argument("--models", nargs="+", default=["vits16", "vitb16"])
    parser.add_argument("--transport", choices=["float32", "delta16", "delta8"], default="delta16")
    parser.add_argument("--teacher", choices=["average", "rebuild"], default="rebuild")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="an SVG file")
    options = parser.parse_args()
    if options.what == "table":
        from scale_table import tell

        tell(json.loads(FIGURES.read_text()), options.plot)
        return
    call = {"service": service, "engine": engine, "server": server}[options.what]
    for what in options.models if options.what == "server" else options.sites:
        with tempfile.TemporaryDirectory() as home:
            call(what, options, Path(home))


if __name__ == "__main__":
    main()
