"""Kill processes of a running federation at random: does the study end with the calm run's model?

    python benchmarks/chaos.py --out DIR [--data DIR] [--kills 30] [--every 30] [--seed 0]

Runs `fedmermed-server simulate --engine processes` (SuperLink, gateway, SuperNodes, trainers, over
TLS with node authentication) twice on the same data: undisturbed, and while this script sends
SIGKILL to one of its processes every so many seconds, drawn evenly over the kinds that are alive,
the command itself among them; that one is started again, as its user would. Ends with status 1 if
a hash differs, a site was declared absent, or a gap in the record has no reason. About 40 minutes
on two cores. Keeps DIR/kills.jsonl (each kill: second, kind, round) and DIR/summary.json.
"""

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from core.checkpoint import read_json, write_json
from server.history import read_history

ROUNDS, SITES = 10, 3
MARK = "FEDMERMED_CHAOS"
RECIPE = """\
# Purpose: a small study whose processes are killed, see benchmarks/chaos.py.
name = "chaos"

[model]
options = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }
head_hidden = 32
embedding_dim = 16

[views]
global_px = 32
local_px = 16
local_views = 2

[memory]
entries_per_modality = 64

[optim]
batch_size = 16
learning_rate = 1e-2
precision = "fp32"

[federation]
rounds = %d
local_steps = 60
min_sites = %d
grace_seconds = 900.0
wait_for_sites_seconds = 900.0

[evaluation]
every_rounds = 0
"""
KINDS = {
    "join": ("client.supervisor", "client join"),
    "SuperLink": ("server.superlink",),
    "gateway": ("server.gateway_server",),
    "ServerApp": ("flwr-serverapp",),
    "launcher or ClientApp": ("client.launcher",),
    "SuperNode": ("client.supernode",),
    "trainer": ("client.trainer",),
    "starter of ServerApps": ("server.superexec",),
    "serve": ("server serve",),
    "the command": ("server simulate",),
}
"""Kind -> what its command line holds; the first kind that fits counts."""


def main() -> int:
    """Run calm, run with kills, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="shards or npz files; none: phantoms")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=float, default=30.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = given.out / "chaos.toml"
    recipe.write_text(RECIPE % (ROUNDS, SITES))
    command = [sys.executable, "-m", "server", "simulate", str(recipe), "--engine", "processes"]
    if given.data:
        command += ["--data", str(given.data.resolve())]
    began = time.monotonic()
    calm, killed = given.out / "calm", given.out / "killed"
    subprocess.run([*command, "--out", str(calm)], check=True)
    calm_seconds = time.monotonic() - began
    kills = disturb([*command, "--out", str(killed)], killed, given)
    return compare(given.out, calm, killed, kills, calm_seconds)


def disturb(command: list[str], run: Path, given: argparse.Namespace) -> list[dict[str, object]]:
    """Run a study to its end while its processes are killed; returns the kills."""
    generator = random.Random(given.seed)
    mark = secrets.token_hex(8)
    environment = {**os.environ, MARK: mark}
    kills: list[dict[str, object]] = []
    began = time.monotonic()
    with open(given.out / "killed.log", "ab") as log, open(given.out / "kills.jsonl", "w") as book:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        due = began + given.every
        while (status := process.poll()) != 0:
            if status is not None:
                assert status < 0, (
                    f"the command ended by itself with status {status}: see {log.name}"
                )
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            time.sleep(0.2)
            if time.monotonic() < due or len(kills) >= 4 * given.kills:
                continue
            due = time.monotonic() + given.every * generator.uniform(0.3, 1.7)
            if (kill := kill_one(mark, generator)) is not None:
                kill |= {"second": round(time.monotonic() - began, 1)}
                kill |= {"round": len(read_history(run)) + 1}
                kills.append(kill)
                book.write(json.dumps(kill) + "\n")
                book.flush()
    left = family(mark)
    assert not left, f"processes are left: {left}"
    return kills


def kill_one(mark: str, generator: random.Random) -> dict[str, object] | None:
    """Send SIGKILL to a process of a kind drawn evenly; None if there is none."""
    kinds: dict[str, list[int]] = {}
    for pid, words in sorted(family(mark).items()):
        kinds.setdefault(kind_of(words), []).append(pid)
    if not kinds:
        return None
    kind = generator.choice(sorted(kinds))
    pid = generator.choice(kinds[kind])
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return {"kind": kind, "pid": pid}
    return None


def family(mark: str) -> dict[int, str]:
    """Living processes that carry the mark in their environment, with their command lines."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if words:  # a zombie has none
                    found[int(directory.name)] = words
    return found


def kind_of(words: str) -> str:
    """What sort of process this is."""
    for kind, signs in KINDS.items():
        if any(sign in words for sign in signs):
            return kind
    return "other: " + words[:60]


def compare(
    out: Path, calm: Path, killed: Path, kills: list[dict[str, object]], calm_seconds: float
) -> int:
    """Hold the two runs against each other; print and keep what was found."""
    one, other = read_history(calm), read_history(killed)
    faults = []
    for before, after in zip(one, other, strict=True):
        number = after["round"]
        if before["sha256"] != after["sha256"]:
            faults.append(f"round {number}: another hash than the calm run's")
        for site, outcome in after["sites"].items():
            if outcome["outcome"] != "admitted":
                faults.append(f"round {number}: site '{site}' {outcome['outcome']}")
            if outcome.get("asked", 1) != 1 + len(outcome.get("failures", [])):
                faults.append(f"round {number}: site '{site}': a failure without a reason")
    asked = [o for line in other for o in line["sites"].values() if "asked" in o]
    summary = {
        "kills": len(kills),
        "by_kind": dict(Counter(str(kill["kind"]) for kill in kills)),
        "by_round": dict(Counter(str(kill["round"]) for kill in kills)),
        "answers_asked_again": len(asked),
        "reasons": dict(Counter(reason for o in asked for reason in o["failures"])),
        "hash": read_json(killed / "summary.json")["model"]["sha256"],
        "seconds_calm": round(calm_seconds),
        "faults": faults,
    }
    write_json(out / "summary.json", summary)
    print(json.dumps(summary, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
