"""One training step on a CPU against the published method's code, and against the machine's limit.

Real images, configs/seven_sites.toml, three cases (step_cases.py): seven modalities at one place
with the recipe's memory and with the published one, and one hospital of the recipe. Per case:
  agreement  losses of both steps, fed the same views in fp32, before anything is timed
  time       images to updated weights, augmentation included, in processor seconds of one thread:
             the published step (published_step.py), ours as the recipe runs it, and as ceilings a
             bare pass of the same networks over the same tokens in our precision: teacher forward,
             student forward and backward, nothing else; and loading with augmentation alone
  memory     cost of the memory's logits, forward and backward, in both forms; peak memory of two
             steps beyond the process before them, each in a process of its own
  limits     matrix products a second, operations and bytes of a step, a profile of ours
Ways take turns, so that other work on the machine slows all alike; ratios are medians of the turns'
ratios, with the lowest and the highest. Encoding PNG files for the published step isn't timed.

Run: OMP_NUM_THREADS=1 python benchmarks/training_step.py --data DIR [--cases pooled ...]
     [--turns 5] (some 3 minutes of processor time a case);
     python benchmarks/training_step.py --device cuda [--model vit_base_patch16_224] needs no data
Adds to benchmarks/training_step.json and prints the tables in Markdown.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from published_step import embed, masked_ring_loss
from step_cases import CASES, CPU, Case, Step, loss_curves, recipe_of, ring_of, site_data
from step_limits import bytes_and_flops, foretold_mb, matmul_rates, profile_table
from step_tables import tables

from core.augment import Views, make_views
from core.checkpoint import read_json, write_json
from core.device import uses_bf16
from core.losses import consistency_loss, random_blocks
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.randomness import torch_generator
from core.site_data import SiteData

RESULTS = Path(__file__).with_suffix(".json")
AGREEMENT_STEPS = 2


def processor_seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def take_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each way in each turn, after one turn that is not counted."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds[name].append(processor_seconds(way))
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Median, lowest and highest of the turns' ratios."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def views_of_step(step: Step) -> list[Views]:
    return [
        make_views(
            b.images[:], MODALITIES[b.modality], step.recipe.views, torch_generator(b.modality)
        )
        for b in step.batches(step.done)
    ]


def time_case(case: Case, data: SiteData, turns: int) -> dict[str, Any]:
    """Seconds of all ways of the case."""
    published, ours = Step("published", case, data), Step("ours", case, data)
    large = torch.cat([v.global_VBCHW for v in views_of_step(ours)], 1).flatten(0, 1)
    small = torch.cat([v.local_VBCHW for v in views_of_step(ours)], 1).flatten(0, 1)
    bf16 = uses_bf16(ours.recipe, CPU)

    def teacher() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            embed(ours.state.teacher, large)

    def student() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = embed(ours.state.student, large).sum() + embed(ours.state.student, small).sum()
        loss.backward()

    files = published.files()
    seconds = take_turns(
        {
            "published": lambda: published(files),
            "ours": ours,
            "teacher": teacher,
            "student": student,
            "views": lambda: views_of_step(ours),
        },
        turns,
    )
    bare = [a + b for a, b in zip(seconds["teacher"], seconds["student"], strict=True)]
    return {
        "precision": "bf16" if bf16 else "fp32",
        "seconds": {name: [min(s), statistics.median(s)] for name, s in seconds.items()},
        "times_the_published_rate": ratio(seconds["published"], seconds["ours"]),
        "share_of_bare": ratio(bare, seconds["ours"]),
        "share_of_bare_student": ratio(seconds["student"], seconds["ours"]),
        "views_times_the_need": ratio(seconds["ours"], seconds["views"]),
    }


def time_logits(case: Case, turns: int) -> dict[str, Any]:
    """The memory's logits and loss, forward and backward, masked ring against own rings."""
    recipe, count = recipe_of(case), len(case.modalities)
    dim, per = recipe.model.embedding_dim, case.entries // count
    draws = torch.Generator().manual_seed(0)
    bank = MemoryBank(per, dim, draws)
    share, modalities = case.batch // count, [MODALITIES.index(m) for m in case.modalities]
    ring, labels = ring_of(bank, modalities, share), torch.tensor(modalities)
    labels = labels.repeat_interleave(share)
    shape = (2 + recipe.views.local_views, case.batch, dim)
    student = torch.nn.functional.normalize(torch.randn(shape, generator=draws), dim=-1)
    student.requires_grad_()
    teacher = student[:2].detach()

    def masked() -> None:
        blocks = torch.randperm(len(ring.labels), generator=draws).chunk(case.blocks)
        logits, targets = ring.logits(student, labels), ring.logits(teacher, labels)
        masked_ring_loss(logits, targets, blocks, 0.1, 0.04).backward()

    def own() -> None:
        parts = [torch.stack(e.split(share, dim=1)) for e in (student, teacher)]  # [M, V, b, D]
        drawn = [random_blocks(per, case.blocks, draws) for _ in modalities]
        blocks = [torch.stack(cut) for cut in zip(*drawn, strict=True)]
        entries = torch.stack([bank.embeddings[m] for m in modalities])
        consistency_loss(*parts, entries, blocks, 0.1, 0.04)[0].mean().backward()

    seconds = take_turns({"masked": masked, "own": own}, turns)
    return {
        "logits_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "logits_cost": ratio(seconds["own"], seconds["masked"]),
    }


