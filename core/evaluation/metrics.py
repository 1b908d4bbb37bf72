"""How good class scores are: nine measures, once by scikit-learn and once for many resamplings.

Every measure lies between 0 and 1. "A class" below is a question of its own, this class against
the rest; a class that no image has (or that all have) is left out of the means.
  auroc, auprc        mean over classes; auprc is the average precision
  accuracy            share of images whose highest score is the true class
  balanced_accuracy   mean over classes of the sensitivity
  f1                  mean over classes
  sensitivity,        mean over classes, the class with the highest score being chosen; with two
  specificity         classes there is one question, and they are those of the second class
  brier               half of mean |scores - one-hot truth|^2, which for two classes is the usual
                      mean (score - truth)^2
  ece                 expected calibration error of the highest score, 15 bins of equal width;
                      it is biased upwards on small test sets
Where an image may carry several labels, each label is a question, chosen from .5 on, and all are
means over labels: accuracy of its yes and no, balanced accuracy of its sensitivity and
specificity, brier of its squared error, ece of its score.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from core.errors import UserError

METRICS: Final = (
    *("auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"),
    *("brier", "ece"),
)
BINS: Final = 15
"""Of the expected calibration error."""
ROWS_AT_ONCE: Final = 2_000_000
"""Weights converted to float at once: 16 MB, a few such arrays live together."""

Floats = NDArray[np.float64]


def metrics(
    scores: Floats, labels: NDArray[np.int64], *, where: str = "the test images"
) -> dict[str, float]:
    """All of METRICS.

    Args:
        scores: [Q, C] between 0 and 1; rows sum to 1 unless `labels` has two dimensions.
        labels: class numbers [Q], or 0/1 [Q, C] where an image may carry several labels.
        where: what the scores are of, for the message of a refusal.

    Raises:
        UserError: see `check_scores`.
    """
    check_scores(scores, labels, where=where)
    truth, chosen = _questions(scores, labels)
    present = np.flatnonzero(truth.any(0) & ~truth.all(0))

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    sensitivity = {c: recall_score(truth[:, c], chosen[:, c]) for c in present}
    specificity = {c: recall_score(~truth[:, c], ~chosen[:, c]) for c in present}
    balanced = [*sensitivity.values(), *(specificity.values() if labels.ndim == 2 else ())]
    asked = _asked(scores, labels)
    one = np.ones((1, len(scores)))
    return {
        "auroc": mean([roc_auc_score(truth[:, c], scores[:, c]) for c in present]),
        "auprc": mean([average_precision_score(truth[:, c], scores[:, c]) for c in present]),
        "accuracy": float(_right(truth, chosen, labels).mean()),
        "balanced_accuracy": mean(balanced),
        "f1": mean([f1_score(truth[:, c], chosen[:, c], zero_division=0) for c in present]),
        "sensitivity": mean([sensitivity[c] for c in present if asked[c]]),
        "specificity": mean([specificity[c] for c in present if asked[c]]),
        "brier": float(_squared_error(scores, truth, labels).mean()),
        "ece": float(_calibration_error(scores, truth, chosen, labels, one)[0]),
    }


def resampled_metrics(
    scores: Floats, labels: NDArray[np.int64], weights: NDArray[np.uint16]
) -> dict[str, Floats]:
    """All of METRICS [B] for test sets in which image i occurs weights[b, i] times.

    Scores are sorted once a class, whatever the number of resamplings.

    Args:
        scores: as `metrics` takes and has checked them.
        labels: likewise.
        weights: [B, Q].

    Returns:
        Each measure [B]; NaN where a resampling holds no image of a class, or no other.
    """
    at_once = max(1, ROWS_AT_ONCE // len(scores))
    parts = [
        _weighted(scores, labels, weights[start : start + at_once].astype(np.float64))
        for start in range(0, len(weights), at_once)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def check_scores(scores: Floats, labels: NDArray[np.int64], *, where: str) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: there is no image, shapes do not fit, a score is not finite, not a probability
            or a row does not sum to 1, a label is out of range, or only one class occurs.
    """
    several = labels.ndim == 2
    expected = scores.shape if several else scores.shape[:1]
    if scores.ndim != 2 or labels.shape != expected or len(scores) == 0:
        raise UserError(
            f"{where}: expected a row of scores for each label, found scores "
            f"{list(scores.shape)} and labels {list(labels.shape)}; give one row an image"
        )
    if not np.isfinite(scores).all():
        raise UserError(
            f"{where}: {int((~np.isfinite(scores)).any(1).sum())} of {len(scores)} rows of scores "
            "are not finite; the model or its features are damaged"
        )
    off = 0.0 if several else float(np.abs(scores.sum(1) - 1).max())
    if scores.min() < 0 or scores.max() > 1 or off > 1e-3:
        raise UserError(
            f"{where}: expected probabilities, found scores between {scores.min():.3g} and "
            f"{scores.max():.3g}, row sums between {scores.sum(1).min():.3g} and "
            f"{scores.sum(1).max():.3g}; apply softmax (sigmoid for several labels)"
        )
    highest = 1 if several else scores.shape[1] - 1
    if labels.min() < 0 or labels.max() > highest:
        raise UserError(
            f"{where}: expected labels from 0 to {highest}, found {labels.min()} to "
            f"{labels.max()}; check the labels and the number of classes"
        )
    truth, _ = _questions(scores, labels)
    if not (truth.any(0) & ~truth.all(0)).any():
        raise UserError(
            f"{where}: all {len(labels)} images have the same label, at least 2 classes are "
            "needed; add images or split anew"
        )


