"""A site's labelled images of one modality, and the evaluator's own probe, one for all sites.

The evaluator fits the probe on images of its own and sends its weights; it learns nothing of the
site's labels. Its scores are on one scale at every site, so that they may be pooled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.errors import UserError
from core.evaluate import Features, Task, extract, fit_probe, labelled_tasks
from core.export import Model
from core.shards import Shard
from core.wire import PROBE_BIAS, PROBE_WEIGHT, take

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SiteTask:
    """One modality of a site: the labelled images of all its shards, by split."""

    name: str
    """The modality."""
    parts: tuple[Task, ...]
    """A task a shard."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; `problem` tells whether all shards have the same."""
        return self.parts[0].shard.classes[self.name]

    def labels(self, split: str) -> Labels:
        """Class numbers of a split."""
        return np.concatenate([part.labels(getattr(part, split)) for part in self.parts])

    def patients(self, split: str) -> Labels:
        """Whose images they are [n]; a person in two shards counts as two."""
        first = np.cumsum([0, *(int(part.shard.patient.max()) + 1 for part in self.parts)])
        numbers = zip(self.parts, first, strict=False)
        return np.concatenate([p.shard.patient[getattr(p, split)] + start for p, start in numbers])

    def features(self, model: Model, split: str, *, last_blocks: int) -> Features:
        """Features of a split, see `core.evaluate.extract`."""
        indices = [(part.shard, getattr(part, split)) for part in self.parts]
        return np.concatenate([
            extract(model.backbone, shard.images[i], self.name, model.px, last_blocks=last_blocks)
            for shard, i in indices
            if len(i)
        ])  # fmt: skip

    def problem(self) -> str | None:
        """Why a probe cannot be fitted and measured on this, in words that name no shard."""
        if len({part.shard.classes[self.name] for part in self.parts}) > 1:
            return "its shards name different classes"
        if any(len(np.unique(self.labels(split))) < 2 for split in ("train", "val", "test")):
            return "train, val and test do not hold two classes each"
        if np.unique(self.labels("train"), return_counts=True)[1].min() < 2:
            return "a class has fewer than two training images"
        return None


@dataclass(frozen=True)
class SharedProbe:
    """A linear classifier of features.

    Attributes:
        weight: [F, C].
        bias: [C].
        classes: C names.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    classes: tuple[str, ...]

    def scores(self, features: Features) -> NDArray[np.float64]:
        """Class probabilities [Q, C]."""
        logits = features @ self.weight + self.bias
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def numbers(self, labels: Labels, classes: tuple[str, ...]) -> Labels | None:
        """Numbers of another's classes as this probe counts them; None if it lacks one."""
        number = [self.classes.index(c) if c in self.classes else -1 for c in classes]
        own = np.array(number, np.int64)[labels]
        return None if own.min() < 0 else own


def site_tasks(shards: Sequence[Shard]) -> list[SiteTask]:
    """The labelled modalities of a site."""
    parts: dict[str, list[Task]] = {}
    for task in labelled_tasks(shards):
        parts.setdefault(task.name, []).append(task)
    return [SiteTask(name, tuple(tasks)) for name, tasks in parts.items()]


def fit_shared_probe(model: Model, task: SiteTask, *, last_blocks: int) -> SharedProbe:
    """Fit the probe of `core.evaluate` and fold its standardisation into its weights.

    Raises:
        UserError: the images cannot serve for it.
    """
    if problem := task.problem():
        raise UserError(
            f"no probe of {task.name} can be fitted: {problem}; add labelled images or split anew"
        )
    train, val = (task.features(model, s, last_blocks=last_blocks) for s in ("train", "val"))
    scale, regression = fit_probe(train, task.labels("train"), val, task.labels("val"))
    weight = regression.coef_.T / scale.scale_[:, None]
    bias = regression.intercept_ - scale.mean_ @ weight
    if weight.shape[1] == 1:  # of two classes, sklearn keeps the log odds of the second
        weight, bias = np.pad(weight, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    return SharedProbe(weight, bias, tuple(task.classes[c] for c in regression.classes_))


def probe_arrays(probes: dict[str, SharedProbe]) -> Arrays:
    """Probes, by modality, under their wire names."""
    weights = {PROBE_WEIGHT + name: probe.weight for name, probe in probes.items()}
    return weights | {PROBE_BIAS + name: probe.bias for name, probe in probes.items()}


def read_probes(arrays: Arrays, classes: dict[str, tuple[str, ...]]) -> dict[str, SharedProbe]:
    """The inverse of `probe_arrays`.

    Raises:
        UserError: weights, biases and class names do not go together.
    """
    weights, biases = take(arrays, PROBE_WEIGHT), take(arrays, PROBE_BIAS)
    if not set(weights) == set(biases) == set(classes):
        raise UserError("the evaluator's probes lack weights, biases or class names")
    for name, names in classes.items():
        if weights[name].shape[1:] != (len(names),) or biases[name].shape != (len(names),):
            raise UserError(
                f"the evaluator's probe of '{name}': expected weights [F, {len(names)}] and biases "
                f"[{len(names)}], found {weights[name].shape} and {biases[name].shape}"
            )
    return {name: SharedProbe(weights[name], biases[name], classes[name]) for name in classes}
