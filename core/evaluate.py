"""Frozen features of a backbone, and what a neighbours' vote and a linear probe make of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from core.errors import UserError
from core.export import Model
from core.modalities import MEAN_STD, MODALITIES
from core.shards import Shard

Features = NDArray[np.float32]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C (inverse L2 strength) tried on the validation split."""


@dataclass(frozen=True)
class Task:
    """One labelled modality of one shard: image indices of each split."""

    shard: Shard
    modality: int
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The modality's name."""
        return MODALITIES[self.modality]

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class numbers [n]."""
        return self.shard.label[indices]


def labelled_tasks(shards: Sequence[Shard]) -> list[Task]:
    """The labelled modalities of the shards; none is refused, see `check_task`."""
    tasks = []
    for shard in shards:
        for modality in np.unique(shard.modality):
            labelled = (shard.modality == modality) & (shard.label >= 0)
            if labelled.any():
                train, val, test = (
                    np.flatnonzero(labelled & (shard.split == split))
                    for split in ("train", "val", "test")
                )
                tasks.append(Task(shard, int(modality), train, val, test))
    return tasks


def check_task(task: Task) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: a class has fewer than two training images, or a split fewer than two classes.
    """
    where = f"shard '{task.shard.name}', {task.name}"
    for split, indices in (("train", task.train), ("val", task.val), ("test", task.test)):
        if (found := len(np.unique(task.labels(indices)))) < 2:
            raise UserError(
                f"{where}: split '{split}' holds {found} labelled class(es), at least 2 are "
                "needed; add labelled images or split anew"
            )
    classes, counts = np.unique(task.labels(task.train), return_counts=True)
    if counts.min() < 2:
        name = task.shard.classes[task.name][classes[counts.argmin()]]
        raise UserError(
            f"{where}: class '{name}' has 1 training image, at least 2 are needed; add images or "
            "drop the label"
        )


@torch.inference_mode()
def extract(
    backbone: nn.Module,
    images: NDArray[np.uint8],
    modality: str,
    px: int,
    *,
    last_blocks: int,
    batch_size: int = 256,
    mean_std: MeanStd | None = None,
) -> Features:
    """Class token, patch tokens' mean and deviation, of the last blocks, after the final norm.

    The deviation tells how unlike the places of an image are, which a mean cannot. Each figure is
    the mean over the image and its mirror image, which hold the same findings.

    Args:
        backbone: a timm vision transformer, in evaluation mode afterwards.
        images: uint8 [N, H, W, C]; resized to px if they differ.
        modality: whose mean and deviation normalise.
        px: side the backbone expects.
        last_blocks: how many blocks to take; all, if there are fewer.
        batch_size: images a pass.
        mean_std: used in place of the modality's, where the backbone was trained so.

    Returns:
        float32 [N, blocks * 3 * d].
    """
    backbone.eval()
    device = next(backbone.parameters()).device
    last_blocks = min(last_blocks, len(backbone.blocks))  # type: ignore[arg-type]
    rows = []
    for pixels in pixel_batches(images, mean_std or MEAN_STD[modality], px, device, batch_size):
        both = [block_tokens(backbone, p, last_blocks) for p in (pixels, pixels.flip(-1))]
        rows.append(((both[0] + both[1]) / 2).cpu().numpy())
    return np.concatenate(rows)


def block_tokens(backbone: nn.Module, pixels: Tensor, last_blocks: int) -> Tensor:
    """What `extract` takes of one view, float32 [B, blocks * 3 * d], of images [B, 3, px, px]."""
    layers = backbone.forward_intermediates(  # type: ignore[operator]
        pixels, indices=last_blocks, return_prefix_tokens=True,
        norm=True, output_fmt="NLC", intermediates_only=True,
    )  # fmt: skip
    parts = [
        torch.cat([prefix[:, 0], patches.mean(1), patches.std(1, correction=0)], 1)
        for patches, prefix in layers
    ]
    return torch.cat(parts, 1).float()


def pixel_batches(
    images: NDArray[np.uint8], mean_std: MeanStd, px: int, device: torch.device, batch_size: int
) -> Iterator[Tensor]:
    """Normalised batches [B, 3, px, px] of uint8 images [N, H, W, C], read batch by batch."""
    shift, scale = (torch.tensor(part, device=device)[:, None, None] for part in mean_std)
    for start in range(0, len(images), batch_size):
        chunk = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        pixels = chunk.permute(0, 3, 1, 2).contiguous().float().div_(255)
        if pixels.shape[-1] != px:
            pixels = nn.functional.interpolate(
                pixels, (px, px), mode="bilinear", antialias=True, align_corners=False
            )
        yield (pixels - shift).div_(scale)


