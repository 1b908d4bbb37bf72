from datetime import datetime

import pytest

from client.policy import (
    NotNow,
    Policy,
    PolicyRefusal,
    approve,
    check_bundle,
    check_evaluation,
    check_hours,
)

APP = "ab" * 32


@pytest.fixture
def policy():
    """Stricter than the defaults in every number."""
    return Policy(
        allowed_modalities=("ct",),
        min_images=50,
        min_patients=20,
        max_rounds=5,
        min_patients_per_prototype=20,
    )


def test_the_stricter_minimum_of_patients_holds(policy, make_recipe):
    lax = approve(policy, make_recipe(prototype_min_patients=2), 1, {"ct": 50}, {"ct": 20})
    assert lax.federation.prototype_min_patients == 20
    strict = approve(policy, make_recipe(prototype_min_patients=30), 1, {"ct": 50}, {"ct": 20})
    assert strict.federation.prototype_min_patients == 30


@pytest.mark.parametrize(
    ("rounds", "round_number", "images", "patients", "reason"),
    [
        (6, 1, {"ct": 50}, 20, "the recipe has 6 rounds; this site's policy allows 5"),
        (2, 3, {"ct": 50}, 20, "round 3 is not one of the recipe's rounds 1 to 2"),
        (2, 0, {"ct": 50}, 20, "round 0 is not one of"),
        (2, 1, {}, 20, "no training images"),
        (2, 1, {"ct": 49}, 20, "49 training images of 'ct', fewer than the 50"),
        (2, 1, {"ct": 50}, 19, "19 patients to train on of 'ct', fewer than the 20"),
        (2, 1, {"ct": 50, "us": 50}, 20, "does not allow training on 'us'"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused(
    policy, make_recipe, rounds, round_number, images, patients, reason
):
    recipe = make_recipe(rounds=rounds)
    with pytest.raises(PolicyRefusal, match=reason):
        approve(policy, recipe, round_number, images, dict.fromkeys(images, patients))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"privacy": "record"}, "asks for differential privacy of mode 'record'; the recipe has"),
        ({"privacy": "site"}, "asks for differential privacy of mode 'site'; the recipe has none"),
        ({"max_epsilon": 8.0}, "an epsilon of at most 8; the recipe has no record privacy"),
    ],
)
def test_who_asks_for_privacy_is_not_served_by_a_recipe_without(recipe, asked, reason):
    with pytest.raises(PolicyRefusal, match=reason):
        approve(Policy(**asked), recipe, 1, {"ct": 50}, {"ct": 20})


def test_a_run_with_another_bundle_or_an_unknown_one_is_refused():
    policy = Policy(allowed_apps=(APP,))
    check_bundle(policy, APP)
    with pytest.raises(PolicyRefusal, match="does not answer runs submitted with the bundle cdcd"):
        check_bundle(policy, "cd" * 32)
    with pytest.raises(PolicyRefusal, match="with a bundle that it cannot tell"):
        check_bundle(policy, "")
    check_bundle(Policy(), "")  # no list: any bundle, as none is run


def test_a_refusal_outside_the_hours_says_when_to_ask_again():
    policy = Policy(hours=("mon-fri 20:00-06:00",))
    check_hours(policy, datetime(2026, 11, 27, 23, 0))  # a Friday
    check_hours(policy, datetime(2026, 11, 28, 5, 59))
    with pytest.raises(NotNow, match=r"now Sat 06:00; ask again from 2026-11-30T20:00\S* on"):
        check_hours(policy, datetime(2026, 11, 28, 6, 0))
    check_hours(Policy())


def test_with_record_privacy_a_refusal_tells_no_number_of_patients(policy, make_record_recipe):
    declaring = policy.model_copy(update={"declared_images": {"ct": 100}})
    for images, patients in ((49, 20), (50, 19)):
        with pytest.raises(PolicyRefusal, match="fewer images or patients of 'ct'") as raised:
            approve(declaring, make_record_recipe(), 1, {"ct": images}, {"ct": patients})
        assert not any(character.isdigit() for character in str(raised.value))
    approve(declaring, make_record_recipe(), 1, {"ct": 50}, {"ct": 20})


def test_with_record_privacy_a_number_must_be_declared(make_record_recipe):
    with pytest.raises(PolicyRefusal, match="a public number of images of 'ct'"):
        approve(Policy(), make_record_recipe(), 1, {"ct": 50}, {"ct": 20})


@pytest.mark.parametrize("mode", ["record", "site"])
def test_a_policy_takes_the_mode_that_it_asks_for_and_no_other(mode, make_record_recipe):
    policy = Policy(privacy=mode, declared_images={"ct": 100})
    if mode == "record":
        approve(policy, make_record_recipe(), 1, {"ct": 50}, {"ct": 20})
    else:
        with pytest.raises(PolicyRefusal, match="of mode 'site'; the recipe has 'record'"):
            approve(policy, make_record_recipe(), 1, {"ct": 50}, {"ct": 20})


def test_a_site_that_asks_for_record_privacy_answers_no_evaluation():
    with pytest.raises(PolicyRefusal, match="would leave without noise"):
        check_evaluation(Policy(privacy="record"))
    check_evaluation(Policy())
