"""Ours, ours without one of its parts, and ours with something against forgetting.

Where a recipe cannot say it, the product's own training loop runs with one function replaced or
with a hook on its optimiser; nothing of it is copied.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from federation_loop import Arm, SiteRound, changed
from torch import Tensor

from core import train as training
from core.augment import make_views
from core.batch import Batch
from core.checkpoint import Arrays
from core.config import Recipe
from core.errors import UserError
from core.modalities import MODALITIES
from core.randomness import torch_generator
from core.site_round import site_round
from core.step import TrainState
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.aggregate import aggregate

Change = Callable[[TrainState, Callable[[int], Sequence[Batch]], Recipe, str], None]
"""Called before a site trains with its state, its batches by step, the recipe, its name."""


def ours() -> Arm:
    """The product."""
    return Arm()


def with_recipe(**sections: Mapping[str, Any]) -> Arm:
    """Ours with other values in the recipe."""
    return Arm(recipe=lambda recipe: changed(recipe, **sections))


def scaled(section: str, key: str, factor: float) -> Arm:
    """Ours with a number of the recipe multiplied."""

    def other(recipe: Recipe) -> Recipe:
        return changed(recipe, **{section: {key: factor * getattr(getattr(recipe, section), key)}})

    return Arm(recipe=other)


def without_start(arm: Arm) -> Arm:
    """An arm from random weights."""
    start = {"init_file": "", "phantom_steps": 0}
    return replace(arm, recipe=lambda recipe: changed(arm.recipe(recipe), model=start))


def frozen() -> Arm:
    """The teacher stays as it began, so the student is measured: what distillation alone gives."""
    return replace(with_recipe(optim={"ema_momentum": 1.0}), measured="student")


def without_network() -> Arm:
    """No weights at all."""
    return Arm(initial=lambda recipe: GlobalState(student={}, teacher={}))


def random_anchors() -> Arm:
    """The memory keeps its first random vectors."""

    def change(state: TrainState, batches: Any, recipe: Recipe, site: str) -> None:
        state.bank.write = lambda modality, embeddings, patients: None  # type: ignore[method-assign]

    return Arm(site_round=before_training(change))


def description_alone() -> Arm:
    """Neither consistency nor KoLeo: what describing the views teaches by itself."""

    def none(student: Tensor, *_: Any, first_view: int = 0) -> tuple[Tensor, Tensor]:
        loss = 0 * student.sum((-3, -2, -1))
        return loss, torch.zeros_like(loss)

    def recipe(recipe: Recipe) -> Recipe:
        if not recipe.loss.description_weight:
            raise UserError(
                "arm 'description_alone' needs a recipe with 'loss.description_weight' above 0, "
                "found 0: leave the arm out or raise it"
            )
        return changed(recipe, loss={"koleo_weight": 0.0})

    return Arm(recipe=recipe, site_round=_instead("core.objective.consistency_loss", none))


def without_memory(*, described: bool, rate: float = 1.0, koleo: float | None = None) -> Arm:
    """The views of an image are drawn together by their cosine; no memory.

    Args:
        described: Go on describing the views, as ours does.
        rate: Factor on the learning rate.
        koleo: Weight of KoLeo; without it the recipe's.
    """

    def recipe(recipe: Recipe) -> Recipe:
        loss = {} if described else {"description_weight": 0.0}
        return changed(
            recipe,
            memory={"centred": False},
            federation={"prototypes_per_modality": 0},
            optim={"learning_rate": rate * recipe.optim.learning_rate},
            loss=loss if koleo is None else {**loss, "koleo_weight": koleo},
        )

    return Arm(recipe=recipe, site_round=_instead("core.objective.consistency_loss", cosine_loss))


def cosine_loss(
    student: Tensor, teacher: Tensor, *_: Any, first_view: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean over pairs of different views of 1 - cosine, with the arguments of consistency_loss."""
    views, batch = student.shape[-3:-1]
    places = torch.arange(first_view, first_view + views)[:, None]
    meets = (places != torch.arange(teacher.shape[-3])).to(student.dtype)  # [V, U]
    cosines = torch.einsum("...vbd,...ubd->...vu", student, teacher) / batch
    loss = 1 - (meets * cosines).sum((-2, -1)) / meets.sum()
    return loss, torch.zeros_like(loss)


