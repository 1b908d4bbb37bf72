"""How sure a measure is: the patients are drawn anew, many times, and everything is measured again.

    weights = draw_weights(groups, 1000, generator)          # once a task, for all its models
    a = resample(prediction_a, weights)["auroc"]             # Resampled: the value and its draws
    interval(a); compare(a, b); interval(mean_over_modalities({"cxr/nih": a, ...}))

Models measured with the same weights are compared on the same draws; tasks with weights of their
own are drawn independently. What is not in an interval: another training set or another seed.
benchmarks/coverage.py measures how often the intervals hold the truth and the tests err.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata, t

from core.errors import UserError
from core.evaluation.metrics import METRICS, class_groups, metrics, resampled_metrics
from core.evaluation.types import Interval, Prediction

Floats = NDArray[np.float64]
OVER_IMAGES: Final = ("accuracy", "brier", "ece")
"""Means over images; the other measures are means over classes, unsure where a class is rare."""
LEAST_FREEDOM: Final = 5
"""Degrees; with fewer, a class of one or two patients among many would blur the mean of all."""


@dataclass(frozen=True)
class Resampled:
    """A measure, and what it is on other draws of the patients.

    Attributes:
        value: on the test images as they are, between 0 and 1.
        draws: [B]; NaN where a draw has one class only.
        freedom: degrees of freedom of the draws' spread.
    """

    value: float
    draws: Floats
    freedom: float

    @property
    def variance(self) -> float:
        """Of the value, under drawing patients; without the bias of a sum over few patients."""
        draws = self.draws[np.isfinite(self.draws)]
        return float(draws.var(ddof=1)) * (1 + 1 / self.freedom) if len(draws) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """Difference a - b of two models on the same images, its 95 % interval, two-sided p."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Subgroup:
    """AUROC of the images that share a value of a column; None where it holds one class only."""

    group: str
    n: int
    auroc: float | None
    gap: float | None
    """to the group with the highest AUROC, 0 or negative"""


def draw_weights(
    groups: NDArray[np.int64], draws: int, generator: np.random.Generator
) -> NDArray[np.uint16]:
    """How often each image occurs [B, Q] when whole groups (patients) are drawn with replacement.

    Raises:
        UserError: all images are of one patient.
    """
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"all {len(groups)} test images are of one patient, at least 2 patients are needed for "
            "a confidence interval; add patients or split anew"
        )
    counts = np.empty((draws, len(names)), np.uint16)
    for row in counts:
        row[:] = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
    return counts[:, group]


def resample(prediction: Prediction, weights: NDArray[np.uint16]) -> dict[str, Resampled]:
    """Each measure with its draws.

    Args:
        prediction: scores of one model on one task.
        weights: [B, Q] of `draw_weights(prediction.groups, ...)`.

    Raises:
        UserError: the scores or labels cannot be measured, see `check_scores`.
    """
    scores, labels, groups = prediction.scores, prediction.labels, prediction.groups
    assert weights.shape[1:] == groups.shape
    where = f"{prediction.task}, {prediction.method} of {prediction.model}"
    values = metrics(scores, labels, where=where)
    draws = resampled_metrics(scores, labels, weights)
    patients = np.array(class_groups(labels, groups))
    # Welch and Satterthwaite: classes of equal spread, each known from its own patients.
    classes = (1 / patients).sum() ** 2 / (1 / patients**2 / np.maximum(patients - 1, 1)).sum()
    images = len(np.unique(groups)) - 1
    freedom = {name: images if name in OVER_IMAGES else classes for name in METRICS}
    return {
        name: Resampled(values[name], draws[name], max(freedom[name], LEAST_FREEDOM))
        for name in METRICS
    }


