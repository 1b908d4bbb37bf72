"""A round on several devices of a site: a process for each, and this one to watch over them.

The processes (`client.rank`) only compute. Who answers the coordinator starts them for a round,
hands it over in files, and alone writes the site's state, its progress and its audit file. It
touches no GPU, so that a rank that hangs or dies in a driver takes nothing with it.

**Guarantees**:
    - When a rank ends before its work is done, however it ended, all others are ended, the round
      fails with one line that names rank, device and reason, and the state is as it was before.
    - When this process ends, however it ended, the ranks end.
    - What is handed over holds patient embeddings: it lies in the study's own directory, for its
      owner alone, until the round ends; after a kill, until the study's next round.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.parts import python_path
from client.rank import FACTS, PRIVATE, RECEIVED, REQUEST, UPDATE
from client.site import SiteConfig
from client.state import SiteState
from core.checkpoint import Arrays, load_arrays, read_json, save_arrays, write_json
from core.config import Recipe
from core.errors import UserError
from core.wire import GlobalState, SiteUpdate

PREFIX: Final = ".ranks-"
LAST_WORDS_SECONDS: Final = 3.0
"""How long to listen for the reason of a rank that another one has lost."""

OnReport = Callable[[int, int, float, int | None], None]
"""Called with steps done, steps asked for, the loss, and the first GPU's peak of memory (bytes)."""


@dataclass
class _Rank:
    """A process, and what it said."""

    name: str
    process: subprocess.Popen[bytes]
    half: bytes = b""
    error: str = ""
    """What went wrong here."""
    lost: str = ""
    """What it saw of something that went wrong elsewhere."""

    def hear(self, data: bytes, on_report: OnReport) -> None:
        *lines, self.half = (self.half + data).split(b"\n")
        for line in lines:
            words = json.loads(line)
            if "done" in words:
                on_report(words["done"], words["steps"], words["loss"], words["gpu_bytes"])
            self.error = words.get("error", self.error)
            self.lost = words.get("lost", self.lost)

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def reason(self) -> str:
        status = self.process.returncode
        if self.error or self.lost:
            return self.error or f"it lost the others ({self.lost})"
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}; memory may have run out"
        return f"it ended with status {status}"


def train_on_ranks(
    recipe: Recipe,
    received: GlobalState,
    state: SiteState,
    *,
    site: SiteConfig,
    first_step: int,
    devices: Sequence[str],
    on_report: OnReport,
) -> tuple[SiteUpdate, Arrays]:
    """Train a round on several devices; see `core.site_round.site_round` for the result.

    Args:
        recipe: The study.
        received: The global state.
        state: The study's, which this process has locked.
        site: The site's file.
        first_step: Global step at which the round starts.
        devices: torch's name of each rank's device.
        on_report: Progress.

    Raises:
        UserError: a rank failed; the text says which, and why.
    """
    for left in state.directory.glob(f"{PREFIX}*"):  # of a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=state.directory) as name:
        directory = Path(name)
        private = state.private_file()
        save_arrays(directory / RECEIVED, received.to_arrays(), sync=False)
        request = {
            "site": site.name,
            "shards": [str(path) for path in site.shard_paths],
            "recipe": recipe.to_json(),
            "first_step": first_step,
            "devices": list(devices),
            "threads": site.threads or max(1, len(os.sched_getaffinity(0)) // len(devices)),
            "private": str(private or ""),
        }
        write_json(directory / REQUEST, request)
        run_ranks(directory, devices, on_report)
        facts = read_json(directory / FACTS)
        arrays = GlobalState.from_arrays(load_arrays(directory / UPDATE)[0])
        kept, _ = load_arrays(directory / PRIVATE)
    update = SiteUpdate(
        round_number=first_step // recipe.federation.local_steps + 1,
        student=arrays.student,
        teacher=arrays.teacher,
        prototypes=arrays.prototypes,
        num_examples=facts["num_examples"],
        metrics=facts["metrics"],
    )
    return update, kept


def run_ranks(directory: Path, devices: Sequence[str], on_report: OnReport) -> None:
    """Start a process for each device, listen to them, and end them all.

    Raises:
        UserError: one of them failed.
    """
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": python_path(os.environ)}
    if sys.platform == "linux":  # the ranks meet on this machine, out of sight of its network
        environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **environment}
    ranks: list[_Rank] = []
    with ExitStack() as ends:
        for number, device in enumerate(devices):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "client.rank", str(directory), str(number)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )  # fmt: skip
            ends.enter_context(process)
            ends.callback(process.kill)
            ranks.append(_Rank(f"rank {number} of {len(devices)}, on {device}", process))
        _listen(ranks, on_report)
        failed = [rank for rank in ranks if rank.failed]
    if failed:
        # What went wrong at a rank explains what the others saw of it.
        first = min(failed, key=lambda rank: (not rank.error, bool(rank.lost)))
        raise UserError(
            f"training on {len(devices)} devices failed at {first.name}: {first.reason()}; mend "
            "that, or set devices = 1 in the site file to train on one"
        )


def _listen(ranks: Sequence[_Rank], on_report: OnReport) -> None:
    """Until all have ended, or one has failed and the reason is told or long in coming."""
    deadline: float | None = None
    with selectors.DefaultSelector() as outputs:
        for rank in ranks:
            assert rank.process.stdout is not None
            outputs.register(rank.process.stdout, selectors.EVENT_READ, rank)
        while outputs.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in outputs.select(left):
                rank = key.data
                if data := os.read(key.fd, 65_536):
                    rank.hear(data, on_report)
                    continue
                outputs.unregister(key.fileobj)  # it closed its output: it has ended
                rank.process.wait()
                if rank.failed:
                    if rank.error or not rank.lost:
                        return
                    deadline = deadline or time.monotonic() + LAST_WORDS_SECONDS