def unweighted() -> Arm:
    """Every image counts once, as in FedAvg (McMahan et al., AISTATS 2017): n_i / N.

    (A plain mean over sites would be the balanced one wherever each site has its own modality.)
    """

    def by_images(num_examples: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
        counts = {site: sum(num_examples[site].values()) for site in sorted(num_examples)}
        return {site: count / sum(counts.values()) for site, count in counts.items()}

    def merge(*arguments: Any, **options: Any) -> Any:
        with mock.patch("server.aggregate.balanced_weights", by_images):
            return aggregate(*arguments, **options)

    return Arm(merge=merge)


def fedprox(weight: float, rate: float = 1.0) -> Arm:
    """Ours with FedProx' term, weight / 2 * |w - w_global|^2 (Li et al., MLSys 2020).

    Its gradient is added after each tensor's was clipped, or the clipping would undo it.
    """

    def change(state: TrainState, batches: Any, recipe: Recipe, site: str) -> None:
        pairs = [(p, p.detach().clone()) for p in state.student.parameters()]

        def pull(*_: Any) -> None:
            for parameter, start in pairs:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start, alpha=weight)

        state.optimizer.register_step_pre_hook(pull)

    arm = scaled("optim", "learning_rate", rate)
    return replace(arm, site_round=before_training(change))


def anchor(weight: float) -> Arm:
    """The student keeps near the received teacher's tokens on the site's own images.

    As learning without forgetting does with outputs (Li and Hoiem, TPAMI 2018), on one global view.
    """

    def change(state: TrainState, batches: Any, recipe: Recipe, site: str) -> None:
        before = copy.deepcopy(state.teacher.backbone)

        def distil(*_: Any) -> None:
            views = recipe.views.model_copy(update={"local_views": 0})
            pixels = [
                make_views(
                    batch.images[:], name := MODALITIES[batch.modality], views,
                    torch_generator(recipe.seed, site, "anchor", state.step, name),
                ).global_VBCHW[0]
                for batch in batches(state.step)
            ]  # fmt: skip
            shown = torch.cat(pixels).to(state.device)
            with torch.no_grad():
                kept = before.forward_features(shown)
            error = (state.student.backbone.forward_features(shown) - kept).square().mean()
            torch.autograd.backward(weight * error)

        state.optimizer.register_step_pre_hook(distil)

    return Arm(site_round=before_training(change))


class ServerMomentum:
    """Slows the global weights down: v <- b v + (1 - b) change, w <- w + v.

    FedAvgM (Hsu et al., 2019) with the new change damped, so that b alone is what is set.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.velocity: dict[str, Arrays] = {}

    def __call__(
        self, recipe: Recipe, state: GlobalState, contributions: dict[str, Prototypes],
        updates: Mapping[str, SiteUpdate], *, round_number: int,
    ) -> tuple[GlobalState, dict[str, Prototypes], dict[str, float]]:  # fmt: skip
        """As server.aggregate.aggregate."""
        merged, kept, weights = aggregate(
            recipe, state, contributions, updates, round_number=round_number
        )
        student = self._moved("student", state.student, merged.student)
        teacher = self._moved("teacher", state.teacher, merged.teacher)
        return replace(merged, student=student, teacher=teacher), kept, weights

    def _moved(self, which: str, before: Arrays, after: Arrays) -> Arrays:
        old, moved = self.velocity.get(which, {}), {}
        self.velocity[which] = {}
        for name, start in before.items():
            change = (1 - self.momentum) * (after[name] - start)
            speed = change + self.momentum * old.get(name, 0)
            self.velocity[which][name] = speed
            moved[name] = (start + speed).astype(start.dtype)
        return moved


def before_training(change: Change) -> SiteRound:
    """A site's round in which `change` sees the state right before the product's loop trains it."""

    def train(state: TrainState, batches: Any, recipe: Recipe, *arguments: Any, **options: Any):
        change(state, batches, recipe, options["site"])
        return training.train(state, batches, recipe, *arguments, **options)

    return _instead("core.site_round.train", train)


def _instead(name: str, function: Callable[..., Any]) -> SiteRound:
    """A site's round with a function of the product replaced."""

    def patched() -> AbstractContextManager[Any]:
        return mock.patch(name, function)

    def at_site(*arguments: Any, **options: Any) -> tuple[SiteUpdate, Arrays]:
        with patched():
            return site_round(*arguments, **options)

    return at_site
