"""What a recipe may combine with differential privacy."""

import json

import pytest

from core.config import Recipe, recipe_from_json
from core.errors import UserError

RECORD = {
    "privacy": {"mode": "record"},
    "loss": {"koleo_weight": 0.0},
    "evaluation": {"every_rounds": 0},
}
SITE = {
    "privacy": {"mode": "site", "sites": 3},
    "federation": {"teacher": "rebuild", "robust": "none", "quarantine_after": 0},
}


def read(base: dict, section: str = "", **changes: object) -> Recipe:
    table = {**base, section: {**base.get(section, {}), **changes}} if section else base
    return recipe_from_json(json.dumps(table), "recipe 'r.toml'")


def test_proven_recipes_are_read():
    assert read(RECORD).privacy.mode == "record"
    assert read(SITE).privacy.sites == 3
    # "whatever it sends" is what site privacy bounds: what comes later is bounded too
    assert read(SITE, "federation", transport="delta8").privacy.sites == 3


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("loss", {"koleo_weight": 0.1}, "koleo_weight = 0: KoLeo compares a patient with"),
        ("loss", {"description_weight": 1}, "description_weight = 0: what is usual at a site"),
        ("evaluation", {"every_rounds": 1}, "figures on a site's own labels leave without"),
        ("memory", {"at_round_start": "refilled"}, "refilling embeds patients"),
        ("model", {"drop_path": 0.1}, "dropped paths"),
        ("model", {"checkpointing": True}, "blocks computed anew"),
        ("optim", {"accumulate": 2}, "a step takes patients, privacy.chunk at a time"),
        ("optim", {"precision": "bf16"}, "how bf16 rounds a patient's values may hang on"),
        ("federation", {"transport": "delta8"}, "before privacy was switched on had no noise"),
        ("privacy", {"prototype_releases": 9}, "more prototype_releases than rounds"),
    ],
)
def test_record_mode_refuses_unproven_parts(section, changes, reason):
    with pytest.raises(UserError, match=reason):
        read(RECORD, section, **changes)


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("federation", {"teacher": "average"}, "a second release"),
        ("federation", {"robust": "norm_bound"}, "let one site change what others count for"),
        ("federation", {"quarantine_after": 3}, "depend on other sites"),
        ("federation", {"min_sites": 9}, "more federation.min_sites than privacy.sites"),
        ("privacy", {"sites": 0}, "a fixed number of sites"),
        ("privacy", {"sites": 20, "delta": 0.05}, "needs privacy.delta below 1 / privacy.sites"),
    ],
)
def test_site_mode_refuses_unproven_parts(section, changes, reason):
    with pytest.raises(UserError, match=reason):
        read(SITE, section, **changes)


def test_settings_without_a_mode_are_refused_rather_than_ignored():
    with pytest.raises(UserError, match="has no use for noise_multiplier"):
        read({"privacy": {"noise_multiplier": 2.0}})


def test_a_refusal_names_the_file_and_no_whole_recipe():
    with pytest.raises(UserError, match=r"^recipe 'r.toml': privacy.mode") as raised:
        read(RECORD, "loss", koleo_weight=0.1)
    assert len(str(raised.value)) < 250