def class_groups(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> list[int]:
    """Number of different groups (patients) with an image of each class that occurs."""
    columns = labels.T == 1 if labels.ndim == 2 else labels == np.unique(labels)[:, None]
    return [len(np.unique(groups[column])) for column in columns if column.any()]


def _questions(
    scores: Floats, labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Truth and choice [Q, C] of each class against the rest."""
    if labels.ndim == 2:
        return labels == 1, scores >= 0.5
    classes = np.arange(scores.shape[1])
    return labels[:, None] == classes, scores.argmax(1)[:, None] == classes


def _asked(scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Classes [C] whose sensitivity and specificity count."""
    classes = np.arange(scores.shape[1])
    return classes == 1 if labels.ndim == 1 and len(classes) == 2 else classes >= 0


def _right(
    truth: NDArray[np.bool_], chosen: NDArray[np.bool_], labels: NDArray[np.int64]
) -> Floats:
    """How right the choice for each image is [Q]."""
    right = truth == chosen  # [Q, C]
    return np.asarray(right.mean(1) if labels.ndim == 2 else right.all(1), np.float64)


def _squared_error(scores: Floats, truth: NDArray[np.bool_], labels: NDArray[np.int64]) -> Floats:
    squares = (scores - truth) ** 2  # [Q, C]
    return np.asarray(squares.mean(1) if labels.ndim == 2 else squares.sum(1) / 2)


def _calibration_error(
    scores: Floats,
    truth: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
    labels: NDArray[np.int64],
    weights: Floats,
) -> Floats:
    """Expected calibration error [B]: over bins, share of images * |mean score - share right|."""
    if labels.ndim == 2:
        pairs = [(scores[:, c], truth[:, c] * 1.0) for c in range(scores.shape[1])]
    else:
        pairs = [(scores.max(1), _right(truth, chosen, labels))]
    errors = []
    for score, hit in pairs:
        number = np.clip(np.ceil(score * BINS) - 1, 0, BINS - 1)
        excess = (number[:, None] == np.arange(BINS)) * (score - hit)[:, None]  # [Q, BINS]
        errors.append(np.abs(weights @ excess).sum(1) / weights.sum(1))
    return np.asarray(np.mean(errors, axis=0))


def _weighted(scores: Floats, labels: NDArray[np.int64], weights: Floats) -> dict[str, Floats]:
    truth, chosen = _questions(scores, labels)
    total = weights.sum(1, keepdims=True)  # [B, 1]
    true, picked, both = (weights @ part for part in (truth, chosen, truth & chosen))  # [B, C]
    present = (true > 0) & (true < total)

    def mean(values: Floats, counted: NDArray[np.bool_]) -> Floats:
        counted = counted & present
        return np.asarray(np.where(counted, values, 0).sum(1) / counted.sum(1))

    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity = both / true
        specificity = (total - true - picked + both) / (total - true)
        balanced = (sensitivity + specificity) / 2 if labels.ndim == 2 else sensitivity
        ranks = [_ranks(scores[:, c], truth[:, c], weights) for c in range(truth.shape[1])]
        every, asked = present, _asked(scores, labels)
        return {
            "auroc": mean(np.stack([auroc for auroc, _ in ranks], 1), every),
            "auprc": mean(np.stack([auprc for _, auprc in ranks], 1), every),
            "accuracy": weights @ _right(truth, chosen, labels) / total[:, 0],
            "balanced_accuracy": mean(balanced, every),
            "f1": mean(2 * both / (true + picked), every),
            "sensitivity": mean(sensitivity, asked),
            "specificity": mean(specificity, asked),
            "brier": weights @ _squared_error(scores, truth, labels) / total[:, 0],
            "ece": _calibration_error(scores, truth, chosen, labels, weights),
        }


def _ranks(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """AUROC and average precision [B] of one class, images with equal scores taken as one step."""
    order = np.argsort(-scores, kind="stable")
    steps = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    weights = weights[:, order]
    positives = weights * positive[order]
    if len(steps) < len(order):
        weights, positives = (np.add.reduceat(w, steps, axis=1) for w in (weights, positives))
    found = positives.cumsum(1)
    seen = weights.cumsum(1)
    all_positive = found[:, -1]
    all_negative = seen[:, -1] - all_positive
    pairs = ((found - positives / 2) * (weights - positives)).sum(1)
    precision = found / np.maximum(seen, 1)
    return pairs / (all_positive * all_negative), (positives * precision).sum(1) / all_positive
