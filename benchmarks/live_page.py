"""The live page in a real browser: a study of real processes, and one of 50 sites and 500 rounds.

    python benchmarks/live_page.py --out DIR [--only size|live]

Needs Chromium on the PATH. "size" writes histories as long studies leave them, loads their pages
and prints seconds, bytes and memory of the server: about a minute. "live" runs `fedmermed-server
simulate --engine processes` with three sites on phantoms while a browser looks: 'greedy' claims
more images than the recipe admits and is rejected, all images of 'blank' are the same, so that its
embeddings collapse, and the SuperNode of 'wanderer' is killed in the second round. For each it
prints when the run directory told of it and when the page did, without a reload: about five
minutes on two cores. Pictures of the page (desktop, phone, light, dark, paper) are left in DIR.
Ends with status 1 where a bound does not hold.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
from browser import Page, chromium, find_chromium
from long_history import write_study

from core.config import load_recipe
from core.lock import held
from core.phantoms import make_phantoms
from core.shards import write_shard
from server.history import read_history
from server.live import Live, read_live
from server.processes import free_port

MOST_LOAD_SECONDS, MOST_MB, MOST_NEWS_SECONDS, MOST_SHARE = 2.0, 200.0, 5.0, 0.01
RECIPE = """\
# Purpose: a small study to look at, see benchmarks/live_page.py.
name = "seen live"

[model]
options = { patch_size = 8, embed_dim = 32, depth = 1, num_heads = 2 }
head_hidden = 32
embedding_dim = 16

[views]
global_px = 32
local_px = 16
local_views = 1

[memory]
entries_per_modality = 64

[optim]
batch_size = 16
precision = "fp32"

[federation]
rounds = %d
local_steps = 40
min_sites = 1
wait_for_sites_seconds = 300.0
max_examples = 50
quarantine_after = 0
"""
Facts = dict[str, tuple[Callable[[], bool], str]]
"""What -> whether the run directory tells it, and whether the page does, as JavaScript"""


def main() -> int:
    """Both parts, or one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("size", "live"))
    given = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        raise SystemExit("Chromium is not on the PATH")
    given.out.mkdir(parents=True, exist_ok=True)
    good = True
    with chromium(binary) as page:
        if given.only != "live":
            good &= size(page, given.out)
        if given.only != "size":
            good &= live(page, given.out)
    print("all bounds hold" if good else "a bound does not hold")
    return 0 if good else 1


def size(page: Page, out: Path) -> bool:
    """Load long studies; print what it takes."""
    runs = out / "long"
    shutil.rmtree(runs, ignore_errors=True)
    recipe = write_recipe(out, 600)
    one = write_study(runs / "one", load_recipe(recipe), sites=50, rounds=500)
    good = True
    for index in range(10):
        run = runs / "ten" / f"run-{index}"
        write_study(run, load_recipe(recipe), sites=10, rounds=500, seed=index)
    for what, path in (("50 sites, 500 rounds", one), ("10 runs of 10 sites", runs / "ten")):
        began = time.monotonic()
        with served(path, out / "page.log") as (url, process):
            ready = time.monotonic() - began
            page.screen(1400, 900)
            page.open(url)
            page.wait(LIVE)
            load = page.ask("performance.timing.loadEventEnd - performance.timing.navigationStart")
            entry = "performance.getEntriesByType('navigation')[0]"
            whole, sent = page.ask(f"[{entry}.decodedBodySize, {entry}.transferSize]")
            time.sleep(5)
            before = cpu_seconds(process.pid)
            time.sleep(20)
            idle = (cpu_seconds(process.pid) - before) / 20
            news = 0.0
            if path == one:
                history = (one / "history.jsonl").read_bytes()
                line = history.splitlines()[-1].replace(b'"round": 500', b'"round": 501')
                with open(one / "history.jsonl", "ab") as file:
                    file.write(line + b"\n")
                began = time.time()
                news = page.wait(f"{text('head')}.includes('501 of 600')") - began
            peak = peak_mb(process.pid)
        good &= load < 1000 * MOST_LOAD_SECONDS and peak < MOST_MB
        good &= news < MOST_NEWS_SECONDS
        print(
            f"{what}: address after {ready:.1f} s, page loaded in {load / 1000:.2f} s "
            f"({whole / 1e6:.2f} MB, {sent / 1e6:.2f} MB sent), peak {peak:.0f} MB, "
            f"{100 * idle:.1f} % of a core while somebody looks"
            + (f", a new round shown after {news:.1f} s" if news else "")
        )
    return good & writer(runs / "writer")


def writer(run: Path) -> bool:
    """What the server spends on telling: live.json at most twice a second, whoever looks."""
    run.mkdir()
    live = Live(run, 500)
    for index in range(50):
        live.site(f"site-{index:02d}", "asked")
    times = []
    for _ in range(500):
        began = time.perf_counter()
        live.phase("training", seconds=600, beat_seconds=3)
        times.append(time.perf_counter() - began)
    share = 2 * median(times)
    print(f"live.json of 50 sites: {500 * share:.2f} ms, at most {100 * share:.2f} % of a round")
    return share < MOST_SHARE


