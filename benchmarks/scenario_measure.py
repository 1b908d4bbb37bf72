"""What a backbone is worth: a linear probe on the test split, on the same draws of the same images.

The probe learns from the train split and its strength is chosen on val; the test images' patients
are drawn anew DRAWS times, the same draws for every arm, scenario and seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.backbone import BACKBONE, create_backbone, use_plain_attention
from core.checkpoint import Arrays
from core.config import Recipe
from core.evaluate import Task, auroc, extract, fit_probe, knn_scores
from core.evaluation.intervals import Resampled, draw_weights, resample
from core.evaluation.types import Prediction
from core.randomness import numpy_generator

DRAWS: Final = 1000
LAST_BLOCKS: Final = 3
NEIGHBOURS: Final = 20


@dataclass(frozen=True)
class Measured:
    """One backbone on one modality."""

    test: Resampled
    """AUROC of the probe and its draws."""
    val: float
    """The same on the split that chose its strength; all that tuning sees."""
    knn: float
    """AUROC of a vote on the test split."""


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


def measure(
    backbone: nn.Module, tasks: Sequence[Task], px: int, *, test: bool = True
) -> dict[str, Measured]:
    """Modality -> what the backbone is worth.

    Args:
        backbone: a timm vision transformer.
        tasks: one a modality.
        px: side of its images.
        test: False leaves the test split alone: its figures are those of val.
    """
    rows = {}
    for task in tasks:
        asked = task.test if test else task.val
        features = [
            extract(backbone, task.shard.images[i], task.name, px, last_blocks=LAST_BLOCKS)
            for i in (task.train, task.val, asked)
        ]
        train, val, labels = (task.labels(i) for i in (task.train, task.val, asked))
        scale, probe = fit_probe(features[0], train, features[1], val)
        classes = len(task.shard.classes[task.name])

        def scores(
            part: NDArray[np.float32], scale=scale, probe=probe, classes=classes
        ) -> NDArray[np.float64]:
            full = np.zeros((len(part), classes))
            full[:, probe.classes_] = probe.predict_proba(scale.transform(part))
            return full

        last = features[0].shape[1] // LAST_BLOCKS
        votes = knn_scores(
            features[0][:, -last:], train, features[2][:, -last:], neighbours=NEIGHBOURS
        )
        rows[task.name] = Measured(
            _resampled(task, asked, scores(features[2])),
            auroc(scores(features[1]), val),
            auroc(votes, labels),
        )
    return rows


def _resampled(task: Task, indices: NDArray[np.int64], scores: NDArray[np.float64]) -> Resampled:
    groups = task.shard.patient[indices]
    weights = draw_weights(groups, DRAWS, numpy_generator("test images", task.name))
    prediction = Prediction(
        model="", task=task.name, method="probe", fraction=100.0, seed=0, n_train=len(task.train),
        scores=scores, labels=task.labels(indices), groups=groups,
        classes=task.shard.classes[task.name],
    )  # fmt: skip
    return resample(prediction, weights)["auroc"]


def mean_of(parts: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """Mean over models that were measured on some modalities each, such as sites on their own."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _mean([part[name] for part in parts if name in part]) for name in names}


def _mean(rows: Sequence[Measured]) -> Measured:
    tests = [row.test for row in rows]
    return Measured(
        Resampled(
            float(np.mean([t.value for t in tests])),
            np.mean([t.draws for t in tests], axis=0),
            tests[0].freedom,  # of the test set's patients, the same for all
        ),
        float(np.mean([row.val for row in rows])),
        float(np.mean([row.knn for row in rows])),
    )