def measure_peak(arm: str, case: Case, data: SiteData) -> None:
    """Print the MB that two steps take at their peak beyond this process before them.

    Pages of libraries, which the first step reads in, are left out.
    """
    step = Step(arm, case, data)
    files = step.files() if arm == "published" else []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mb("RssAnon")
    step(files)
    step(files)
    print(memory_mb("VmHWM") - memory_mb("RssFile") - before)


def memory_mb(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / 1024


def peaks(name: str, data: Path) -> dict[str, float]:
    """Peak MB of a step of each arm."""
    result = {}
    for arm in ("published", "ours"):
        command = [sys.executable, __file__, "--data", str(data), "--cases", name, "--peak", arm]
        # So that freed memory goes back at once, and the peak is that of the tensors.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        result[arm] = float(done.stdout.split()[-1])
    return result


def measure(name: str, data: Path, turns: int) -> dict[str, Any]:
    """All figures of a case."""
    case = CASES[name]
    held = site_data(case, data)
    recipe = recipe_of(case)
    ours, theirs = loss_curves(
        recipe, lambda step: held.batches(recipe, "benchmark", step), AGREEMENT_STEPS
    )
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-3, f"the two steps' losses differ: {ours}, {theirs}"
    figures = {"date": time.strftime("%Y-%m-%d"), "loss_difference": worst}
    figures |= time_case(case, held, turns) | time_logits(case, turns)
    figures["peak_mb"] = peaks(name, data) | {"foretold": foretold_mb(recipe)}
    for arm in ("published", "ours"):
        step = Step(arm, case, held)
        figures[f"counted_{arm}"] = bytes_and_flops(step, step.files())
    figures["profile"] = profile_table(Step("ours", case, held))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of npz files")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="vit_small_patch16_224", help="with --device cuda")
    parser.add_argument("--batch", type=int, default=64, help="with --device cuda")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bf16, of the GPU (H100)")
    parser.add_argument("--peak", choices=["published", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda":
        from step_cuda import main as on_gpu

        on_gpu(options.model, options.batch, options.turns, options.peak_tflops)
        return
    if options.data is None:
        parser.error("--data is needed on a CPU")
    torch.set_num_threads(1)
    if options.peak:
        measure_peak(
            options.peak, CASES[options.cases[0]], site_data(CASES[options.cases[0]], options.data)
        )
        return
    results = read_json(RESULTS) if RESULTS.exists() else {"cases": {}}
    results |= {"torch": torch.__version__, "machine": machine(), "gflops": matmul_rates()}
    for name in options.cases:
        results["cases"][name] = measure(name, options.data, options.turns)
        write_json(RESULTS, results)
        print(name, "done; load average", os.getloadavg()[0], file=sys.stderr, flush=True)
    results["cases"] = {name: results["cases"][name] for name in CASES if name in results["cases"]}
    write_json(RESULTS, results)
    print(tables(results))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.processor()}, {os.cpu_count()} processors, one thread"


if __name__ == "__main__":
    main()
