"""What feature extraction costs beyond the network: rates against a bare forward loop.

Three ways over the same random images of 64 px, on the same backbone and batches:
  bare      backbone(batch) and backbone(mirrored batch) on normalised tensors, already in memory
  features  core.evaluation.models.features on a memory-mapped shard: read, convert, normalise,
            forward of the images and their mirror images, tokens of the last three blocks
  embed     core.evaluation.embed on the shard, to an .npz file: hashes of model and data, parts
            and the joined table included
`bare` and `features` take turns, a thousand images each, so that other work on the machine slows
both alike; processor seconds tell more than the clock where it is busy.

Run: python benchmarks/extraction.py --model MODEL [--images 20000]
     [--threads 1] [--json OUT]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from core.evaluate import pixel_batches
from core.evaluation.embed import embed
from core.evaluation.models import LoadedModel, features, open_model
from core.modalities import MEAN_STD, MODALITIES
from core.shards import Shard, open_shard, write_shard

MODALITY, PX, BATCH, TURN = "pathology", 64, 128, 1024


class Stopwatch:
    """Seconds by the clock and of the processors, summed over turns."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def time(self, function: Callable[[], object]) -> None:
        """Run a function and add what it took."""
        wall, processor = time.perf_counter(), time.process_time()
        function()
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor


def random_shard(directory: Path, count: int) -> Shard:
    """Colour images, the most that can come in, on disk."""
    draws = np.random.default_rng(0)
    shard = Shard(
        name="noise",
        images=draws.integers(0, 256, (count, PX, PX, 3), dtype=np.uint8),
        modality=np.full(count, MODALITIES.index(MODALITY), np.int16),
        patient=np.arange(count),
        label=np.full(count, -1),
        split=np.full(count, "test"),
        classes={MODALITY: ()},
    )
    return open_shard(write_shard(directory, shard))


@torch.inference_mode()
def bare(loaded: LoadedModel, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        loaded.model.backbone(batch)
        loaded.model.backbone(batch.flip(-1))


def measure(loaded: LoadedModel, count: int, home: Path) -> dict[str, Stopwatch]:
    shard = random_shard(home / "noise", count)
    watches = {name: Stopwatch() for name in ("bare", "features", "embed")}
    device = next(loaded.model.backbone.parameters()).device
    for start in range(0, count, TURN):
        images = shard.images[start : start + TURN]
        pixels = pixel_batches(images, MEAN_STD[MODALITY], loaded.model.px, device, BATCH)
        batches = list(pixels)
        if start == 0:
            bare(loaded, batches[:2])  # what happens once
        watches["bare"].time(partial(bare, loaded, batches))
        watches["features"].time(partial(features, loaded, images, MODALITY, last_blocks=3))
    watches["embed"].time(
        lambda: embed(loaded, {"site": [shard]}, home / "embeddings.npz", last_blocks=3)
    )
    return watches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run, a model or a recipe")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = open_model(arguments.model)
    with tempfile.TemporaryDirectory() as home:
        watches = measure(loaded, arguments.images, Path(home))
    count = arguments.images
    print(f"{loaded.name}, {loaded.parameters:,} parameters, {loaded.model.px} px, {count} images")
    print("| | minutes | images a second | processor seconds | rate against bare |")
    print("|---|---:|---:|---:|---:|")
    rows = {}
    for name, watch in watches.items():
        ratio = watches["bare"].processor / watch.processor
        rows[name] = {"seconds": watch.wall, "processor_seconds": watch.processor, "rate": ratio}
        print(
            f"| {name} | {watch.wall / 60:.1f} | {count / watch.wall:.0f} | {watch.processor:.0f} "
            f"| {ratio:.3f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