def knn_scores(
    train: Features, labels: NDArray[np.int64], queries: Features, *, neighbours: int
) -> NDArray[np.float64]:
    """Class scores [Q, C] of a cosine-weighted vote, weight exp(cosine / .07) as in DINO's kNN."""
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    cosine = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T  # [Q, N]
    count = min(neighbours, len(train))
    nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
    weight = np.exp(np.take_along_axis(cosine, nearest, axis=1) / 0.07)
    scores = np.zeros((len(queries), int(labels.max()) + 1))
    for column in range(count):
        scores[np.arange(len(queries)), labels[nearest[:, column]]] += weight[:, column]
    return np.asarray(scores / scores.sum(1, keepdims=True))


def probe_scores(
    train: Features, labels: NDArray[np.int64], val: Features, val_labels: NDArray[np.int64],
    queries: Features,
) -> NDArray[np.float64]:  # fmt: skip
    """Class probabilities [Q, C] of an L2 logistic regression, strength chosen on the val split."""
    scale, model = fit_probe(train, labels, val, val_labels)
    return _full(model, scale.transform(queries), int(labels.max()) + 1)


def fit_probe(
    train: Features, labels: NDArray[np.int64], val: Features, val_labels: NDArray[np.int64]
) -> tuple[Any, Any]:
    """The probe of `probe_scores`: sklearn's scaler of the features and logistic regression.

    With fewer images than features it is fitted in the images' own span, where the solution of an
    L2-penalised model lies (representer theorem), and brought back: the same, several times faster.
    """
    scale = StandardScaler().fit(train)
    train, val = scale.transform(train), scale.transform(val)
    span = None
    if len(train) < train.shape[1]:
        span = np.linalg.qr(train.T)[0]  # [F, n], orthonormal columns
        train, val = train @ span, val @ span

    def fit(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=2000).fit(train, labels)

    def val_auroc(model: Any) -> float:
        return auroc(_full(model, val, int(labels.max()) + 1), val_labels)

    best = max((fit(c) for c in PROBE_STRENGTHS), key=val_auroc)
    if span is not None:
        best.coef_, best.n_features_in_ = best.coef_ @ span.T, len(span)
    return scale, best


def _full(model: Any, features: Features, classes: int) -> NDArray[np.float64]:
    scores = np.zeros((len(features), classes))
    scores[:, model.classes_] = model.predict_proba(features)
    return scores


def auroc(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean one-against-rest AUROC over the classes that the labels hold."""
    present = [c for c in np.unique(labels) if 0 < (labels == c).sum() < len(labels)]
    column = {c: scores[:, c] if c < scores.shape[1] else np.zeros(len(labels)) for c in present}
    return float(np.mean([roc_auc_score(labels == c, column[c]) for c in present]))


def measures(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """AUROC, accuracy and balanced accuracy of class scores [Q, C] against labels [Q]."""
    predicted = scores.argmax(1)
    return {
        "auroc": auroc(scores, labels),
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
    }


def evaluate_knn(
    model: Model, tasks: Sequence[Task], *, neighbours: int
) -> dict[str, dict[str, float]]:
    """Measures of the vote on the test split, a row a task, on the last block's features."""

    def scores(task: Task, features: dict[str, Features]) -> NDArray[np.float64]:
        labels = task.labels(task.train)
        return knn_scores(features["train"], labels, features["test"], neighbours=neighbours)

    return _evaluate(model, tasks, 1, scores)


def evaluate_probe(
    model: Model, tasks: Sequence[Task], *, last_blocks: int
) -> dict[str, dict[str, float]]:
    """Measures of the linear probe on the test split, a row a task."""

    def scores(task: Task, features: dict[str, Features]) -> NDArray[np.float64]:
        train, val = task.labels(task.train), task.labels(task.val)
        return probe_scores(features["train"], train, features["val"], val, features["test"])

    return _evaluate(model, tasks, last_blocks, scores)


def mean_over_modalities(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of the tasks of each modality, then over modalities, each counting once."""
    keys = ("auroc", "accuracy", "balanced_accuracy")
    modalities: dict[str, list[dict[str, float]]] = {}
    for name, row in rows.items():
        modalities.setdefault(name.split("/")[0], []).append(row)
    return {
        key: float(np.mean([np.mean([row[key] for row in group]) for group in modalities.values()]))
        for key in keys
    }


def _evaluate(
    model: Model,
    tasks: Sequence[Task],
    last_blocks: int,
    scores: Callable[[Task, dict[str, Features]], NDArray[np.float64]],
) -> dict[str, dict[str, float]]:
    rows = {}
    for task in tasks:
        splits = {"train": task.train, "val": task.val, "test": task.test}
        features = {
            split: extract(
                model.backbone, task.shard.images[i], task.name, model.px, last_blocks=last_blocks
            )
            for split, i in splits.items()
        }
        row = measures(scores(task, features), task.labels(task.test))
        sizes = {"train": float(len(task.train)), "test": float(len(task.test))}
        rows[f"{task.name}/{task.shard.name}"] = row | sizes
    return rows
