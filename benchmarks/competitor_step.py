"""One round of a method that is not ours: the same start, images, views, schedules and optimiser.

A competitor is a network and a loss. Everything else is the product's: batches, augmentation,
learning rate, weight decay, clipping, the teacher as moving average, moments kept between rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from federation_loop import Arm, SiteRound, changed
from torch import Tensor, nn

from core.augment import make_views
from core.backbone import BACKBONE, Network, initialise, use_plain_attention
from core.batch import Batch
from core.checkpoint import Arrays
from core.class_token import class_token_features
from core.config import Recipe
from core.device import uses_bf16
from core.initial import initial_state
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.optimizer import clip_each, make_optimizer
from core.randomness import torch_generator
from core.schedules import ema_momentum
from core.shards import Shard
from core.site_data import SiteData
from core.sites import training_images
from core.step import TrainState
from core.train import (
    follow,
    load_network,
    load_private,
    network_arrays,
    private_arrays,
    set_rates,
)
from core.wire import GlobalState, Prototypes, SiteUpdate


@dataclass(frozen=True)
class Step:
    """What a loss is made of."""

    student: nn.Module
    teacher: nn.Module
    large: Tensor  # [2, B, 3, H, W], all modalities of the site together
    small: Tensor  # [L, B, 3, h, w]
    recipe: Recipe
    number: int
    """Over the whole study."""
    draws: torch.Generator


@dataclass(frozen=True)
class Competitor:
    """A method. Networks have a timm `backbone` and a `description`, None; the rest is theirs."""

    network: Callable[[Recipe], nn.Module]
    loss: Callable[[Step], Tensor]


def arm_of(
    competitor: Competitor,
    *,
    rate: float,
    round_of: Callable[[SiteRound], SiteRound] = lambda site_round: site_round,
    local_like_global: bool = False,
) -> Arm:
    """The arm of a competitor.

    Args:
        competitor: network and loss.
        rate: factor on the recipe's learning rate.
        round_of: changes what a site does about a round.
        local_like_global: draw the local views as the global ones are: for methods without crops
            of another size, which so see as many views.
    """

    def recipe(recipe: Recipe) -> Recipe:
        views = recipe.views
        larger = {"local_px": views.global_px, "local_area": list(views.global_area)}
        return changed(
            recipe,
            optim={"learning_rate": rate * recipe.optim.learning_rate},
            views=larger if local_like_global else {},
        )

    def site_round(*arguments, **options) -> tuple[SiteUpdate, Arrays]:
        return compete(*arguments, competitor=competitor, **options)

    return Arm(
        recipe=recipe,
        initial=lambda recipe: first_state(recipe, competitor),
        site_round=round_of(site_round),
    )


def first_state(recipe: Recipe, competitor: Competitor) -> GlobalState:
    """The method's network with the backbone with which ours begins."""
    network = competitor.network(recipe)
    initialise(network, torch_generator(recipe.seed, "initial"))  # type: ignore[arg-type]
    start = initial_state(recipe).student
    arrays = network_arrays(network)  # type: ignore[arg-type]
    arrays |= {name: array for name, array in start.items() if name.startswith(BACKBONE)}
    return GlobalState(student=arrays, teacher={name: a.copy() for name, a in arrays.items()})


def compete(
    recipe: Recipe,
    received: GlobalState,
    shards: Sequence[Shard],
    private: Arrays,
    *,
    site: str,
    first_step: int,
    device: str,
    competitor: Competitor,
) -> tuple[SiteUpdate, Arrays]:
    """As core.site_round.site_round, by another method."""
    target, data = torch.device(device), SiteData(shards)
    state = _state(recipe, competitor, target)
    load_network(state.student, received.student)
    load_network(state.teacher, received.teacher)
    load_private(state, private)
    state.step = first_step
    parameters, total = list(state.student.parameters()), 0.0
    for _ in range(recipe.federation.local_steps):
        step = state.step
        set_rates(state.optimizer, recipe, step)
        batches = data.batches(recipe, site, step)
        large, small = (part.to(target) for part in _views(recipe, batches, site, step))
        draws = torch_generator(recipe.seed, site, "competitor", step)
        loss = competitor.loss(
            Step(state.student, state.teacher, large, small, recipe, step, draws)
        )
        state.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each(parameters, recipe.optim.clip_norm)
        state.optimizer.step()
        follow(state, ema_momentum(recipe, step))
        state.step += 1
        total += float(loss.detach())
    update = SiteUpdate(
        round_number=first_step // recipe.federation.local_steps + 1,
        student=network_arrays(state.student),
        teacher=network_arrays(state.teacher),
        prototypes=Prototypes({}, {}),
        num_examples=training_images(shards),
        metrics={"loss": total / recipe.federation.local_steps},
    )
    return update, private_arrays(state, keep_memory=False)


def _state(recipe: Recipe, competitor: Competitor, device: torch.device) -> TrainState:
    student = competitor.network(recipe).to(device)
    teacher = competitor.network(recipe).to(device).requires_grad_(False)
    use_plain_attention(student)
    use_plain_attention(teacher)
    bank = MemoryBank(0, 1, torch.Generator())  # no method here has a memory
    optimizer = make_optimizer(student, recipe)  # type: ignore[arg-type]
    return TrainState(student, teacher, optimizer, bank, device)  # type: ignore[arg-type]


def _views(recipe: Recipe, batches: Sequence[Batch], site: str, step: int) -> tuple[Tensor, Tensor]:
    """The views that ours would see in this step."""
    made = []
    for batch in batches:
        name = MODALITIES[batch.modality]
        draws = torch_generator(recipe.seed, site, "step", step, name)
        made.append(make_views(batch.images[:], name, recipe.views, draws))
    large = torch.cat([part.global_VBCHW for part in made], dim=1)
    return large, torch.cat([part.local_VBCHW for part in made], dim=1)


def precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Autocast as ours trains."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe, device))


def class_tokens(network: nn.Module, pixels_VBCHW: Tensor, recipe: Recipe) -> Tensor:
    """Class token features [V, B, d] in float32."""
    with precision(recipe, pixels_VBCHW.device):
        features = class_token_features(network.backbone, pixels_VBCHW.flatten(0, 1))  # type: ignore[arg-type]
    return features.float().view(*pixels_VBCHW.shape[:2], -1)


def bare(recipe: Recipe) -> Network:
    """Our backbone and projection head, without what describes."""
    return Network(recipe.model, recipe.views.global_px, drop_path=recipe.model.drop_path)
