"""What the parts of an evaluation hand to one another."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """Scores of one model on the test split of one task, by one method.

    Attributes:
        model: name in the report.
        task: "modality/shard".
        method: "probe", "knn11", "knn20" or "finetune".
        fraction: percent of the labelled training images used.
        seed: which subset was drawn, and other randomness of the method.
        n_train: labelled training images used.
        scores: float64 [Q, C]; rows sum to 1 unless the task is multi-label.
        labels: class numbers int64 [Q], or 0/1 int64 [Q, C] when multi-label.
        groups: int64 [Q], the patient of each image: resampling draws patients.
        classes: C names.
    """

    model: str
    task: str
    method: str
    fraction: float
    seed: int
    n_train: int
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether an image may carry several labels."""
        return self.labels.ndim == 2
