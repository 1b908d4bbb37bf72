"""One protocol for every source of features: kNN and linear probe at several label fractions.

A task's features are computed once and shared by all methods, fractions and seeds. Label subsets
depend on the task and the seed alone, so that two models are compared on the same images. The val
split, which chooses the probe's strength, stays whole at every fraction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.evaluate import Features, Task, check_task, knn_scores, probe_scores
from core.evaluation.models import LoadedModel, feature_blocks, features
from core.evaluation.types import Prediction
from core.randomness import numpy_generator

METHODS: Final = ("knn11", "knn20", "probe")
PERCENTS: Final = (1.0, 10.0, 30.0, 50.0, 100.0)
IMAGES_A_PASS: Final = 2048
"""Read from the shard at once: 308 MB at 224 px."""
QUERIES_A_PASS: Final = 256
"""Bounds the kNN's table of cosines: 256 queries against 90,000 images are 92 MB."""

Numbers = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureSource:
    """Where features come from: a model, pixels, hand-made features."""

    name: str
    extract: Callable[[Task, Numbers], Features]
    """Task and image indices -> float32 [n, F], from the pixels in the task's shard alone"""
    blocks: int = 1
    """F is this many equal parts, a transformer's last blocks in order; kNN sees the last one."""


@dataclass(frozen=True)
class MultiLabel:
    """Labels of a task whose images may carry several; shards hold one label an image at most."""

    classes: tuple[str, ...]
    values: Numbers
    """0 or 1 [N, C], a row for each image of the shard"""


@dataclass(frozen=True)
class TaskData:
    """Features of one source on one task, with labels and patients; dicts are keyed by split."""

    source: str
    task: str
    classes: tuple[str, ...]
    blocks: int
    features: dict[str, Features]
    labels: dict[str, Numbers]
    """Class numbers [n], or 0 and 1 [n, C] when multi-label"""
    groups: dict[str, Numbers]


def model_source(loaded: LoadedModel, *, last_blocks: int) -> FeatureSource:
    """Both tokens of a vision transformer's last blocks, or another network's pooled output."""

    def extract(task: Task, indices: Numbers) -> Features:
        return features(loaded, task.shard.images[indices], task.name, last_blocks=last_blocks)

    return FeatureSource(loaded.name, extract, feature_blocks(loaded, last_blocks))


def task_labels(task: Task, multi_label: MultiLabel | None) -> dict[str, Numbers]:
    """Labels of each split, checked.

    Raises:
        UserError: a label is out of range, a split holds one class, or a class has one training
            image.
    """
    name, splits = _name(task), _splits(task)
    if multi_label is None:
        classes = len(task.shard.classes[task.name])
        for split, indices in splits.items():
            found = task.labels(indices)
            if len(found) and (found.min() < 0 or found.max() >= classes):
                raise UserError(
                    f"{name}: split '{split}': expected labels 0 to {classes - 1}, found "
                    f"{found.min()} to {found.max()}; correct the labels or the class names"
                )
        check_task(task)
        return {split: task.labels(indices) for split, indices in splits.items()}
    expected = (len(task.shard.images), len(multi_label.classes))
    if multi_label.values.shape != expected or not np.isin(multi_label.values, (0, 1)).all():
        raise UserError(
            f"{name}: expected labels of 0 and 1 {list(expected)}, found values "
            f"{np.unique(multi_label.values)[:5].tolist()} {list(multi_label.values.shape)}; "
            "give a row an image and a column a label"
        )
    for split, indices in splits.items():
        held = multi_label.values[indices].mean(0) if len(indices) else np.zeros(expected[1])
        for label in np.flatnonzero((held == 0) | (held == 1))[:1]:
            raise UserError(
                f"{name}: split '{split}': label '{multi_label.classes[label]}' has the same value "
                "in every image; leave it out or split anew"
            )
    return {split: multi_label.values[indices] for split, indices in splits.items()}


