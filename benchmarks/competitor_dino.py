"""DINO (Caron et al., ICCV 2021), its weights averaged as in FedAvg.

The head ends in learned prototypes: unit rows, compared with the unit embedding. Teacher scores are
centred by their moving mean and sharpened; the student's views tell the teacher's other views.
Prototypes and centre are averaged like all weights; so they must mean the same at all sites.
"""

import torch
from competitor_step import Competitor, Step, bare, class_tokens
from torch import Tensor, nn

from core.config import Recipe

STUDENT_TEMPERATURE = 0.1
FIRST_TEMPERATURE = 0.04
CENTRE_MOMENTUM = 0.9
FROZEN_SHARE = 0.1
"""Of all steps, in which the prototypes stand still: DINO's first epoch."""


class WithPrototypes(nn.Module):
    """Backbone, our projection head, and K unit prototypes [K, D]."""

    description = None  # nothing describes: core.backbone.initialise asks

    def __init__(self, recipe: Recipe, prototypes: int) -> None:
        super().__init__()
        network = bare(recipe)
        self.backbone, self.head = network.backbone, network.head
        self.prototypes = nn.Linear(recipe.model.embedding_dim, prototypes, bias=False)
        self.register_buffer("centre", torch.zeros(prototypes))

    def scores(self, pixels_VBCHW: Tensor, recipe: Recipe, *, frozen: bool = False) -> Tensor:
        """Cosines with the prototypes [V, B, K]."""
        features = class_tokens(self, pixels_VBCHW, recipe)
        rows = nn.functional.normalize(self.prototypes.weight, dim=-1)
        return (
            self.head(features.flatten(0, 1)).view(*features.shape[:2], -1)
            @ (rows.detach() if frozen else rows).T
        )


def dino(*, prototypes: int, temperature: float) -> Competitor:
    """The method.

    Args:
        prototypes: at most 1,024: a site sees few images.
        temperature: of the teacher, after the recipe's warm-up from FIRST_TEMPERATURE.
    """

    def loss(step: Step) -> Tensor:
        done = step.number / step.recipe.total_steps
        warm = min(1.0, done / max(step.recipe.loss.temperature_warmup, 1e-9))
        sharp = FIRST_TEMPERATURE + (temperature - FIRST_TEMPERATURE) * warm
        with torch.no_grad():
            told = step.teacher.scores(step.large, step.recipe)  # [2, B, K]
            targets = torch.softmax((told - step.teacher.centre) / sharp, dim=-1)
            step.teacher.centre.lerp_(told.mean((0, 1)), 1 - CENTRE_MOMENTUM)
        frozen = done < FROZEN_SHARE
        views = [pixels for pixels in (step.large, step.small) if len(pixels)]
        said = [step.student.scores(pixels, step.recipe, frozen=frozen) for pixels in views]
        logs = torch.log_softmax(torch.cat(said) / STUDENT_TEMPERATURE, dim=-1)  # [V, B, K]
        pairs = [
            -(targets[u] * logs[v]).sum(-1).mean()
            for u in range(len(targets))
            for v in range(len(logs))
            if u != v
        ]
        return torch.stack(pairs).mean()

    return Competitor(lambda recipe: WithPrototypes(recipe, prototypes), loss)
