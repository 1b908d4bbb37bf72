"""What a plan of privacy tells."""

import json
import re
from pathlib import Path

import pytest

from core.backbone import Network
from core.config import Recipe, load_recipe, recipe_from_json
from core.errors import UserError
from core.privacy.accounting import Event, epsilon, study_events
from core.privacy.budget import (
    epsilon_by_round,
    noise_to_signal,
    record_recipe,
    trainable_weights,
    utility,
    with_epsilon,
    with_privacy,
)

CONFIGS = Path(__file__).parents[3] / "configs"


def test_noise_to_signal_is_as_in_the_figures_of_published_work() -> None:
    # ViP: sigma .5, batch 81,920, 10^8 weights; and 10,000 patients, 1,024 a step, epsilon 8.
    assert noise_to_signal(0.5, 100_000_000, 81_920) == pytest.approx(0.061, abs=5e-4)
    assert noise_to_signal(1.52, 5_500_000, 1024) == pytest.approx(3.48, abs=5e-3)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.06, "features can learn from scratch"),
        (0.3, r"5\.0 times the noise of published .* begin with a pretrained backbone"),
        (3.5, r"3\.5 times as long as what all its patients can add"),
    ],
)
def test_what_to_expect_is_told_by_the_ratio(ratio: float, words: str) -> None:
    assert re.search(words, utility(ratio))


def test_the_noise_of_a_target_covers_prototypes_and_changes_nothing_else(
    make_record_recipe,
) -> None:
    recipe = make_record_recipe(sampling_rate=1.0, prototype_releases=2, prototype_noise=6.0)
    found = with_epsilon(recipe, 2.0)
    sigma = found.privacy.noise_multiplier
    assert epsilon(study_events(found), recipe.privacy.delta) <= 2.0
    less = study_events(with_privacy(found, noise_multiplier=sigma - 0.001))
    assert epsilon(less, recipe.privacy.delta) > 2.0
    assert with_privacy(found, noise_multiplier=recipe.privacy.noise_multiplier) == recipe


def test_prototypes_that_cost_more_than_the_target_are_an_error(make_record_recipe) -> None:
    recipe = make_record_recipe(sampling_rate=1.0, prototype_releases=2, prototype_noise=1.0)
    with pytest.raises(UserError, match="what is released beside the training costs"):
        with_epsilon(recipe, 2.0)


def test_values_that_a_recipe_may_not_have_are_refused(make_record_recipe) -> None:
    with pytest.raises(UserError, match=r"'privacy\.delta': input should be less than"):
        with_privacy(make_record_recipe(), delta=0.5)


def test_epsilon_by_round_begins_with_the_first_and_ends_with_the_study(make_record_recipe) -> None:
    recipe = make_record_recipe({"rounds": 20}, sampling_rate=1.0, prototype_releases=3)
    delta = recipe.privacy.delta
    found = epsilon_by_round(recipe, delta, rows=4)
    assert list(found) == [1, 5, 10, 15, 20]
    assert list(found.values()) == sorted(found.values())
    assert found[20] == epsilon(study_events(recipe), delta)
    spent = [Event("site", 3.0, 1.0, 2)]
    more = epsilon_by_round(recipe, 1e-3, spent, rows=4)
    assert more[1] == epsilon([*spent, *study_events(recipe, 1, 1)], 1e-3)


def test_a_study_of_few_rounds_tells_each_once(make_record_recipe) -> None:
    recipe = make_record_recipe({"rounds": 2}, sampling_rate=1.0)
    assert list(epsilon_by_round(recipe, 1e-5)) == [1, 2]


def test_weights_that_learn_are_counted(make_record_recipe) -> None:
    recipe = make_record_recipe()
    network = Network(recipe.model, recipe.views.global_px)
    every = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.head.parameters())
    vectors = sum(p.numel() for p in network.backbone.parameters() if p.ndim == 1)
    assert trainable_weights(recipe) == every
    assert trainable_weights(make_record_recipe(trainable="bias")) == head + vectors


def test_any_recipe_can_be_planned_from_and_a_private_one_stays_as_it_is(
    make_record_recipe,
) -> None:
    assert record_recipe(make_record_recipe()) == make_record_recipe()
    for path in sorted(CONFIGS.glob("*.toml")):
        base = load_recipe(path)
        plan = record_recipe(base)
        assert plan.privacy.mode == "record"
        assert plan.total_steps == base.total_steps
        assert plan.model.backbone == base.model.backbone
    table = {"model": {"drop_path": 0.1}, "optim": {"precision": "bf16"}}
    assert record_recipe(recipe_from_json(json.dumps(table), "test")).model.drop_path == 0
    assert record_recipe(Recipe()).federation == Recipe().federation
