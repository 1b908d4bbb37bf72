"""What a step of private training costs, beside the same step without privacy.

Command: OMP_NUM_THREADS=1 nice -n 5 python benchmarks/private_cost.py
Run time: about 8 minutes of one core.

Each way of getting gradients by patient takes its steps in a process of its own, on the same views:
teacher forward, student, loss, gradients, clip, noise, AdamW. Times are processor seconds on one
thread, the least of the repeats. A round measures all ways, one after the other; ratios are taken
within a round, and their spread over the rounds is printed. Memory is the peak of resident memory
above what the process held before its first step, the optimiser's moments included, in a process
that gives freed memory back at once, so that the peak is that of the tensors.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from opacus import GradSampleModule
from torch import Tensor
from torch.nn.functional import normalize

from core.backbone import Network, initialise, use_plain_attention
from core.config import ModelConfig
from core.losses import consistency_loss
from core.privacy.network import learning
from core.privacy.noise import PrivateRandom
from core.privacy.step import PrivateOptimizer
from core.privacy.unit import Comparison, PublicMemory, one_by_one, together, unit_loss

OPTIONS = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
LEAVES = {"class_token": False, "global_pool": "avg"}
"""With a frozen position embedding, a transformer whose learning weights all sit in layers that
Opacus knows; as timm builds it, it treats the whole network as one layer."""
WAYS = {
    "without privacy": ("plain", 0),
    "vmap, all at once": ("vmap", 64),
    "vmap, 16 at a time": ("vmap", 16),
    "vmap, 4 at a time": ("vmap", 4),
    "loop": ("loop", 1),
    "Opacus' hooks, the network as it is": ("hooks", 0),
    "Opacus' hooks, weights in layers": ("hooks in layers", 0),
}
CLIP, NOISE = 1.0, 1.0


def views(patients: int, px: int, local_views: int) -> tuple[Tensor, Tensor]:
    """Random global views [n, 2, 1, 3, P, P] and local views [n, L, 1, 3, P/2, P/2]."""
    draws = torch.Generator().manual_seed(0)
    large = torch.randn(patients, 2, 1, 3, px, px, generator=draws)
    return large, torch.randn(patients, local_views, 1, 3, px // 2, px // 2, generator=draws)


class InFull(torch.nn.Module):
    """A network whose every weight is used by its own layer, where hooks look.

    Ours computes the last block for the class token alone, with parts of its weights.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to unit embeddings [B, D]."""
        embeddings: Tensor = self.network.head(self.network.backbone(images))
        return embeddings


def steps_of(way: str, chunk: int, large: Tensor, small: Tensor) -> Callable[[], None]:
    """A function that takes one whole step."""
    options = OPTIONS | (LEAVES if way == "hooks in layers" else {})
    model = ModelConfig(options=options, head_hidden=256, embedding_dim=64)
    student, teacher = (Network(model, large.shape[-1]) for _ in range(2))
    for network in (student, teacher):
        use_plain_attention(network)
        initialise(network, torch.Generator().manual_seed(1))
    if way == "hooks in layers":
        student.backbone.pos_embed.requires_grad_(False)  # type: ignore[union-attr]
    entries = normalize(torch.randn(256, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    compared = Comparison(PublicMemory(entries, None), [torch.arange(256)], 0.1, 0.04)
    learns = {name: p for name, p in student.named_parameters() if p.requires_grad}
    learner = torch.optim.AdamW(learns.values(), lr=1e-4, fused=True)
    private = PrivateOptimizer(
        learner, learns, noise_multiplier=NOISE, clip_norm=CLIP, expected_patients=len(large),
        random=PrivateRandom(),
    )  # fmt: skip

    def targets(part: Tensor) -> Tensor:
        with torch.no_grad():
            rows: Tensor = teacher(part.flatten(0, 2))
        return rows.view(*part.shape[:3], -1)

    def batch_loss(embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over patients of the loss, from one pass a resolution."""
        crops = [part.transpose(0, 1).flatten(0, 2) for part in (large, small)]
        own = torch.cat([embed(c).view(-1, len(large), 64) for c in crops if len(c)])
        wanted = targets(large)[:, :, 0].transpose(0, 1)
        return len(large) * consistency_loss(own, wanted, entries, compared.blocks, 0.1, 0.04)[0]

    def without() -> None:
        learner.zero_grad()
        torch.autograd.backward(batch_loss(student) / len(large))
        learner.step()

    def ours() -> None:
        how = one_by_one if way == "loop" else together
        loss, parameters = unit_loss(student, [compared]), learning(student)
        for part, local in zip(large.split(chunk), small.split(chunk), strict=True):
            private.add(how(loss, parameters, part, local, targets(part))[0])
        private.step()

    if way == "plain":
        return without
    if way in ("vmap", "loop"):
        return ours
    hooked = GradSampleModule(InFull(student), loss_reduction="sum")

    def one_pass_a_crop(crops: Tensor) -> Tensor:
        # Rows of one pass are patients, and hooks add passes row by row; of views of all patients
        # in one pass they would make units of their own.
        return torch.cat([hooked(part) for part in crops.split(len(large))])

    def hooks() -> None:
        torch.autograd.backward(batch_loss(one_pass_a_crop))
        gradients = {name: p.grad_sample for name, p in learns.items()}  # type: ignore[attr-defined]
        private.add(gradients)
        private.step()

    return hooks


def measure(
    way: tuple[str, int], patients: int, px: int, local_views: int, repeats: int
) -> tuple[float, float]:
    """Processor seconds and MiB of a step."""
    torch.set_num_threads(1)
    take = steps_of(*way, *views(patients, px, local_views))
    before, seconds = _status("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")
    take()  # not timed; makes the optimiser's moments, which all ways have
    for _ in range(repeats):
        started = time.process_time()
        take()
        seconds.append(time.process_time() - started)
    return min(seconds), _status("VmHWM") - before


def _in_process(way: tuple[str, int], settings: tuple[int, ...]) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (way, *settings))


def _status(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--local-views", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = (arguments.patients, arguments.px, arguments.local_views, arguments.repeats)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(arguments.rounds):
        for name, way in WAYS.items():
            seconds, _ = _in_process(way, settings)
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by glibc when a process starts
            _, memory = _in_process(way, (*settings[:-1], 1))
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            found[name].append((seconds, memory))
    base = found["without privacy"]
    print("| | processor seconds | ratio (least to most) | MiB | ratio |")
    print("|---|---:|---:|---:|---:|")
    for name, rows in found.items():
        ratios = [own[0] / plain[0] for own, plain in zip(rows, base, strict=True)]
        memory = statistics.median(row[1] for row in rows)
        print(
            f"| {name} | {statistics.median(row[0] for row in rows):.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{memory:,.0f} | {memory / statistics.median(row[1] for row in base):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
