"""What a recipe's privacy buys and costs, told before a study begins."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from core.config import Recipe, recipe_from_json
from core.privacy.accounting import Event, epsilon, noise_for, study_events

if TYPE_CHECKING:
    from core.privacy.config import PrivacyConfig

PUBLISHED: Final = 0.06
"""Noise to signal of a step in ViP (Yu et al., ICML 2024, arXiv 2306.08842): 10^8 weights, 81,920
images a step, of 233 million. DP-Cap (Sander et al., ICML 2024) has a tenth of it."""


def record_recipe(base: Recipe) -> Recipe:
    """A recipe of mode 'record' with the model, the rounds and the privacy section of another.

    For planning: what mode 'record' does not go together with is left out.
    """
    if base.privacy.mode == "record":
        return base
    table = {
        "model": base.model.model_dump(mode="json") | {"drop_path": 0.0},
        "federation": base.federation.model_dump(mode="json"),
        "loss": {"koleo_weight": 0.0},
        "evaluation": {"every_rounds": 0},
        "privacy": {"mode": "record"},
    }
    return recipe_from_json(json.dumps(table), f"plan from recipe '{base.name}'")


def with_privacy(recipe: Recipe, **values: object) -> Recipe:
    """The recipe with other values in its privacy section, checked."""
    privacy = recipe.privacy.model_dump(mode="json") | values
    table = recipe.model_dump(mode="json") | {"privacy": privacy}
    return recipe_from_json(json.dumps(table), f"plan from recipe '{recipe.name}'")


def with_epsilon(recipe: Recipe, target: float) -> Recipe:
    """The recipe with the least noise on gradients that keeps all its rounds within an epsilon.

    Raises:
        UserError: no noise does, as its prototypes alone cost more.
    """
    privacy = recipe.privacy
    prototypes = [event for event in study_events(recipe) if event.kind == "prototypes"]
    sigma = noise_for(target, privacy.delta, privacy.sampling_rate, recipe.total_steps, prototypes)
    return with_privacy(recipe, noise_multiplier=sigma)


def epsilon_by_round(
    recipe: Recipe, delta: float, spent: Sequence[Event] = (), rows: int = 8
) -> dict[int, float]:
    """Epsilon after the first round, after some evenly spread ones, and after the last.

    Args:
        recipe: The study's.
        delta: At which.
        spent: What was charged before the first round.
        rows: About how many rounds to tell; each takes a second or two.
    """
    last = recipe.federation.rounds
    told = sorted({1, *(math.ceil(last * row / rows) for row in range(1, rows + 1))})
    return {number: epsilon([*spent, *study_events(recipe, 1, number)], delta) for number in told}


def trainable_weights(recipe: Recipe) -> int:
    """How many weights of the recipe's network get noise."""
    from core.backbone import Network
    from core.privacy.network import choose_trainable, learning

    network = Network(recipe.model, recipe.views.global_px)
    privacy: PrivacyConfig = recipe.privacy
    choose_trainable(network, privacy.trainable, privacy.trainable_blocks)
    return sum(weight.numel() for weight in learning(network).values())


def noise_to_signal(sigma: float, weights: int, patients: float) -> float:
    """Length of a step's noise over the length of the sum of gradients, were all of them parallel.

    Args:
        sigma: Noise multiplier.
        weights: How many learn: the noise is sigma sqrt(weights) clips long.
        patients: In a step; each adds one clip at most.
    """
    return sigma * math.sqrt(weights) / patients


def utility(ratio: float) -> str:
    """What a ratio of noise to signal lets one expect, in a sentence."""
    if ratio <= 0.1:
        return (
            "A step's noise is short beside what its patients can add, as in published private "
            f"pretraining (about {PUBLISHED:g}): features can learn from scratch, if there are "
            "steps enough."
        )
    if ratio <= 1:
        return (
            f"A step has {ratio / PUBLISHED:.1f} times the noise of published private pretraining "
            f"(about {PUBLISHED:g}): expect features not far from their initialisation; begin with "
            "a pretrained backbone (model.init_file), and let few weights learn."
        )
    return (
        f"A step's noise is {ratio:,.1f} times as long as what all its patients can add at best: "
        "expect features near their initialisation, whatever the images show. More patients a "
        "step, fewer weights or a larger epsilon change that; more rounds at this epsilon do not."
    )
