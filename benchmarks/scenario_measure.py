"""What features are worth: a linear probe on the test split, on the same draws of the same images.

The probe learns from the train split and its strength is chosen on val; the test images' patients
are drawn anew DRAWS times, the same draws for every arm, scenario and seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.backbone import BACKBONE, create_backbone, use_plain_attention
from core.checkpoint import Arrays
from core.config import Recipe
from core.evaluate import (
    Features,
    Task,
    auroc,
    block_tokens,
    fit_probe,
    knn_scores,
    measures,
    pixel_batches,
)
from core.evaluation.intervals import Resampled, draw_weights, resample
from core.evaluation.protocol import FeatureSource
from core.evaluation.types import Prediction
from core.modalities import MEAN_STD
from core.randomness import numpy_generator

DRAWS: Final = 1000
LAST_BLOCKS: Final = 3
NEIGHBOURS: Final = 20
OTHERS: Final = ("standard", "early")
"""Probes on class and mean patch tokens of the image alone, as is usual; and on the features of the
main one with mean and deviation of the patch tokens before the first block."""
IMAGES_A_PASS: Final = 32
"""So that more of the activations stay in a core's cache; the features are the same bits."""


@dataclass(frozen=True)
class Measured:
    """One source of features on one modality."""

    test: Resampled
    """AUROC of the probe and its draws."""
    val: float
    """The same on the split that chose its strength; all that tuning sees."""
    knn: float
    """AUROC of a vote on the test split."""
    knn_accuracy: float
    """Share of the test split that the vote gets right."""
    others: Mapping[str, Resampled]
    """As `test`, of the other probes in OTHERS; none where only val was asked for."""


def backbone_of(recipe: Recipe, arrays: Arrays) -> nn.Module:
    """The backbone of a network's weights."""
    backbone = create_backbone(recipe.model, recipe.views.global_px)
    weights = {
        name.removeprefix(BACKBONE): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(BACKBONE)
    }
    backbone.load_state_dict(weights)
    use_plain_attention(backbone)
    return backbone


def of_network(
    recipe: Recipe, arrays: Arrays, device: str = "cpu"
) -> tuple[FeatureSource, dict[str, FeatureSource]]:
    """What `extract` takes of a network, and what the probes in OTHERS read.

    One pass through the network serves all.
    """
    backbone, px = backbone_of(recipe, arrays).eval().to(device), recipe.views.global_px
    blocks = min(LAST_BLOCKS, len(backbone.blocks))  # type: ignore[arg-type]
    found: dict[tuple[str, bytes], dict[str, Features]] = {}
    entering: list[Tensor] = []
    backbone.blocks[0].register_forward_pre_hook(  # type: ignore[index,operator,union-attr]
        lambda module, inputs: entering.append(inputs[0])
    )

    def seen(pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = block_tokens(backbone, pixels, blocks)
        early = entering.pop()[:, backbone.num_prefix_tokens :].float()  # type: ignore[misc]
        return tokens, torch.cat([early.mean(1), early.std(1, correction=0)], 1)

    @torch.inference_mode()
    def all_of(task: Task, indices: NDArray[np.int64]) -> dict[str, Features]:
        key = (task.name, indices.tobytes())
        if key not in found:
            images = task.shard.images[indices]
            rows = []
            place = torch.device(device)
            for pixels in pixel_batches(images, MEAN_STD[task.name], px, place, IMAGES_A_PASS):
                (ahead, early), (mirrored, late) = seen(pixels), seen(pixels.flip(-1))
                usual = ahead.unflatten(1, (blocks, 3, -1))[:, :, :2].flatten(1)
                full = (ahead + mirrored) / 2
                rows.append((full, usual, torch.cat([full, (early + late) / 2], 1)))
            parts = (torch.cat(part).cpu().numpy() for part in zip(*rows, strict=True))
            found[key] = dict(zip(("network", *OTHERS), parts, strict=True))
        return found[key]

    def source(name: str) -> FeatureSource:
        return FeatureSource(name, lambda task, indices: all_of(task, indices)[name], blocks)

    return source("network"), {name: source(name) for name in OTHERS}


def measure(
    source: FeatureSource,
    others: Mapping[str, FeatureSource],
    tasks: Sequence[Task],
    *,
    test: bool = True,
) -> dict[str, Measured]:
    """Modality -> what the features are worth.

    Args:
        source: where they come from; the vote sees the last block's.
        others: where those of other probes come from; `source` itself is not probed again.
        tasks: one a modality.
        test: False leaves the test split alone: its figures are those of val.
    """
    rows = {}
    for task in tasks:
        asked = task.test if test else task.val
        features = [source.extract(task, i) for i in (task.train, task.val, asked)]
        last = features[0].shape[1] // source.blocks
        votes = knn_scores(
            features[0][:, -last:], task.labels(task.train), features[2][:, -last:],
            neighbours=NEIGHBOURS,
        )  # fmt: skip
        vote = measures(votes, task.labels(asked))
        val, probe = _probe(task, asked, features)
        found = {}
        for name, other in others.items() if test else ():
            parts = [other.extract(task, i) for i in (task.train, task.val, asked)]
            found[name] = probe if other is source else _probe(task, asked, parts)[1]
        rows[task.name] = Measured(probe, val, vote["auroc"], vote["accuracy"], found)
    return rows


def _probe(
    task: Task, asked: NDArray[np.int64], features: Sequence[Features]
) -> tuple[float, Resampled]:
    """AUROC of a probe on val, and on the asked split with its draws."""
    train, val = task.labels(task.train), task.labels(task.val)
    scale, probe = fit_probe(features[0], train, features[1], val)

    def scores(part: Features) -> NDArray[np.float64]:
        full = np.zeros((len(part), len(task.shard.classes[task.name])))
        full[:, probe.classes_] = probe.predict_proba(scale.transform(part))
        return full

    return auroc(scores(features[1]), val), resampled(
        task, asked, scores(features[2]), task.labels(asked)
    )


def resampled(
    task: Task,
    indices: NDArray[np.int64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    name: str = "test images",
) -> Resampled:
    """AUROC of a task's images and its draws, the same for the same name; labels [n] or [n, C]."""
    groups = task.shard.patient[indices]
    weights = draw_weights(groups, DRAWS, numpy_generator(name, task.name))
    prediction = Prediction(
        model="", task=task.name, method="probe", fraction=100.0, seed=0, n_train=len(task.train),
        scores=scores, labels=labels, groups=groups,
        classes=task.shard.classes[task.name],
    )  # fmt: skip
    return resample(prediction, weights)["auroc"]


def mean_of(parts: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """Mean over models that were measured on some modalities each, such as sites on their own."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _mean([part[name] for part in parts if name in part]) for name in names}


def _mean(rows: Sequence[Measured]) -> Measured:
    return Measured(
        _mean_draws([row.test for row in rows]),
        float(np.mean([row.val for row in rows])),
        float(np.mean([row.knn for row in rows])),
        float(np.mean([row.knn_accuracy for row in rows])),
        {name: _mean_draws([row.others[name] for row in rows]) for name in rows[0].others},
    )


def _mean_draws(parts: Sequence[Resampled]) -> Resampled:
    return Resampled(
        float(np.mean([part.value for part in parts])),
        np.mean([part.draws for part in parts], axis=0),
        parts[0].freedom,  # of the test set's patients, the same for all
    )
