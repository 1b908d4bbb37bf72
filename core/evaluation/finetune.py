"""Full fine-tuning: what a backbone is worth when all its weights may change.

A linear head on the pooled features, AdamW with layer decay, warm-up and cosine, the training
views of the sites in a mild form. The epoch with the best val AUROC is tested, and training stops
when that has not risen for some epochs.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from core.augment import make_views
from core.config import ViewsConfig
from core.errors import UserError
from core.evaluate import MeanStd, Task, pixel_batches
from core.evaluation.metrics import metrics
from core.evaluation.models import LoadedModel
from core.evaluation.protocol import MultiLabel, draw_labels, task_labels
from core.evaluation.types import Prediction
from core.modalities import MEAN_STD
from core.randomness import torch_generator

VIEWS_AN_IMAGE: Final = 2
OnEpoch = Callable[[int, int, float], None]
"""Called with epochs done, epochs asked for, and the val AUROC."""


@dataclass(frozen=True)
class FineTuning:
    """Settings; the defaults suit a small vision transformer and some thousand images."""

    epochs: int = 20
    patience: int = 5
    """Epochs without a better val AUROC before it stops."""
    batch_size: int = 64
    """Views a step; each image gives two."""
    learning_rate: float = 5e-4
    """Of the head; a layer further down has `layer_decay` times that of the layer above."""
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of all steps with rising learning rate."""
    label_smoothing: float = 0.1
    """Single-label tasks only."""


