"""Membership inference: was this image trained on? Asked by the coordinator of one site's answers.

Studies with one site, each on a random half of a pool of images; the coordinator keeps the weights
it sent and got in every round, and knows the image it asks about. Two scores of an image:
  loss       minus the consistency loss under the last student and teacher, against random anchors
  direction  the cosine between the round's update and minus the gradient of the image's loss at the
             weights that were sent, summed over rounds
Each is taken relative to the image's mean score in the studies that left it out, as a coordinator
would who trains such studies on data of its own (Carlini et al., LiRA, S&P 2022, in its one-sided
form). `attacks.py` runs this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import functional_call, grad, vmap

from core.augment import make_views
from core.config import Recipe
from core.initial import initial_state
from core.losses import consistency_loss
from core.modalities import MODALITIES
from core.randomness import torch_generator
from core.shards import Shard
from core.step import TrainState
from core.train import load_network, new_state
from core.wire import GlobalState, SiteUpdate

Floats = NDArray[np.float64]
Round = Callable[[GlobalState, Sequence[Shard], dict[str, NDArray], int], tuple[SiteUpdate, dict]]
"""(received, shards, private arrays, first step) -> update and private arrays, as site_round."""
VIEWS = 4
"""Draws of an image's views over which its loss is averaged; its gradient is taken on the first."""


@dataclass(frozen=True)
class Scores:
    """Of every study and image [studies, images]."""

    member: NDArray[np.bool_]
    loss: Floats
    direction: Floats


def pool_of(shard: Shard, images: int) -> Shard:
    """So many training images, one a patient."""
    rows = np.flatnonzero(shard.split == "train")
    rows = rows[np.unique(shard.patient[rows], return_index=True)[1]]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:images])
    names = ("images", "modality", "patient", "label", "split")
    part = replace(shard, **{name: getattr(shard, name)[rows] for name in names})
    return replace(part, patient=np.arange(len(rows)))


def members(studies: int, images: int) -> NDArray[np.bool_]:
    """Who is in which study [studies, images]: half of the images; each in half of the studies."""
    draws = np.random.default_rng(1)
    first = [draws.permutation(images) < images // 2 for _ in range(studies // 2)]
    return np.array([half for chosen in first for half in (chosen, ~chosen)])


def attack(recipe: Recipe, pool: Shard, studies: int, a_round: Callable[[int], Round]) -> Scores:
    """Run the studies and score every image in each.

    Args:
        recipe: of one site.
        pool: the images, all of one modality.
        studies: an even number.
        a_round: study -> how its site trains.
    """
    member = members(studies, len(pool.images))
    judge, names = Judge(recipe, pool), ("images", "modality", "patient", "label", "split")
    loss, direction = np.zeros(member.shape), np.zeros(member.shape)
    for study, inside in enumerate(member):
        shard = replace(pool, **{name: getattr(pool, name)[inside] for name in names})
        sent, private, train = initial_state(recipe), {}, a_round(study)
        for number in range(recipe.federation.rounds):
            first = number * recipe.federation.local_steps
            update, private = train(sent, [shard], private, first)
            direction[study] += judge.cosines(sent, update)
            sent = GlobalState(student=update.student, teacher=update.teacher)
        loss[study] = -judge.losses(sent)
    return Scores(member, loss, direction)


def auc(member: NDArray[np.bool_], score: Floats) -> tuple[float, float, float]:
    """Area under the curve, members against others, and its 95 % interval over images.

    Intervals by drawing images with all their studies anew: an image's studies are not independent.
    """
    out = np.where(member, np.nan, score)
    spread = np.nanstd(out, axis=1, keepdims=True)  # of a study, so that studies are on one scale
    others = (np.nansum(out, axis=0) - np.nan_to_num(out)) / ((~member).sum(0) - ~member)
    relative = (score - others) / spread
    draws = np.random.default_rng(2)
    drawn = []
    for _ in range(1000):
        columns = draws.integers(0, member.shape[1], member.shape[1])
        drawn.append(roc_auc_score(member[:, columns].ravel(), relative[:, columns].ravel()))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(roc_auc_score(member.ravel(), relative.ravel())), float(low), float(high)


class Judge:
    """Losses and gradients of the pool's images, alone and on fixed views and anchors."""

    def __init__(self, recipe: Recipe, pool: Shard) -> None:
        self.recipe, self.name = recipe, MODALITIES[pool.modality[0]]
        self.state: TrainState = new_state(recipe, torch.device("cpu"), "judge")
        self.pixels = torch.from_numpy(np.array(pool.images)).permute(0, 3, 1, 2)
        anchors = torch.randn(256, recipe.model.embedding_dim, generator=torch_generator("judge"))
        self.anchors = torch.nn.functional.normalize(anchors, dim=-1)

    def losses(self, weights: GlobalState) -> Floats:
        """Of each image [N], by these students and teachers."""
        with torch.no_grad():
            return self._mean(
                weights, VIEWS, lambda loss, own, *unit: vmap(loss, (None, 0, 0, 0))(own, *unit)
            )

    def cosines(self, sent: GlobalState, update: SiteUpdate) -> Floats:
        """Between the update and minus the gradient of each image [N]."""
        moved = {n: torch.from_numpy(update.student[n] - sent.student[n]) for n in update.student}
        step = torch.cat([difference.flatten() for difference in moved.values()])

        def of(loss: Callable[..., Tensor], own: dict[str, Tensor], *unit: Tensor) -> Tensor:
            gradient = vmap(grad(loss), (None, 0, 0, 0))(own, *unit)
            rows = torch.cat([gradient[name].flatten(1) for name in moved], dim=1)
            rows = rows - rows.mean(0)  # what all images share says nothing of one
            rows = rows / (rows.square().mean(0).sqrt() + 1e-8)  # as AdamW scales them
            return -torch.nn.functional.cosine_similarity(rows, step[None])

        return self._mean(sent, 1, of)

    def _mean(
        self, weights: GlobalState, draws_of_views: int, figure: Callable[..., Tensor]
    ) -> Floats:
        load_network(self.state.student, weights.student)
        load_network(self.state.teacher, weights.teacher)
        own = {name: p.detach() for name, p in self.state.student.named_parameters()}
        blocks = [torch.arange(len(self.anchors))]

        def loss(own: dict[str, Tensor], large: Tensor, small: Tensor, teacher: Tensor) -> Tensor:
            views = [functional_call(self.state.student, own, (v,)) for v in (large, small)]
            temperatures = self.recipe.loss.student_temperature, 0.04
            student = torch.cat(views)[:, None]
            return consistency_loss(student, teacher[:, None], self.anchors, blocks, *temperatures)[
                0
            ]

        total = np.zeros(len(self.pixels))
        for number in range(draws_of_views):
            for rows in torch.arange(len(self.pixels)).split(32):
                draws = torch_generator("judge", number, int(rows[0]))
                views = make_views(self.pixels[rows], self.name, self.recipe.views, draws)
                large, small = views.global_VBCHW.transpose(0, 1), views.local_VBCHW.transpose(0, 1)
                with torch.no_grad():
                    teacher = self.state.teacher(large.flatten(0, 1)).view(len(rows), 2, -1)
                total[rows] += (
                    figure(loss, own, large, small, teacher).double().numpy() / draws_of_views
                )
        return total
