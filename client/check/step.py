"""`python -m client.check.step REQUEST RESULT`: the process that imports torch and trains.

It writes RESULT anew at every stage, so that its parent knows how far it came when it is killed.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from client.check.findings import from_error
from client.check.machine import available_memory
from client.check.private_step import measure_private_rounds
from client.check.training import Measured
from client.site import SiteConfig, load_site
from core.checkpoint import read_json, write_json
from core.config import Recipe, recipe_from_json
from core.device import resolve_devices, uses_bf16
from core.errors import UserError
from core.evaluate import extract, labelled_tasks
from core.shards import Shard
from core.site_data import SiteData
from core.site_round import usual_of
from core.sites import open_site
from core.step import TrainState
from core.step_memory import step_memory
from core.train import embed_global, network_arrays, new_state, private_arrays, train

Write = Callable[[Measured], None]

MOST_STEPS = 5
TIMED_SECONDS = 20.0
"""No further step is begun after so long."""
PROBE_IMAGES = 64
USED_SHARE = 0.9
"""Of the memory that is available, at most."""


def main() -> None:
    """Measure, or write why not."""
    request, result = read_json(Path(sys.argv[1])), Path(sys.argv[2])
    _die_first()
    measured = Measured(torch=torch.__version__)

    def write(now: Measured) -> None:
        nonlocal measured
        measured = now
        write_json(result, asdict(now))

    try:
        site = load_site(Path(request["site_file"]))
        write(_device(site, measured))
        if measured.device == "cpu" and (available := available_memory()):
            _limit_memory(available)
        if request["recipe"] is not None:
            _training(site, recipe_from_json(request["recipe"], "the recipe"), measured, write)
    except UserError as error:
        finding = from_error(error)
        write(replace(measured, error=finding.found, remedy=finding.remedy))
    except (RuntimeError, MemoryError) as error:
        where = _out_of_memory(error)
        if not where:
            raise
        write(replace(measured, error="an allocation failed", out_of_memory=where))


def _device(site: SiteConfig, measured: Measured) -> Measured:
    if site.threads:
        torch.set_num_threads(site.threads)
    names = resolve_devices(site.device, site.devices)
    measured = replace(measured, device=names[0], devices=len(names))
    if names[0] == "cpu":
        return measured
    (free, total), name = min((torch.cuda.mem_get_info(name), name) for name in names)
    gpu = torch.cuda.get_device_name(name)
    return replace(measured, device=name, gpu=gpu, gpu_bytes=total, gpu_free_bytes=free)


def _training(site: SiteConfig, recipe: Recipe, measured: Measured, write: Write) -> None:
    """Train on the site's images from random weights: time and memory do not depend on them."""
    shards = [shard for path in site.shard_paths for shard in open_site(path)]
    data = SiteData(shards)
    if not data.pools:
        raise UserError("no image is in the split 'train'; prepare the shard again with some")
    if recipe.privacy.mode == "record":
        alone = replace(measured, devices=1)  # as client.rounds takes no more for it
        measured = measure_private_rounds(site, recipe, alone, shards)
        gpu_peak = _gpu_peak(measured.device)
        return write(replace(measured, peak_bytes=_peak_bytes(), gpu_peak_bytes=gpu_peak))
    measured = _foretold(recipe, measured)
    write(measured)
    recipe = _share(recipe, measured.devices)
    state = new_state(recipe, torch.device(measured.device), site.name)
    if recipe.loss.description_weight:
        state.usual = usual_of(recipe, state, data, site.name)

    def one_step() -> float:
        started = time.perf_counter()
        train(state, lambda n: data.batches(recipe, site.name, n), recipe, 1, site=site.name)
        _finish(state.device)
        return time.perf_counter() - started

    began = time.perf_counter()
    seconds = [one_step()]  # allocates, compiles kernels, reads the disk: slower than the others
    while len(seconds) <= MOST_STEPS and (
        len(seconds) == 1 or time.perf_counter() - began < TIMED_SECONDS
    ):
        seconds.append(one_step())

    network = sum(array.nbytes for array in network_arrays(state.student).values())
    kept = private_arrays(state, keep_memory=recipe.memory.at_round_start == "kept")
    measured = replace(
        measured,
        step_seconds=statistics.median(seconds[1:]),
        message_bytes=2 * network,
        reply_bytes=2 * network if recipe.federation.teacher == "average" else network,
        private_bytes=sum(array.nbytes for array in kept.values()),
    )
    write(measured)
    measured = replace(measured, other_seconds=_other_seconds(recipe, state, data, shards, site))
    gpu_peak = _gpu_peak(measured.device)
    return write(replace(measured, peak_bytes=_peak_bytes(), gpu_peak_bytes=gpu_peak))