def interval(measure: Resampled) -> Interval:
    """95 % interval by the spread of the draws, on the scale of log odds, with Student's t.

    The percentiles of the draws hold a high AUROC far too seldom (78 % instead of 95 % at .99):
    its draws lean towards 0.5, its errors towards 1. Log odds straighten that (Pepe, The
    Statistical Evaluation of Medical Tests for Classification and Prediction, 2003), and Student's
    t answers for a spread known from few patients of a class. Where nothing spreads (all right,
    all wrong): Wilson's score interval, as for a share of that many patients.
    """
    value, variance, freedom = measure.value, measure.variance, measure.freedom
    if not 0 < value < 1 or variance < 1e-20:
        z, n = norm.ppf(0.975), freedom + 1
        middle = (value + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * np.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
        return Interval(value, max(0.0, float(middle - reach)), min(1.0, float(middle + reach)))
    reach = t.ppf(0.975, freedom) * np.sqrt(variance) / (value * (1 - value))
    logit = np.log(value / (1 - value))
    low, high = 1 / (1 + np.exp(reach - logit)), 1 / (1 + np.exp(-reach - logit))
    return Interval(value, float(low), float(high))


def compare(a: Resampled, b: Resampled) -> Comparison:
    """Paired bootstrap of a - b: both were measured on the same draws of the same images.

    The interval is the middle 95 % of the draws, p twice the share of draws beyond 0, counting the
    sample itself: 2 (b + 1) / (B + 1). Before that Student's t widens the draws, since a rare class
    is known from few patients. (Counting the draws as far from the difference as that is from 0
    errs in 0 to 2 % instead of 5 % near an AUROC of 1; so does DeLong's test.)
    """
    difference = a.value - b.value
    draws = a.draws - b.draws
    freedom = min(a.freedom, b.freedom)
    stretch = np.sqrt(1 + 1 / freedom) * t.ppf(0.975, freedom) / norm.ppf(0.975)
    draws = difference + stretch * (draws[np.isfinite(draws)] - difference)
    if len(draws) == 0:
        return Comparison(difference, -1.0, 1.0, 1.0)
    draws = draws.round(12)  # sums in another order are not another result
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    low, high = np.quantile(draws, [0.025, 0.975])
    p = min(1.0, 2 * (1 + beyond) / (1 + len(draws)))
    return Comparison(difference, float(low), float(high), p)


def mean_over_modalities(tasks: Mapping[str, Resampled]) -> Resampled:
    """Mean of the tasks ("modality/shard") of each modality, then over modalities, each once.

    Args:
        tasks: drawn independently of one another, each as many times.
    """
    modalities = [name.split("/")[0] for name in tasks]
    share = np.array([1 / modalities.count(m) / len(set(modalities)) for m in modalities])
    parts = np.array([part.variance for part in tasks.values()]) * share**2
    freedom = np.array([part.freedom for part in tasks.values()])
    draws = np.stack([part.draws for part in tasks.values()])  # [tasks, B]
    return Resampled(
        value=float(share @ [part.value for part in tasks.values()]),
        draws=share @ draws,
        freedom=float(parts.sum() ** 2 / (parts**2 / freedom).sum())
        if parts.any()
        else float(freedom.min()),
    )


def delong(labels: NDArray[np.int64], a: Floats, b: Floats) -> Comparison:
    """DeLong's test of two AUROCs on the same images, each of another patient.

    With several images a patient it takes them for independent and errs too often: use `compare`.
    DeLong, DeLong and Clarke-Pearson, Biometrics 44:837 (1988); by midranks as in Sun and Xu,
    IEEE Signal Processing Letters 21:1389 (2014): of m positive and n negative images, with
    midranks T among all and R among their own,
        AUROC = sum T_positive / (m n) - (m + 1) / (2 n)
        V10 = (T_positive - R_positive) / n        V01 = 1 - (T_negative - R_negative) / m
        covariance = cov(V10) / m + cov(V01) / n

    Args:
        labels: 0 or 1, [Q], at least two of each.
        a: scores of class 1 [Q] by one model.
        b: by the other.
    """
    positive = labels == 1
    m, n = int(positive.sum()), int((~positive).sum())
    assert min(m, n) > 1
    both = np.stack([a, b])
    ranks = rankdata(both, axis=1)
    above = (ranks[:, positive] - rankdata(both[:, positive], axis=1)) / n  # [2, m]
    below = 1 - (ranks[:, ~positive] - rankdata(both[:, ~positive], axis=1)) / m  # [2, n]
    difference = float(above[0].mean() - above[1].mean())
    covariance = np.cov(above) / m + np.cov(below) / n
    spread = float(np.sqrt(max(0.0, np.array([1, -1]) @ covariance @ np.array([1, -1]))))
    reach = norm.ppf(0.975) * spread
    p = 2 * norm.sf(abs(difference) / spread) if spread > 0 else float(difference == 0)
    return Comparison(difference, difference - reach, difference + reach, float(p))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below .05, the family errs once in at most 5 % of studies."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def subgroups(scores: Floats, labels: NDArray[np.int64], column: Sequence[str]) -> list[Subgroup]:
    """AUROC of each value of a column, and how far it is behind the best.

    A small group's gap is mostly chance: read it with n.

    Args:
        scores: [Q, C].
        labels: [Q] or [Q, C].
        column: Q strings, such as the sex of each image's patient; "" where it is not known.

    Raises:
        UserError: the column is of another length.
    """
    if len(column) != len(scores):
        raise UserError(
            f"the column of subgroups has {len(column)} values for {len(scores)} test images; "
            "give one value an image"
        )
    names = sorted(set(column))
    members = np.asarray(column) == np.array(names)[:, None]  # [groups, Q]
    found = resampled_metrics(scores, labels, members.astype(np.uint16))["auroc"]
    best = float(np.nanmax(found, initial=0))
    return [
        Subgroup(name, int(n), *(None, None) if np.isnan(value) else (value, value - best))
        for name, n, value in zip(names, members.sum(1), found.tolist(), strict=True)
    ]
