"""Checks of the machine: disk, memory, processors, device. None of this needs torch."""

import os
import shutil
from pathlib import Path

from client.check.findings import Finding, gigabytes, green, red, yellow
from client.check.training import Measured
from client.site import SiteConfig

COPIES_OF_A_MESSAGE = 5.4
"""Memory of Flower's processes at a site by the size of a message: 3.4 times in the process that
trains and 2 times in the SuperNode, measured with 400 MB."""
IDLE_BYTES = 300_000_000
"""SuperNode and SuperExec, idle."""
SHARED_BYTES = 16_000_000


def disk(state_path: Path, measured: Measured) -> Finding:
    """Is there room for two rounds of state? The new one is complete before the old one goes."""
    place = next(path for path in (state_path, *state_path.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if not measured.private_bytes:
        return yellow(
            f"{gigabytes(free)} free for the state; not known how much it needs",
            "It is told once a training step has run.", free_bytes=free,
        )  # fmt: skip
    state = measured.private_bytes + measured.reply_bytes
    need = 2 * state
    if measured.devices > 1:  # client.ranks hands the round over, and its result back, in files
        need += measured.message_bytes + state
    found = f"{gigabytes(free)} free, the state needs {gigabytes(need)}"
    if free < need:
        return red(
            found,
            f"Free {gigabytes(need - free)} on the disk of '{place}', or move state_dir in the "
            "site file to a larger one.",
            free_bytes=free, needed_bytes=need,
        )  # fmt: skip
    return green(found, free_bytes=free, needed_bytes=need)


def memory(measured: Measured) -> Finding:
    """Does the peak of a training step fit beside Flower's processes and their messages?"""
    available = available_memory()
    messages = IDLE_BYTES + int(COPIES_OF_A_MESSAGE * measured.message_bytes)
    training = max(1, measured.devices) * measured.peak_bytes
    need = training + messages
    if available is None or not measured.peak_bytes:
        what = "available memory" if available is None else "the peak of a training step"
        return yellow(f"{what} cannot be told", "Watch the first round with: free -h")
    found = (
        f"{gigabytes(available)} available; a round needs {gigabytes(need)} "
        f"({gigabytes(training)} to train, {gigabytes(messages)} for Flower's messages)"
    )
    if available < need:
        return red(
            found,
            "Stop other programs or give this machine (or its container) more memory.",
            available_bytes=available, needed_bytes=need,
        )  # fmt: skip
    return green(found, available_bytes=available, needed_bytes=need)


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new process may take: the machine's, or its container's if that is less."""
    try:
        free = _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return None
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # or "max": no limit
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = _table(group / "memory.stat")
    except (OSError, ValueError):
        return free
    cached = lines["active_file"] + lines["inactive_file"]  # given up when a process needs it
    return min(free, limit - used + cached)


def _table(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines}


def processors(site: SiteConfig) -> Finding:
    """Are there as many CPU cores as the site file asks threads of?"""
    cores = len(os.sched_getaffinity(0))
    if site.threads > cores:
        return yellow(
            f"{site.threads} threads asked for on {cores} CPU core(s)",
            f"Set threads = {cores} in the site file: more threads than cores slow each other.",
        )
    asked = f"{site.threads} thread(s) asked for" if site.threads else "threads left to torch"
    return green(f"{cores} CPU core(s), {asked}", cores=cores)


def shared_memory(directory: Path = Path("/dev/shm")) -> Finding:
    """Locks between the processes of `prepare` live here."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        free = 0
    if free < SHARED_BYTES:
        return yellow(
            f"{gigabytes(free)} free in '{directory}'; fedmermed-site prepare may fail",
            "Start the container with --shm-size=64m or more.",
        )
    return green(f"{gigabytes(free)} free in '{directory}'")


def device(site: SiteConfig, measured: Measured) -> Finding:
    """What the site file asks for, and what torch finds."""
    if not measured.device:
        return red(
            f"'{site.device}' asked for: {measured.error or 'torch did not start'}",
            measured.remedy
            or 'Mend the driver or the torch build, or set device = "cpu" in the site file.',
        )
    asked = f"'{site.device}' asked for, "
    if measured.device.startswith("cuda"):
        if measured.devices > 1:
            asked += f"{measured.devices} GPUs train together, least free: "
        return green(
            f"{asked}{measured.gpu} with {gigabytes(measured.gpu_bytes)}, "
            f"{gigabytes(measured.gpu_free_bytes)} free, torch {measured.torch}",
            gpu_bytes=measured.gpu_bytes,
        )
    found = f"{asked}training on the CPU, torch {measured.torch}"
    if site.device == "auto" and Path("/proc/driver/nvidia/version").exists():
        return yellow(
            f"{found}; the machine has an NVIDIA driver but torch sees no GPU",
            "Install a CUDA build of torch that fits the driver (nvidia-smi shows its version), or "
            "let the container see the GPU (--gpus all).",
        )
    return green(found)