def live(page: Page, out: Path) -> bool:
    """A federation of real processes, and a browser that looks."""
    data, run = out / "data", out / "run"
    for directory in (data, run):
        shutil.rmtree(directory, ignore_errors=True)
    for index, (site, modality, patients) in enumerate(
        (("wanderer", "ct", 24), ("blank", "us", 24), ("greedy", "oct", 40))
    ):
        shard = make_phantoms(modality, patients=patients, images_per_patient=2, px=32, seed=index)
        if site == "blank":
            shard = dataclasses.replace(shard, images=np.zeros_like(np.asarray(shard.images)))
        write_shard(data / site / modality, shard)
    recipe = str(write_recipe(out, 3))
    command = [sys.executable, "-m", "server", "simulate", recipe, "--data", str(data),
               "--out", str(run), "--engine", "processes"]  # fmt: skip
    with open(out / "simulate.log", "wb") as log:
        study = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait(lambda: (run / "recipe.json").exists() or study.poll() is not None, 120)
        assert study.poll() is None, (out / "simulate.log").read_text()
        with served(run, out / "page.log") as (url, _):
            page.screen(1400, 900)
            page.open(url)
            page.wait(LIVE)
            page.ask("window.loadedOnce = true")
            good = watch(page, run, out)
            assert page.ask("window.loadedOnce") is True
            assert page.console == [], page.console
            pictures(page, url, out)
    finally:
        study.terminate()
        study.wait(120)
    return good


def watch(page: Page, run: Path, out: Path) -> bool:
    """Note when the run directory tells each thing and when the page does."""

    def state(site: str) -> str:
        found = read_live(run)
        return found["sites"].get(site, {}).get("state", "") if found else ""

    alarm = f"{text('alarms')}.includes"
    wanderer = f"{row('wanderer')}.split('\\n').join(' ').includes"
    steps: list[Facts] = [
        {"a rejected update": (
            lambda: state("greedy") == "rejected", f"{row('greedy')}.includes('rejected')"
        )},
        {"a round": (lambda: len(read_history(run)) >= 1, f"{text('head')}.includes('1 of 3')"),
         "a collapse alarm": (
            lambda: any(line["alarms"] for line in read_history(run)), f"{alarm}('collapse')"
        )},
        {"a site that vanishes": (
            lambda: state("wanderer") in AWAY, " || ".join(f"{wanderer}('{w}')" for w in AWAY)
        )},
        {"the same when it is back": (
            lambda: state("wanderer") in BACK,
            " || ".join(f"{wanderer}('{w}')" for w in BACK.values()),
        )},
        {"the end": (
            lambda: len(read_history(run)) >= 3 and not held(run / "lock"),
            f"{text('head')}.includes('finished')",
        )},
    ]  # fmt: skip
    good = True
    for number, facts in enumerate(steps):
        if number == 2:  # in the second round
            wait(lambda: len(read_history(run)) == 1 and state("wanderer") == "asked", 120)
            kill_supernode("wanderer")
        delays = delays_of(page, facts)
        if number == 2:
            page.picture(out / "vanished.png")
        for what, seconds in delays.items():
            print(f"{what}: shown {seconds:.1f} s after the run directory had it", flush=True)
            good &= seconds < MOST_NEWS_SECONDS
    return good


def delays_of(page: Page, facts: Facts) -> dict[str, float]:
    """Seconds from a fact in the run directory to the same on the screen."""
    known: dict[str, float] = {}
    shown: dict[str, float] = {}
    deadline = time.monotonic() + 300
    while len(shown) < len(facts):
        for what, (told, expression) in facts.items():
            if what not in known and told():
                known[what] = time.monotonic()
            if what in known and what not in shown and page.ask(expression):
                shown[what] = time.monotonic()
        assert time.monotonic() < deadline, f"never seen: {set(facts) - set(shown)}"
        time.sleep(0.05)
    return {what: shown[what] - known[what] for what in facts}


def kill_supernode(site: str) -> None:
    """Send SIGKILL to the SuperNode below a site's `join`; that starts it again."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            words = (directory / "cmdline").read_bytes().decode(errors="replace")
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            parents[int(directory.name)] = parent, words
    for pid, (parent, words) in parents.items():
        above = parents.get(parent, (0, ""))[1]
        if "client.supernode" in words and f"/{site}/site.toml" in above:
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"no SuperNode of {site}")


def pictures(page: Page, url: str, out: Path) -> None:
    """The page on a desktop, a phone and paper."""
    for name, width, mobile in (("desktop", 1400, False), ("phone", 390, True)):
        for scheme in ("light", "dark"):
            page.screen(width, 850, mobile=mobile, dark=scheme == "dark")
            page.open(url)
            page.wait(LIVE)
            page.picture(out / f"{name}-{scheme}.png")
    page.paper(out / "paper.pdf")


AWAY = ("lost", "asked again")
BACK = {"asked": "training", "admitted": "admitted"}
"""States of a site -> what the page calls them"""
LIVE = "document.getElementById('link').textContent === 'live'"


def text(part: str) -> str:
    return f"document.querySelector('[data-part={part}]').innerText"


def row(site: str) -> str:
    rows = "[...document.querySelectorAll('[data-part=sites] tbody tr')]"
    return f"(({rows}.find((row) => row.cells[0].innerText === '{site}') ?? {{}}).innerText ?? '')"


def wait(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def served(path: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`fedmermed-server page`, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "server", "page", str(path), "--listen", f"127.0.0.1:{port}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait(lambda: "http://" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(20)


def peak_mb(pid: int) -> float:
    """Most memory that a process has held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_recipe(out: Path, rounds: int) -> Path:
    """OUT/recipe.toml."""
    file = out / "recipe.toml"
    file.write_text(RECIPE % rounds)
    return file


if __name__ == "__main__":
    sys.exit(main())
