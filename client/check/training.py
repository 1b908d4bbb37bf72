"""One training step of the recipe, in a process of its own: running out of memory is a red line."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from client.check.findings import Finding, duration, gigabytes, green, red, yellow
from core.checkpoint import read_json, write_json
from core.config import Recipe

LIMIT_SECONDS = 900
"""After so long a step is too slow for any study."""
SPARED_SHARE = 0.9
"""Of the free memory; the foretold bytes are without the allocator's gaps and the libraries."""
MESSAGE_SECONDS = 20
"""Flower starts a process for every message: 8 to 18 s measured."""


@dataclass(frozen=True)
class Measured:
    """What the process found; zero and empty stand for what it did not come to."""

    error: str = ""
    """Why it ended early."""
    remedy: str = ""
    """What to do about that, where the error says so."""
    out_of_memory: str = ""
    """'GPU' or 'memory', if that is why."""
    torch: str = ""
    device: str = ""
    """The (first) one that trains."""
    devices: int = 0
    """How many share a round's training."""
    gpu: str = ""
    gpu_bytes: int = 0
    gpu_free_bytes: int = 0
    """Of the GPU that has the least."""
    foretold_bytes: int = 0
    """What a step takes on one device, told from the recipe before it is tried."""
    free_bytes: int = 0
    """What that device had free then."""
    savings: tuple[tuple[str, int], ...] = ()
    """Changes of the recipe, and what a step would take with them."""
    step_seconds: float = 0.0
    """Median after the first step."""
    other_seconds: float = 0.0
    """A round's evaluation and refill, on average over rounds; estimated from one batch."""
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0
    message_bytes: int = 0
    """The global state as sent down."""
    reply_bytes: int = 0
    private_bytes: int = 0
    """What the site keeps of a round beside its reply."""


def measure(site_file: Path, recipe: Recipe | None) -> Measured:
    """Train a few steps as this site would, or (without a recipe) only look for the device."""
    missing = [name for name in ("torch", "timm") if importlib.util.find_spec(name) is None]
    if missing:
        return Measured(
            error=f"{' and '.join(missing)} not installed",
            remedy="Type: pip install 'fedmermed[site]'",
        )
    with tempfile.TemporaryDirectory() as directory:
        request, result = Path(directory) / "request.json", Path(directory) / "result.json"
        recipe_json = recipe.to_json() if recipe else None
        write_json(request, {"site_file": str(site_file.absolute()), "recipe": recipe_json})
        try:
            done = subprocess.run(
                [sys.executable, "-m", "client.check.step", str(request), str(result)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env=_environment(), timeout=LIMIT_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return replace(
                _read(result),
                error=f"no end after {duration(LIMIT_SECONDS)}",
                remedy="Train on a GPU, or ask the coordinator for a smaller recipe.",
            )
        measured = _read(result)
        if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return replace(measured, error="killed by the system", out_of_memory="memory")
        if done.returncode and not measured.error:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"it ended with status {done.returncode}"
            return replace(measured, error=why)
        return measured


def step(measured: Measured) -> Finding:
    """Did the step run, how long, and with how much memory?"""
    if measured.out_of_memory:
        where = measured.gpu if measured.out_of_memory == "GPU" else "this machine"
        return red(
            f"out of memory on {where}: {measured.error}",
            "Give it more memory, stop what else uses it, or ask the coordinator for a recipe "
            "with optim.accumulate = 2 or more, model.checkpointing = true or a smaller "
            "optim.batch_size.",
        )
    if measured.error:
        return red(
            measured.error,
            measured.remedy
            or 'Set device = "cpu" in the site file to see whether the GPU is at '
            "fault; if it is not, report this line.",
        )
    peak = f"{gigabytes(measured.peak_bytes)} of memory"
    if measured.gpu_peak_bytes:
        peak += f" and {gigabytes(measured.gpu_peak_bytes)} of the GPU's"
    share = f" (its share of the batch, one of {measured.devices})" if measured.devices > 1 else ""
    return green(
        f"{duration(measured.step_seconds)} on {measured.gpu or 'the CPU'}{share}, peak {peak}",
        step_seconds=round(measured.step_seconds, 4),
        peak_bytes=measured.peak_bytes, gpu_peak_bytes=measured.gpu_peak_bytes,
    )  # fmt: skip


def step_fits(measured: Measured) -> Finding:
    """What a step was foretold to take, against what its device had free."""
    need, free = measured.foretold_bytes, measured.free_bytes
    where = measured.gpu or "this machine"
    found = f"{gigabytes(need)} foretold for a step, {gigabytes(free)} free on {where}"
    values = {"foretold_bytes": need, "free_bytes": free}
    if need <= SPARED_SHARE * free:
        return green(found, **values)
    ways = [f"{change} ({gigabytes(takes)})" for change, takes in measured.savings]
    remedy = (
        f"Stop what else uses it, or ask the coordinator for a recipe with {' or '.join(ways)}, or "
        "with a smaller optim.batch_size."
    )
    if measured.step_seconds:  # it ran, if barely
        return yellow(found, remedy, **values)
    return red(found, remedy, **values)


def round_time(recipe: Recipe, measured: Measured) -> Finding:
    """How long a round and the study will take, held against the recipe's deadline."""
    federation = recipe.federation
    steps = federation.local_steps * measured.step_seconds
    one = steps + measured.other_seconds + MESSAGE_SECONDS
    deadline = federation.round_timeout_seconds
    found = (
        f"a round about {duration(one)}: {federation.local_steps:,} steps {duration(steps)}, "
        f"evaluation and memory {duration(measured.other_seconds)}, messages up to "
        f"{duration(MESSAGE_SECONDS)}; the study {duration(one * federation.rounds)}; "
        f"a round may take {duration(deadline)}"
    )
    figures = {"round_seconds": round(one, 1), "study_seconds": round(one * federation.rounds, 1)}
    if one > deadline:
        return red(
            found,
            "Train on a GPU or a faster one, or ask the coordinator to raise "
            "federation.round_timeout_seconds: this site would miss every round.",
            **figures,
        )
    if one > deadline / 2:
        return yellow(
            found,
            "Leave the machine to this work, or ask the coordinator to raise "
            "federation.round_timeout_seconds: a busy day could miss rounds.",
            **figures,
        )
    return green(found, **figures)


def _read(result: Path) -> Measured:
    if not result.exists():
        return Measured()
    facts = read_json(result)
    return Measured(**{**facts, "savings": tuple(map(tuple, facts["savings"]))})


def _environment() -> dict[str, str]:
    """Our packages found from anywhere, and threads that give way while they wait."""
    packages = str(Path(__file__).resolve().parents[2])
    search = [packages, os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in search if path),
    }
