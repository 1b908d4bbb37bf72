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
from torch import nn

from core.backbone import BACKBONE, create_backbone, use_plain_attention
from core.checkpoint import Arrays
from core.config import Recipe
from core.evaluate import Features, Task, auroc, extract, fit_probe, knn_scores, measures
from core.evaluation.intervals import Resampled, draw_weights, resample
from core.evaluation.protocol import FeatureSource
from core.evaluation.types import Prediction
from core.randomness import numpy_generator

DRAWS: Final = 1000
LAST_BLOCKS: Final = 3
NEIGHBOURS: Final = 20
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


def of_network(recipe: Recipe, arrays: Arrays) -> FeatureSource:
    """The features of a network: its backbone's last blocks."""
    backbone, px = backbone_of(recipe, arrays), recipe.views.global_px
    blocks = min(LAST_BLOCKS, len(backbone.blocks))  # type: ignore[arg-type]

    def features(task: Task, indices: NDArray[np.int64]) -> Features:
        images = task.shard.images[indices]
        return extract(
            backbone, images, task.name, px, last_blocks=blocks, batch_size=IMAGES_A_PASS
        )

    return FeatureSource("network", features, blocks)


def measure(
    source: FeatureSource, tasks: Sequence[Task], *, test: bool = True
) -> dict[str, Measured]:
    """Modality -> what the features are worth.

    Args:
        source: where they come from; the vote sees the last block's.
        tasks: one a modality.
        test: False leaves the test split alone: its figures are those of val.
    """
    rows = {}
    for task in tasks:
        asked = task.test if test else task.val
        features = [source.extract(task, i) for i in (task.train, task.val, asked)]
        train, val, labels = (task.labels(i) for i in (task.train, task.val, asked))
        scale, probe = fit_probe(features[0], train, features[1], val)
        classes = len(task.shard.classes[task.name])

        def scores(
            part: NDArray[np.float32], scale=scale, probe=probe, classes=classes
        ) -> NDArray[np.float64]:
            full = np.zeros((len(part), classes))
            full[:, probe.classes_] = probe.predict_proba(scale.transform(part))
            return full

        last = features[0].shape[1] // source.blocks
        votes = knn_scores(
            features[0][:, -last:], train, features[2][:, -last:], neighbours=NEIGHBOURS
        )
        vote = measures(votes, labels)
        rows[task.name] = Measured(
            _resampled(task, asked, scores(features[2])),
            auroc(scores(features[1]), val),
            vote["auroc"],
            vote["accuracy"],
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
        float(np.mean([row.knn_accuracy for row in rows])),
    )