def embed_task(
    source: FeatureSource, task: Task, *, multi_label: MultiLabel | None = None
) -> TaskData:
    """Compute a task's features once.

    Args:
        source: what makes features.
        task: image indices of each split.
        multi_label: labels that replace the shard's.

    Raises:
        UserError: labels cannot be measured (see `task_labels`), or features are not finite or not
            one row an image.
    """
    labels = task_labels(task, multi_label)
    classes = multi_label.classes if multi_label else task.shard.classes[task.name]
    rows = {s: checked_features(source, task, i) for s, i in _splits(task).items()}
    groups = {s: task.shard.patient[i] for s, i in _splits(task).items()}
    return TaskData(source.name, _name(task), classes, source.blocks, rows, labels, groups)


def checked_features(source: FeatureSource, task: Task, indices: Numbers) -> Features:
    """Features [n, F] of some images; refuses what is not finite or not a row an image."""
    parts = range(0, len(indices), IMAGES_A_PASS)
    rows = np.concatenate([source.extract(task, indices[i : i + IMAGES_A_PASS]) for i in parts])
    if rows.ndim != 2 or len(rows) != len(indices) or rows.shape[1] % source.blocks:
        raise UserError(
            f"model '{source.name}', {_name(task)}: expected a row of features for each of "
            f"{len(indices)} images in {source.blocks} equal part(s), found {list(rows.shape)}"
        )
    if wrong := int((~np.isfinite(rows)).any(1).sum()):
        raise UserError(
            f"model '{source.name}', {_name(task)}: features of {wrong} of {len(indices)} images "
            "are NaN or infinite; check the model's weights"
        )
    return rows


def predict(
    source: FeatureSource,
    task: Task,
    methods: Sequence[str] = METHODS,
    percents: Sequence[float] = PERCENTS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    multi_label: MultiLabel | None = None,
) -> list[Prediction]:
    """Features once, then every method, label fraction and seed; see `predict_from`."""
    data = embed_task(source, task, multi_label=multi_label)
    return predict_from(data, methods, percents, seeds)


def predict_from(
    data: TaskData, methods: Sequence[str], percents: Sequence[float], seeds: Sequence[int]
) -> list[Prediction]:
    """Scores of the test split.

    Args:
        data: features with labels.
        methods: "knn<K>" (cosine-weighted vote on the last block) or "probe" (L2 logistic
            regression on all blocks, one a label when multi-label; strength chosen on val).
        percents: shares of the labelled training images, see `draw_subset`.
        seeds: subsets to draw; 100 percent has one subset, so the first seed alone is used.

    Raises:
        UserError: unknown method, or a share outside 0 to 100.
    """
    predictions = []
    known = (data.task, data.labels["train"], data.groups["train"])
    for percent in percents:
        for seed in seeds if percent < 100 else seeds[:1]:
            chosen = draw_labels(*known, percent, seed)
            for method in methods:
                scores = score(data, method, chosen, data.features["test"])
                drawn = (method, percent, seed, len(chosen))
                truth = (data.labels["test"], data.groups["test"], data.classes)
                predictions.append(Prediction(data.source, data.task, *drawn, scores, *truth))
    return predictions


def score(data: TaskData, method: str, chosen: Numbers, queries: Features) -> Scores:
    """Scores [Q, C] of any images after fitting on the chosen training images."""
    labels, count = data.labels["train"][chosen], len(data.classes)
    if labels.ndim == 2:
        columns = [_fit(data, method, chosen, queries, label)[:, 1] for label in range(count)]
        return np.stack(columns, axis=1)
    scores = _fit(data, method, chosen, queries, None)
    return np.pad(scores, ((0, 0), (0, count - scores.shape[1])))  # classes without training image