class _Classifier(nn.Module):
    """A copy of the backbone with a linear head that starts at zero."""

    def __init__(self, backbone: nn.Module, outputs: int, width: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to logits [B, C]."""
        logits: Tensor = self.head(self.backbone(pixels))
        return logits.float()


def finetune(
    loaded: LoadedModel,
    task: Task,
    *,
    percent: float = 100,
    seed: int = 0,
    settings: FineTuning | None = None,
    multi_label: MultiLabel | None = None,
    on_epoch: OnEpoch | None = None,
) -> Prediction:
    """Fine-tune a copy of the model on a task and score the test split.

    Args:
        loaded: stays as it is; its device trains.
        task: image indices of each split.
        percent: share of the labelled training images, the same ones as for the other methods.
        seed: of that subset, of the order of images and of the views; the same seed gives the same
            bits on a CPU, unless the backbone itself drops units.
        settings: how to train.
        multi_label: labels that replace the shard's.
        on_epoch: progress.

    Raises:
        UserError: labels cannot be measured, or the loss becomes NaN.
    """
    settings = settings or FineTuning()
    labels = task_labels(task, multi_label)
    classes = multi_label.classes if multi_label else task.shard.classes[task.name]
    name = f"{task.name}/{task.shard.name}"
    patients = task.shard.patient[task.train]
    chosen = draw_labels(name, labels["train"], patients, percent, seed)
    statistics = loaded.mean_std or MEAN_STD[task.name]
    device = next(loaded.model.backbone.parameters()).device
    px, width = loaded.model.px, _width(loaded)
    model = _Classifier(loaded.model.backbone, len(classes), width).to(device)
    optimizer = _optimizer(model, settings)
    batch = settings.batch_size // VIEWS_AN_IMAGE
    steps = settings.epochs * math.ceil(len(chosen) / batch)
    best, best_scores, since, step = -math.inf, None, 0, 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        draws = torch_generator("finetune", name, seed, epoch)
        order = torch.randperm(len(chosen), generator=draws).numpy()
        for start in range(0, len(order), batch):
            rows = chosen[order[start : start + batch]]
            images = task.shard.images[task.train[rows]]
            views = _views(images, task.name, px, statistics, device, draws)
            target = torch.from_numpy(labels["train"][rows]).to(device)
            _set_rate(optimizer, settings, step, steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(views)
            loss = _loss(logits, target.repeat(VIEWS_AN_IMAGE, *[1] * (target.ndim - 1)), settings)
            if not torch.isfinite(loss):
                raise UserError(
                    f"fine-tuning '{loaded.name}' on {name}: the loss is {loss.item()} in epoch "
                    f"{epoch}; lower the learning rate or check the model's weights"
                )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        val = _scores(model, task, task.val, px, statistics, multi_label is not None)
        auroc = metrics(val, labels["val"])["auroc"]
        if on_epoch is not None:
            on_epoch(epoch, settings.epochs, auroc)
        since = 0 if auroc > best else since + 1
        if auroc >= best:  # of equals the longest trained; scored now, so no weights are kept
            best = auroc
            best_scores = _scores(model, task, task.test, px, statistics, multi_label is not None)
        if since >= settings.patience:
            break
    assert best_scores is not None
    drawn = ("finetune", percent, seed, len(chosen))
    truth = (labels["test"], task.shard.patient[task.test], classes)
    return Prediction(loaded.name, name, *drawn, best_scores, *truth)


def _width(loaded: LoadedModel) -> int:
    """Length of the pooled features."""
    device, px = next(loaded.model.backbone.parameters()).device, loaded.model.px
    with torch.inference_mode():
        return int(loaded.model.backbone(torch.zeros(1, 3, px, px, device=device)).shape[-1])


def _optimizer(model: _Classifier, settings: FineTuning) -> torch.optim.AdamW:
    groups = param_groups_layer_decay(
        model.backbone, settings.weight_decay, layer_decay=settings.layer_decay
    )
    for group in groups:  # timm gives its last layer the full rate: the head stands above it
        group["lr_scale"] *= settings.layer_decay
    head = list(model.head.parameters())
    groups.append({"params": head, "lr_scale": 1.0, "weight_decay": settings.weight_decay})
    return torch.optim.AdamW(groups, lr=0.0)


def _set_rate(optimizer: torch.optim.AdamW, settings: FineTuning, step: int, steps: int) -> None:
    """Linear warm-up, then a cosine to zero."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        share = (step + 1) / warmup
    else:
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share * group["lr_scale"]


def _views(
    images: NDArray[np.uint8], modality: str, px: int, statistics: MeanStd, device: torch.device,
    draws: torch.Generator,
) -> Tensor:  # fmt: skip
    """Two mild views of each image [2 B, 3, px, px], first views first."""
    config = ViewsConfig(
        global_px=px, local_views=0, global_area=(0.6, 1.0), rotation_degrees=10.0,
        blur_probability=(0.0, 0.0, 0.0),
    )  # fmt: skip
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    if pixels.shape[-1] > 2 * px:  # the views are sampled without a filter
        size = (2 * px, 2 * px)
        pixels = nn.functional.interpolate(pixels.float(), size, mode="area").round().byte()
    views = make_views(pixels, modality, config, draws).global_VBCHW.flatten(0, 1)
    if statistics != MEAN_STD[modality]:
        (shift, scale), (old_shift, old_scale) = (
            [torch.tensor(part, device=device)[:, None, None] for part in pair]
            for pair in (statistics, MEAN_STD[modality])
        )
        views = (views * old_scale + old_shift - shift) / scale
    return views


def _loss(logits: Tensor, target: Tensor, settings: FineTuning) -> Tensor:
    if target.ndim == 2:
        return nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    return nn.functional.cross_entropy(logits, target, label_smoothing=settings.label_smoothing)


@torch.inference_mode()
def _scores(
    model: _Classifier, task: Task, indices: NDArray[np.int64], px: int, statistics: MeanStd,
    multi_label: bool,
) -> NDArray[np.float64]:  # fmt: skip
    """Probabilities [n, C] of whole images."""
    model.eval()
    device = model.head.weight.device
    batches = pixel_batches(task.shard.images[indices], statistics, px, device, batch_size=256)
    logits = torch.cat([model(pixels) for pixels in batches]).double().cpu()
    return (logits.sigmoid() if multi_label else logits.softmax(1)).numpy()
