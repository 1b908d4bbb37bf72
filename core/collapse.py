"""Collapse: how it is measured and when to say so.

Signature (DINO and MaSSL practice): the loss and the teacher's entropy approach ln(entries of a
block), the embeddings all point one way (mean cosine to 1), and their effective rank falls to 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the server raises the alarm without torch
    from torch import Tensor

LOSS_SHARE = 0.99
"""Loss and entropy above this share of their ceiling look like those of a constant output."""
COSINE_LIMIT = 0.98
POINT_COSINE = 1 - 1e-5
"""Above it embeddings differ by less than a two-hundredth of their length."""
RANK_LIMIT = 1.5


def spread(embeddings: Tensor, *, centred: bool) -> dict[str, float]:
    """Mean cosine and effective rank of a ring's unit embeddings [N, D], by metric name.

    Where the loss compares differences from the mean, rank is that of the differences; the cosine
    may then come near 1 without harm, as long as float32 can tell the embeddings apart.
    """
    about = embeddings - embeddings.mean(0) if centred else embeddings
    return {"mean_cosine": mean_cosine(embeddings), "rankme": rankme(about)}


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of all pairs of different rows of unit embeddings [N, D]; 1 means one point."""
    count = len(embeddings)
    total = embeddings.double().sum(0).square().sum()
    return float((total - count) / (count * (count - 1)))


def rankme(embeddings: Tensor) -> float:
    """Effective rank exp(entropy of singular values), from 1 to D (RankMe, arXiv 2210.02885)."""
    import torch

    values = torch.linalg.svdvals(embeddings.double())
    share = values / values.sum() + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))


def alarm(metrics: dict[str, float], modality: str) -> str | None:
    """Say in words that a modality collapses, or None while it is healthy.

    Args:
        metrics: a site's metrics under their wire names.
        modality: whose figures to judge; figures that are absent raise no alarm.
    """

    def figure(name: str) -> float:
        return metrics.get(f"{name}/{modality}", math.nan)

    ceiling = figure("loss_ceiling")
    flat = min(figure("loss"), figure("teacher_entropy")) > LOSS_SHARE * ceiling
    if flat and figure("mean_cosine") > COSINE_LIMIT:
        return (
            f"{modality}: collapse: loss {figure('loss'):.3f} and teacher entropy "
            f"{figure('teacher_entropy'):.3f} are at their ceiling {ceiling:.3f} and embeddings "
            f"point one way (mean cosine {figure('mean_cosine'):.3f}); stop, then raise "
            "loss.koleo_weight or lower loss.teacher_temperature"
        )
    if figure("mean_cosine") > POINT_COSINE or figure("rankme") < RANK_LIMIT:
        return (
            f"{modality}: collapse: embeddings are one point or one line (mean cosine "
            f"{figure('mean_cosine'):.7f}, RankMe {figure('rankme'):.2f}); stop, then raise "
            "loss.koleo_weight"
        )
    return None