def _foretold(recipe: Recipe, measured: Measured) -> Measured:
    """What a step takes on one device, as it is and with changes that make it smaller."""
    device = torch.device(measured.device)

    def takes(*, checkpointing: bool, accumulate: int) -> int:
        changed = recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update={"checkpointing": checkpointing}),
                "optim": recipe.optim.model_copy(update={"accumulate": accumulate}),
            }
        )
        return step_memory(
            changed, half=uses_bf16(recipe, device), fused_attention=device.type == "cuda",
            devices=measured.devices,
        ).total  # fmt: skip

    now, parts = recipe.model.checkpointing, recipe.optim.accumulate
    savings = []
    if not now:
        takes_less = takes(checkpointing=True, accumulate=parts)
        savings.append(("model.checkpointing = true", takes_less))
    for more in (2 * parts, 4 * parts):
        if more * measured.devices <= recipe.optim.batch_size:
            takes_less = takes(checkpointing=now, accumulate=more)
            savings.append((f"optim.accumulate = {more}", takes_less))
    free = measured.gpu_free_bytes
    if device.type == "cpu":
        free = (available_memory() or 0) // measured.devices
    return replace(
        measured,
        foretold_bytes=takes(checkpointing=now, accumulate=parts),
        free_bytes=free,
        savings=tuple(savings),
    )


def _share(recipe: Recipe, devices: int) -> Recipe:
    """The recipe with one device's share of a batch."""
    share = max(2, -(-recipe.optim.batch_size // devices))
    parts = min(recipe.optim.accumulate, share)
    optim = recipe.optim.model_copy(update={"batch_size": share, "accumulate": parts})
    return recipe.model_copy(update={"optim": optim})


def _other_seconds(
    recipe: Recipe, state: TrainState, data: SiteData, shards: Sequence[Shard], site: SiteConfig
) -> float:
    """A round's evaluation and refill of the memory, from the time of one batch of each."""
    seconds = 0.0
    if recipe.memory.at_round_start == "refilled":
        modality, pool = next(iter(data.pools.items()))
        batch = data.batch(modality, pool[: recipe.optim.batch_size])
        once = _seconds(state, lambda: embed_global(state, batch, recipe, site.name, 0))
        entries = recipe.memory.entries_per_modality
        images = sum(min(entries, len(pool)) for pool in data.pools.values())
        seconds += once / len(batch.images) * images
    tasks = labelled_tasks(list(shards)) if recipe.evaluation.every_rounds else []
    if tasks:
        pixels, backbone = tasks[0].shard.images[:PROBE_IMAGES], state.teacher.backbone
        name, px = tasks[0].name, recipe.views.global_px
        once = _seconds(state, lambda: extract(backbone, pixels, name, px, last_blocks=1))
        most = recipe.evaluation.max_images
        images = sum(min(most, len(task.train)) + len(task.val) for task in tasks)
        seconds += once / len(pixels) * images / recipe.evaluation.every_rounds
    return seconds


def _seconds(state: TrainState, call: Callable[[], object]) -> float:
    call()
    _finish(state.device)
    started = time.perf_counter()
    call()
    _finish(state.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _out_of_memory(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "GPU"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "memory"
    return ""


def _gpu_peak(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_reserved(device)


def _peak_bytes() -> int:
    """Largest resident size of this process alone (getrusage would count its parent's too)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _die_first() -> None:
    """When memory runs out, the kernel is to end this process and no other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _limit_memory(count: int) -> None:
    """Let an allocation fail before the machine runs out: others work on it too.

    On the CPU only; a CUDA driver maps more than it uses.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(count * USED_SHARE)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


if __name__ == "__main__":
    main()
