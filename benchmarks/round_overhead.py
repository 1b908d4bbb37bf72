"""What a round costs beside training, on real processes: where the seconds between steps go.

    python benchmarks/round_overhead.py [--baseline COMMIT] [--sites 2] [--rounds 6] [--repeats 1]
        [--depth 2] [--home DIR]

Runs `simulate --engine processes` (SuperLink, gateway, a SuperNode and a trainer a site, over TLS
with node authentication) with a tiny network and one step of four images a round, no evaluation.
A gap reaches from the last step of the site whose reply came last to the first step of the site
that begins the next round last; each moment of it counts to one part of the chain between. With
--baseline the same is run from a clone of an older commit, in turns with this one. Prints the mean
seconds of each part and the pure transfer time of a round's bytes over a loopback socket.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.phantoms import make_phantoms
from core.shards import write_shard
from server.history import read_history

ROOT = Path(__file__).resolve().parents[1]
TRACER = Path(__file__).with_name("round_trace.py")
CUSTOMIZE = """\
import importlib.util
spec = importlib.util.spec_from_file_location("round_trace", {tracer!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.install()
"""
RECIPE = """\
name = "overhead"
[model]
options = {{ patch_size = 8, embed_dim = 32, depth = {depth}, num_heads = 2 }}
head_hidden = 32
embedding_dim = 16
[views]
global_px = 32
local_views = 0
[memory]
entries_per_modality = 64
[optim]
batch_size = 4
precision = "fp32"
[federation]
rounds = {rounds}
local_steps = 1
min_sites = {sites}
[evaluation]
every_rounds = 0
"""
SENT = "push_object_contents_from_iterable"
UP = (
    ("reply made: prototypes, state, audit", "push_message", "start"),
    ("serialise, hand to the SuperNode", "push_message", "end"),
    ("wait: SuperNode looks for the reply", "FleetHttpClient.PushMessages", "start"),
    ("send to the coordinator", SENT, "end"),
)
MIDDLE = (
    ("wait: server looks for replies", "HttpGrid.pull_messages", "start"),
    ("server fetches the reply", "HttpGrid.pull_messages", "end"),
    ("admit", "Intake.take", "end"),
    ("screen and merge", "commit", "start"),
    ("checkpoint and history", "commit", "end"),
)
DOWN = (
    ("next round opened", "HttpGrid.push_messages", "start"),
    ("serialise, hand to the SuperLink", "HttpGrid.push_messages", "end"),
    ("wait: SuperNode looks for a message", "FleetHttpClient.PullMessages", "start"),
    ("SuperNode fetches the message", "FleetHttpClient.ConfirmMessageReceived", "end"),
    ("wait: trainer looks for a task", "BaseExecPlugin.launch_task", "start"),
    ("process starts", "begin", "start"),
    ("imports of Flower and client", "RuntimeHttpClient.PullTaskInput", "start"),
    ("process fetches the message", "respond", "start"),
    ("site's checks, state, shards", ("import torch", "site_round"), "start"),
    ("imports of torch", "site_round", "start"),
    ("network and data ready", "train", "start"),
)
"""Part of the chain, and the event that ends it, or events of which the first does."""

Event = Mapping[str, Any]


def chain(
    parts: Sequence[tuple[str, str | tuple[str, ...], str]],
    events: Sequence[Event],
    begin: float,
    end: float,
) -> tuple[dict[str, float], float]:
    """Seconds of each part between two moments; a part whose event came early, or never, has none.

    Returns:
        Part -> seconds, and when the last part was over.
    """
    found, now = {}, begin
    for part, name, moment in parts:
        names = (name,) if isinstance(name, str) else name
        moments = [e[moment] for e in events if e["event"] in names and now <= e[moment] <= end]
        then = min(moments, default=now)
        found[part] = then - now
        now = then
    return found, now


def gaps(events: Sequence[Event], sites: Sequence[str]) -> list[dict[str, float]]:
    """The seconds of each part, for each gap between two rounds."""
    events = sorted((e for e in events if not e["empty"]), key=lambda e: e["start"])
    by_site = {s: [e for e in events if f"/{s}/" in e["home"]] for s in sites}
    server = [e for e in events if "/coordinator/" in e["home"]]
    trains = {s: [e for e in of if e["event"] == "train"] for s, of in by_site.items()}
    sends = {s: [e for e in of if e["event"] == SENT] for s, of in by_site.items()}
    commits = [e for e in server if e["event"] == "commit"]
    result = []
    for number in range(len(commits) - 1):
        last = max(sites, key=lambda s: sends[s][number]["end"])
        slow = max(sites, key=lambda s: trains[s][number + 1]["start"])
        begin, end = trains[last][number]["end"], trains[slow][number + 1]["start"]
        merged = commits[number]["end"]
        up, sent = chain(UP, by_site[last], begin, merged)
        fetched = [
            e for e in server
            if e["event"] == "HttpGrid.pull_messages" and e["start"] < merged
        ]  # fmt: skip
        # The last fetch of the round holds the last reply; earlier ones are other sites'.
        since = [e for e in server if e["start"] >= fetched[-1]["start"]]
        middle, done = chain(MIDDLE, since, sent, merged)
        down, ready = chain(DOWN, [*since, *by_site[slow]], done, end)
        gap = up | middle | down
        assert abs(sum(gap.values()) - (end - begin)) < 0.05, (gap, end - begin, ready)
        result.append(gap)
    return result


def measure(tree: Path, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a federation from a checkout; returns its gaps, bytes and processor seconds."""
    home.mkdir(parents=True)
    names = [f"hospital-{number}" for number in range(options.sites)]
    for number, name in enumerate(names):
        shard = make_phantoms("ct", patients=40, images_per_patient=2, px=32, seed=number)
        write_shard(home / "data" / name / "ct", shard)
    recipe, trace, tracer = home / "recipe.toml", home / "trace.jsonl", home / "tracer"
    given = {"rounds": options.rounds, "sites": options.sites, "depth": options.depth}
    recipe.write_text(RECIPE.format(**given))
    tracer.mkdir()
    (tracer / "sitecustomize.py").write_text(CUSTOMIZE.format(tracer=str(TRACER)))
    paths = os.pathsep.join([str(tracer), str(tree)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRACE": str(trace)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a clone has no bytecode at first
    words = [sys.executable, "-m", "server", "simulate", str(recipe), "--engine", "processes"]
    words += ["--data", str(home / "data"), "--out", str(home / "run")]
    before = os.times()
    with open(home / "log", "wb") as log:
        done = subprocess.run(words, cwd=tree, env=environment, stdout=log, stderr=log)
    after = os.times()
    if done.returncode:
        raise SystemExit((home / "log").read_text()[-3000:])
    lines = read_history(home / "run")
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    return {
        "gaps": gaps(events, names)[1:],  # the first fills caches and waits for bytecode
        "bytes": lines[-1]["bytes_down"] // options.sites, "up": lines[-1]["bytes_up"],
        "cpu": spent,
    }  # fmt: skip


def transfer(size: int) -> float:
    """Seconds to send so many bytes over a loopback socket, the best of five."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        best = float("inf")
        for _ in range(5):
            sender = socket.create_connection(listener.getsockname())
            taker, _ = listener.accept()
            data = bytes(size)
            began = time.monotonic()
            thread = threading.Thread(target=lambda s=sender, d=data: (s.sendall(d), s.close()))
            thread.start()
            while taker.recv(2**20):
                pass
            best = min(best, time.monotonic() - began)
            thread.join()
            taker.close()
    return best


def clone(commit: str, place: Path) -> Path:
    """A checkout of an older commit."""
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(["git", "clone", "--shared", "--no-checkout", str(ROOT), str(place)], **quiet)
    subprocess.run(["git", "-C", str(place), "checkout", "--detach", commit], **quiet)
    return place


def main() -> None:
    """Run, in turns, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--baseline", help="a commit that is measured beside this one")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--depth", type=int, default=2, help="of the network: more arrays")
    parser.add_argument("--home", type=Path, help="an empty directory to keep what was measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = (options.home or Path(temporary)).resolve()
        trees = {"now": ROOT}
        if options.baseline:
            trees = {options.baseline: clone(options.baseline, Path(temporary) / "tree"), **trees}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for turn in range(options.repeats):
            for name, tree in trees.items():
                load = os.getloadavg()[0]
                runs[name].append(measure(tree, home / f"{name}-{turn}", options))
                total = statistics.mean(sum(gap.values()) for gap in runs[name][-1]["gaps"])
                print(f"{name}, run {turn}: {total:.2f} s a gap, load {load:.1f}", file=sys.stderr)
        tell(runs)


def tell(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the tables."""
    gaps_of = {name: [gap for run in of for gap in run["gaps"]] for name, of in runs.items()}
    print("| seconds of a gap, mean | " + " | ".join(runs) + " |\n|---|" + "---:|" * len(runs))
    for part in (part for part, *_ in (*UP, *MIDDLE, *DOWN)):
        row = [statistics.mean(gap[part] for gap in of) for of in gaps_of.values()]
        print(f"| {part} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    totals = {name: [sum(gap.values()) for gap in of] for name, of in gaps_of.items()}
    for word, figure in (("all", statistics.mean), ("all, median", statistics.median)):
        print(f"| {word} | " + " | ".join(f"{figure(of):.2f}" for of in totals.values()) + " |")
    ranges = (f"{min(of):.2f} to {max(of):.2f}" for of in totals.values())
    print("| least to most | " + " | ".join(ranges) + " |")
    cpu = [statistics.mean(run["cpu"] for run in of) for of in runs.values()]
    print("| processor seconds of a run | " + " | ".join(f"{value:.0f}" for value in cpu) + " |")
    last = list(runs.values())[-1][-1]
    size = last["bytes"] + last["up"]
    print(f"\nA round's bytes over a loopback socket: {size:,} in {transfer(size) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
