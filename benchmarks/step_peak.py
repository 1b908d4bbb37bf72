"""What a training step takes of memory: foretold for 16 GB, and held against counted bytes.

Counted is every tensor's storage that is alive, at its peak, as the operations of a step make them:
  step   whole steps of core.train on this CPU, small networks, fp32 and bf16
  pass   the student of the full-size recipes forward and backward through a pass of global
         views, fused attention, on tensors without data (torch's fake ones): nothing is computed,
         so a ViT-L/16 at 224 px fits anywhere
Neither knows the allocator's rounding, its gaps, or what the libraries of a GPU take.

Run: python benchmarks/step_peak.py     (a minute or two of processor time; needs no data)
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.backbone import Network
from core.batch import Batch
from core.config import Recipe, load_recipe
from core.step import views_together
from core.step_memory import step_memory
from core.train import new_state, train

ROOT = Path(__file__).resolve().parents[1]
GPU_BYTES, USABLE = 16 * 2**30, 0.9
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


def full_size(backbone: str, *, checkpointing: bool, batch: int, accumulate: int = 1) -> Recipe:
    """configs/vits16.toml with another backbone and batch: 2 + 10 views, the published memory."""
    recipe = load_recipe(ROOT / "configs" / "vits16.toml")
    model = {"backbone": backbone, "checkpointing": checkpointing}
    optim = {"batch_size": batch, "accumulate": accumulate}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "optim": recipe.optim.model_copy(update=optim),
        }
    )


def foretold(recipe: Recipe) -> int:
    """Bytes of a step on a GPU."""
    return step_memory(recipe, half=True, fused_attention=True).total


def largest_batch(backbone: str, *, checkpointing: bool) -> int:
    """Most images that go through a GPU of 16 GiB at a time, nine tenths of it used; 0: none."""
    low, high = 0, 4096
    while high - low > 1:
        middle = (low + high) // 2
        recipe = full_size(backbone, checkpointing=checkpointing, batch=max(middle, 2))
        fits = foretold(recipe) <= USABLE * GPU_BYTES
        low, high = (middle, high) if fits else (low, middle)
    return low


def table() -> str:
    """Markdown: what fits on 16 GiB."""
    lines = [
        "| 224 px, 2 + 10 views | images at a time | GiB | parts of a batch of 1,024 |",
        "|---|",
    ]
    lines[1] += "---|" * 3
    for backbone in MODELS:
        for checkpointing in (False, True):
            most = largest_batch(backbone, checkpointing=checkpointing)
            parts = -(-1024 // most)
            recipe = full_size(backbone, checkpointing=checkpointing, batch=1024, accumulate=parts)
            name = backbone + (", checkpointing" if checkpointing else "")
            lines.append(f"| {name} | {most} | {foretold(recipe) / 2**30:.1f} | {parts} |")
    return "\n".join(lines)


def counted_pass(backbone: str, *, checkpointing: bool, images: int) -> tuple[int, int]:
    """Counted and foretold bytes of the student's pass through the global views, forward and back.

    Beyond weights, gradients and what stands before the pass.
    """
    recipe = full_size(backbone, checkpointing=checkpointing, batch=images)
    px = recipe.views.global_px
    with torch.device("meta"):
        student = Network(recipe.model, px)
    if checkpointing:
        student.backbone.set_grad_checkpointing()
    with FakeTensorMode():
        student._apply(lambda tensor: torch.empty(tensor.shape))
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)
        pixels = torch.empty(views_together(recipe.views, images)[0] * images, 3, px, px)
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16):
                loss = student(pixels).sum()
            loss.backward()
    memory = step_memory(recipe, half=True, fused_attention=True)
    parameters = sum(p.numel() for p in student.parameters())
    return live.peak, memory.activations + memory.weights - 20 * parameters


def counted_step(*, half: bool, checkpointing: bool, accumulate: int) -> tuple[int, int]:
    """Counted and foretold bytes of whole steps of a small network on the CPU.

    Beyond networks and memory bank, which are there before.
    """
    options = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    table = {
        "model": {"options": options, "checkpointing": checkpointing},
        "optim": {
            "batch_size": 24, "accumulate": accumulate, "precision": "bf16" if half else "fp32",
        },
    }  # fmt: skip
    recipe = Recipe.model_validate(table, strict=False)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 64, 64), generator=draws, dtype=torch.uint8)
    batch = Batch(0, images, torch.arange(24))
    state = new_state(recipe, torch.device("cpu"), "benchmark")
    with LiveBytes() as live:
        train(state, lambda _: [batch], recipe, 2, site="benchmark")
    memory = step_memory(recipe, half=half, fused_attention=False)
    networks = 8 * sum(p.numel() for p in state.student.parameters())
    return live.peak, memory.total - networks - memory.bank


def main() -> None:
    """Print the tables."""
    print(table())
    print("\n| what | counted, MB | foretold, MB | foretold / counted |\n|---|---|---|---|")
    for backbone in MODELS:
        for checkpointing in (False, True):
            name = f"pass, {backbone}, 32 images" + (", checkpointing" if checkpointing else "")
            row(name, *counted_pass(backbone, checkpointing=checkpointing, images=32))
    for half in (True, False):
        for checkpointing in (False, True):
            for parts in (1, 4):
                name = f"step, {'bf16' if half else 'fp32'}, accumulate {parts}"
                name += ", checkpointing" if checkpointing else ""
                row(name, *counted_step(half=half, checkpointing=checkpointing, accumulate=parts))


def row(name: str, counted: int, expected: int) -> None:
    """Print a row as soon as it is there."""
    print(
        f"| {name} | {counted / 1e6:,.0f} | {expected / 1e6:,.0f} | {expected / counted:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