def _fit(
    data: TaskData, method: str, chosen: Numbers, queries: Features, label: int | None
) -> Scores:
    """The vote or the probe for the classes, or for one label against its absence."""
    train = data.features["train"][chosen]
    labels = {s: v if label is None else v[:, label] for s, v in data.labels.items()}
    if method == "probe":
        val = data.features["val"]
        return probe_scores(train, labels["train"][chosen], val, labels["val"], queries)
    if not (method.startswith("knn") and method[3:].isdigit() and int(method[3:])):
        raise UserError(f"expected a method 'probe' or 'knn<K>' such as 'knn20', found '{method}'")
    last = train.shape[1] // data.blocks
    train, queries = _with_direction(train[:, -last:]), _with_direction(queries[:, -last:])
    parts = (queries[i : i + QUERIES_A_PASS] for i in range(0, len(queries), QUERIES_A_PASS))
    known, neighbours = labels["train"][chosen], int(method[3:])
    return np.concatenate([knn_scores(train, known, part, neighbours=neighbours) for part in parts])


def _with_direction(features: Features) -> Features:
    """Give rows of zeros (a black image's pixels) a direction: their cosine would be 0 / 0."""
    features = features.copy()
    features[~features.any(1)] = 1
    return features


def draw_labels(task: str, labels: Numbers, groups: Numbers, percent: float, seed: int) -> Numbers:
    """Positions in the train split of a subset that depends on the task and the seed alone."""
    return draw_subset(labels, groups, percent, numpy_generator("labels", task, seed))


def draw_subset(
    labels: Numbers, groups: Numbers, percent: float, draws: np.random.Generator
) -> Numbers:
    """Draw a share of the labelled images: stratified, and whole patients at a time.

    Classes are filled from the rarest on. A patient is taken only if that brings the classes nearer
    to their shares, so a large patient may be passed over for smaller ones. With one image a
    patient, the same state of `draws` gives subsets that hold one another as `percent` grows.

    Args:
        labels: class numbers [n], or 0 and 1 [n, C] (each label's presence and absence is a class).
        groups: patient of each image [n].
        percent: share of each class; at least one image of every class is drawn.
        draws: where chance comes from.

    Returns:
        Sorted positions [m].
    """
    if not 0 < percent <= 100:
        raise UserError(f"expected a label fraction above 0 and up to 100 percent, found {percent}")
    if percent == 100:
        return np.arange(len(labels))
    member = _membership(labels)
    _, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((int(group.max()) + 1, member.shape[1]), np.int64)  # [G, K]
    np.add.at(counts, group, member)
    targets = np.maximum(1, np.floor(counts.sum(0) * percent / 100 + 0.5))
    held, taken = np.zeros_like(targets), np.zeros(len(counts), bool)
    order = draws.permutation(len(counts))
    for column in np.argsort(counts.sum(0), kind="stable"):
        for patient in order[(counts[order, column] > 0) & ~taken[order]]:
            if held[column] >= targets[column]:
                break
            after = held + counts[patient]
            nearer = np.abs(after - targets).sum() < np.abs(held - targets).sum()
            if nearer or held[column] == 0:
                taken[patient], held = True, after
    return np.flatnonzero(taken[group])


def scarce_classes(data: TaskData, percents: Sequence[float]) -> list[str]:
    """A sentence for each class of which a share is less than one image, so that one is drawn."""
    member, sentences = _membership(data.labels["train"]), []
    for column, count in enumerate(member.sum(0)[: len(data.classes)]):
        small = [f"{p:g} %" for p in percents if 0 < count * p < 100]
        if small:
            sentences.append(
                f"{data.task}: {' and '.join(small)} of the {count} training images of "
                f"'{data.classes[column]}' are less than one; one (or one patient's) is used"
            )
    return sentences


def _membership(labels: Numbers) -> NDArray[np.bool_]:
    """Whether each image is in each class that occurs in it, [n, K]; positives come first."""
    if labels.ndim == 2:
        return np.concatenate([labels == 1, labels == 0], axis=1)
    return np.equal.outer(labels, np.arange(int(labels.max()) + 1))


def _splits(task: Task) -> dict[str, Numbers]:
    return {"train": task.train, "val": task.val, "test": task.test}


def _name(task: Task) -> str:
    return f"{task.name}/{task.shard.name}"
