"""The GPU part of training_step.py: rate, use of the device and peak memory, in three variants.

Random images of 256 px of all seven modalities, the views, head and memory of configs/vits16.toml
or configs/vitb16.toml (2 global views of 224 px, 10 local of 96), bf16. Not measured yet: no figure
of it is in the repository.
"""

import statistics
import time

import torch
from real_images import ROOT
from step_cases import SITE
from torch.utils.flop_counter import FlopCounterMode

from core.backbone import use_plain_attention
from core.batch import Batch
from core.config import Recipe, load_recipe
from core.modalities import MODALITIES
from core.step import TrainState
from core.step_memory import step_memory
from core.train import new_state, train

RECIPES = {"vit_small_patch16_224": "vits16", "vit_base_patch16_224": "vitb16"}
VARIANTS = ("fused attention", "plain attention", "fused attention, compiled")


def images_of(step: int, recipe: Recipe) -> list[Batch]:
    """The same noise at every step: reading is measured on a CPU."""
    share = recipe.optim.batch_size // len(MODALITIES)
    draws = torch.Generator().manual_seed(0)
    px = recipe.images.px
    return [
        Batch(
            modality,
            torch.randint(0, 256, (share, 3, px, px), generator=draws, dtype=torch.uint8),
            torch.arange(share),
        )
        for modality in range(len(MODALITIES))
    ]


def variant_state(name: str, recipe: Recipe) -> TrainState:
    """A fresh site on the GPU."""
    state = new_state(recipe, torch.device("cuda"), SITE)
    if "plain" in name:
        use_plain_attention(state.student)
        use_plain_attention(state.teacher)
    if "compiled" in name:
        state.student.compile(dynamic=False)
        state.teacher.compile(dynamic=False)
    return state


def seconds_of_step(state: TrainState, batches: list[Batch], recipe: Recipe) -> float:
    """By the clock, the device's work included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    train(state, lambda step: batches, recipe, 1, site=SITE)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main(model: str, batch: int, turns: int, peak_tflops: float) -> None:
    """Print a table; `peak_tflops` is the device's dense bf16 rate."""
    if model not in RECIPES:
        raise SystemExit(f"--model {model}: give one of {', '.join(RECIPES)}")
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; run without it to measure the CPU")
    recipe = load_recipe(ROOT / "configs" / f"{RECIPES[model]}.toml")
    batch = batch // len(MODALITIES) * len(MODALITIES)
    recipe = recipe.model_copy(
        update={"optim": recipe.optim.model_copy(update={"batch_size": batch})}
    )
    batches = images_of(0, recipe)
    with FlopCounterMode(display=False) as counter:
        seconds_of_step(variant_state(VARIANTS[0], recipe), batches, recipe)
    flops = counter.get_total_flops()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {model}, {batch} images")
    print("| variant | images/s | of the peak | memory, GiB | foretold |\n|---|---|---|---|---|")
    for name in VARIANTS:
        state = variant_state(name, recipe)
        for _ in range(3):  # compilation, and the moments' first allocation
            seconds_of_step(state, batches, recipe)
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(
            seconds_of_step(state, batches, recipe) for _ in range(max(turns, 10))
        )
        peak = torch.cuda.max_memory_allocated() / 2**30
        fused = "plain" not in name
        foretold = step_memory(recipe, half=True, fused_attention=fused).total / 2**30
        print(
            f"| {name} | {batch / seconds:.0f} | {flops / seconds / peak_tflops / 1e12:.1%} "
            f"| {peak:.1f} | {foretold:.1f} |",
            flush=True,
        )
        del state
        torch.cuda.empty_cache()
