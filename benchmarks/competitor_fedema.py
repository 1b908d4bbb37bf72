"""FedEMA (Zhuang, Wen and Zhang, ICLR 2022): BYOL at each site, and sites that keep some of theirs.

The online network's predictor tells the target network's projection of the other view; the target
is the online network's moving average and stays at its site. When a site k takes part again it
trains not from the global weights but from

    mu W_k + (1 - mu) W_global,    mu = min(lambda_k |W_global - W_k|, 1)

with W_k as it left them, and lambda_k = tau / |W_global - W_k| fixed the first time, so that mu is
tau then. The distance is of the online encoder; the predictor moves by the same mu.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from competitor_step import Competitor, Step, bare, class_tokens
from federation_loop import SiteRound
from torch import Tensor, nn

from core.checkpoint import Arrays
from core.config import Recipe
from core.wire import GlobalState, SiteUpdate, take

PREDICTOR = "predictor."
ONLINE, TARGET, SCALE = "fedema/online/", "fedema/target/", "fedema/lambda"


class Online(nn.Module):
    """Backbone, projector and predictor; the target network has the same shape."""

    description = None  # nothing describes: core.backbone.initialise asks

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        model = recipe.model
        self.backbone = bare(recipe).backbone
        width = int(self.backbone.num_features)
        self.projector = _two_layers(width, model.head_hidden, model.embedding_dim)
        self.predictor = _two_layers(model.embedding_dim, model.head_hidden, model.embedding_dim)

    def project(self, pixels_VBCHW: Tensor, recipe: Recipe) -> Tensor:
        """Projections [V, B, D]."""
        features = class_tokens(self, pixels_VBCHW, recipe)
        return self.projector(features.flatten(0, 1)).view(*features.shape[:2], -1)

    def predict(self, pixels_VBCHW: Tensor, recipe: Recipe) -> Tensor:
        """What the target is expected to say [V, B, D]."""
        projected = self.project(pixels_VBCHW, recipe)
        return self.predictor(projected.flatten(0, 1)).view_as(projected)


def _two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """BYOL's MLP. Statistics are the batch's, in training as BYOL's; there are none to average."""
    norm = nn.BatchNorm1d(hidden, track_running_stats=False)
    return nn.Sequential(nn.Linear(width, hidden), norm, nn.ReLU(), nn.Linear(hidden, out))


def byol() -> Competitor:
    """The method of a site."""

    def loss(step: Step) -> Tensor:
        with torch.no_grad():
            targets = step.teacher.project(step.large, step.recipe)  # [2, B, D]
        views = [pixels for pixels in (step.large, step.small) if len(pixels)]
        said = torch.cat([step.student.predict(pixels, step.recipe) for pixels in views])
        pairs = [
            2 - 2 * torch.cosine_similarity(said[v], targets[u], dim=-1).mean()
            for u in range(len(targets))
            for v in range(len(said))
            if u != v
        ]
        return torch.stack(pairs).mean()

    return Competitor(Online, loss)


def divergence_aware(tau: float) -> Any:
    """Makes a site's round FedEMA's; `tau` is mu at its second participation."""

    def round_of(site_round: SiteRound) -> SiteRound:
        def at_site(
            recipe: Recipe, received: GlobalState, shards: Any, private: Arrays, **options: Any
        ) -> tuple[SiteUpdate, Arrays]:
            scale: Arrays = {}
            student, target = received.student, received.student  # at first both are the global
            if online := take(private, ONLINE):
                mu, factor = share_kept(received.student, online, private.get(SCALE), tau)
                scale = {SCALE: factor}
                student = mixed(received.student, online, mu)
                target = take(private, TARGET)
            start = replace(received, student=student, teacher=target)
            update, moments = site_round(recipe, start, shards, private, **options)
            kept = {ONLINE + name: array for name, array in update.student.items()}
            kept |= {TARGET + name: array for name, array in update.teacher.items()}
            return update, moments | kept | scale

        return at_site

    return round_of


def share_kept(
    received: Arrays, own: Arrays, scale: np.ndarray | None, tau: float
) -> tuple[float, np.ndarray]:
    """How much of its own weights a site keeps, mu, and its lambda (set now, if it is None)."""
    names = [name for name in sorted(own) if not name.startswith(PREDICTOR)]
    squares = [np.square(received[n].astype(np.float64) - own[n]).sum() for n in names]
    distance = float(np.sqrt(sum(squares)))
    if scale is None:
        scale = np.array(tau / max(distance, 1e-12))
    return min(float(scale) * distance, 1.0), scale


def mixed(received: Arrays, own: Arrays, mu: float) -> Arrays:
    """Weights between the site's and the global ones."""
    return {
        name: (mu * own[name].astype(np.float64) + (1 - mu) * array).astype(np.float32)
        for name, array in received.items()
    }
