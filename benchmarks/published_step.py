"""The training step as MerMED-FM's public code does it, written anew, to measure ours against.

What is as there: every image goes through PIL and torchvision for each of its views; one ring holds
the entries of all modalities beside a label each, all of them are multiplied and those of another
modality are then set to minus infinity; a loop over pairs of views and blocks; fp32 with timm's
fused attention; gradients clipped, weights averaged and AdamW stepped tensor by tensor.
What differs, in its favour: files are in memory, and KoLeo (weight 0 there) is left out. The
networks have our head, without batch normalisation.
"""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from core.backbone import Network
from core.config import Recipe, ViewsConfig
from core.modalities import MEAN_STD, MODALITIES
from core.schedules import ema_momentum, learning_rate, teacher_temperature, weight_decay

BLOCKS = 8


class Blur:
    """Gaussian blur with a probability and a drawn radius."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur, or not."""
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 1.0)))


class PilViews:
    """Image -> its global and its local views, one after another."""

    def __init__(self, views: ViewsConfig, modality: str) -> None:
        jitter = transforms.ColorJitter(
            views.brightness, views.contrast, views.saturation, views.hue
        )

        def pipeline(px: int, area: tuple[float, float], blur: float) -> transforms.Compose:
            bicubic = transforms.InterpolationMode.BICUBIC
            return transforms.Compose([
                transforms.RandomRotation(views.rotation_degrees),
                transforms.RandomResizedCrop(px, scale=area, interpolation=bicubic),
                transforms.RandomHorizontalFlip(views.flip_probability),
                transforms.RandomApply([jitter], p=views.jitter_probability),
                Blur(blur),
                transforms.ToTensor(),
                transforms.Normalize(*MEAN_STD[modality]),
            ])  # fmt: skip

        first, second, local = views.blur_probability
        self.pipelines = [
            pipeline(views.global_px, views.global_area, first),
            pipeline(views.global_px, views.global_area, second),
            *[pipeline(views.local_px, views.local_area, local)] * views.local_views,
        ]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """V tensors [3, H, W]."""
        return [pipeline(image) for pipeline in self.pipelines]


def pil_views(
    files: Sequence[tuple[int, Sequence[bytes]]], views: ViewsConfig
) -> tuple[list[Tensor], Tensor]:
    """Views of all images, V tensors [B, 3, H, W], and their modalities [B].

    Args:
        files: a modality and image files of it, again and again.
        views: the recipe's.
    """
    rows, labels = [], []
    for modality, images in files:
        augment = PilViews(views, MODALITIES[modality])
        for image in images:
            rows.append(augment(Image.open(io.BytesIO(image)).convert("RGB")))
            labels.append(modality)
    return [torch.stack(column) for column in zip(*rows, strict=True)], torch.tensor(labels)


@dataclass
class MaskedRing:
    """One ring of entries [K, D] of all modalities, with the modality of each."""

    embeddings: Tensor
    labels: Tensor
    position: int = 0

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Similarities [V, B, K]; minus infinity where an entry is of another modality."""
        similarity = embeddings @ self.embeddings.clone().T  # the ring is written before backward
        other = labels[:, None] != self.labels  # [B, K]
        return similarity.masked_fill(other, -math.inf)

    def write(self, embeddings: Tensor, labels: Tensor) -> None:
        """Overwrite the oldest entries."""
        end = self.position + len(labels)
        assert end <= len(self.labels), "the ring is a multiple of the batch"
        self.embeddings[self.position : end] = embeddings
        self.labels[self.position : end] = labels
        self.position = end % len(self.labels)


def masked_ring_loss(
    student_logits: Tensor, teacher_logits: Tensor, blocks: Sequence[Tensor],
    student_temperature: float, teacher_temperature: float,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy over blocks and pairs of views of logits [V, B, K] and [U, B, K]."""
    total, terms = student_logits.new_zeros(()), 0
    for block in blocks:
        log_p = torch.log_softmax(student_logits[..., block] / student_temperature, dim=-1)
        with torch.no_grad():
            q = torch.softmax(teacher_logits[..., block] / teacher_temperature, dim=-1)
        for u in range(len(q)):
            for v in range(len(log_p)):
                if u == v:
                    continue
                product = q[u] * log_p[v]  # [B, P], 0 times minus infinity where masked
                product = torch.where(torch.isinf(log_p[v]), 0.0, product)
                total = total - product.sum(dim=-1).mean()
                terms += 1
    return total / terms


class PublishedStep:
    """Networks, optimiser and ring, and what one step does to them."""

    def __init__(self, student: Network, teacher: Network, ring: MaskedRing, recipe: Recipe):
        self.student, self.teacher, self.ring, self.recipe = student, teacher, ring, recipe
        named = list(student.named_parameters())
        skipped = ("cls_token", "pos_embed", "reg_token")
        decays = [p for n, p in named if p.ndim >= 2 and not n.endswith(skipped)]
        rest = [p for n, p in named if p.ndim < 2 or n.endswith(skipped)]
        self.optimizer = torch.optim.AdamW([{"params": decays}, {"params": rest}], lr=0.0)
        self.step_number = 0

    def __call__(
        self, views: Sequence[Tensor], labels: Tensor, blocks: Sequence[Tensor] | None = None
    ) -> float:
        """Train on V views [B, 3, H, W] of images of modalities [B]; the loss before the step."""
        recipe, step = self.recipe, self.step_number
        decay, skip = self.optimizer.param_groups
        decay["lr"] = skip["lr"] = learning_rate(recipe, step)
        decay["weight_decay"], skip["weight_decay"] = weight_decay(recipe, step), 0.0
        with torch.no_grad():
            targets = embed(self.teacher, torch.cat(list(views[:2]))).unflatten(0, (2, -1))
        embeddings = _by_resolution(self.student, views).unflatten(0, (len(views), -1))
        student_logits = self.ring.logits(embeddings, labels)
        teacher_logits = self.ring.logits(targets, labels)
        self.ring.write(targets[1], labels)  # after the logits
        if blocks is None:
            blocks = torch.randperm(len(self.ring.labels)).chunk(BLOCKS)
        loss = masked_ring_loss(
            student_logits, teacher_logits, blocks,
            recipe.loss.student_temperature, teacher_temperature(recipe, step),
        )  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = recipe.optim.clip_norm / (parameter.grad.norm(2).item() + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        momentum = ema_momentum(recipe, step)
        with torch.no_grad():
            for mine, theirs in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                mine.mul_(momentum).add_((1 - momentum) * theirs)
        self.step_number += 1
        return loss.item()


def embed(network: Network, images_BCHW: Tensor) -> Tensor:
    """Embeddings [B, D] with every token of every block, as timm's own forward computes them."""
    embeddings: Tensor = network.head(network.backbone(images_BCHW))
    return embeddings


def _by_resolution(network: Network, views: Sequence[Tensor]) -> Tensor:
    """Embeddings [V * B, D]: one pass for the views of each size, as DINO's wrapper does."""
    parts: list[list[Tensor]] = []
    for view in views:
        if not parts or parts[-1][0].shape[-1] != view.shape[-1]:
            parts.append([])
        parts[-1].append(view)
    return torch.cat([embed(network, torch.cat(part)) for part in parts])
