from pathlib import Path
from typing import Any

import pytest
import typer

from client.__main__ import app
from client.ingest.options import parse_rules
from client.ingest.types import BURNED_IN_DEFAULTS, Rules
from core.errors import UserError


def test_no_options_are_the_defaults() -> None:
    assert parse_rules() == Rules()


def test_the_help_names_the_defaults_that_hold() -> None:
    command: Any = typer.main.get_command(app)
    shown = {
        option.name: option.show_default if isinstance(option.show_default, str) else option.default
        for option in command.commands["prepare"].params
    }
    rules = Rules()
    for name in ("labels", "patients", "duplicates", "frames", "tiles"):
        assert shown[name] == getattr(rules, name)
    assert shown["px"] == str(rules.px)
    assert shown["ct_window"] == ",".join(f"{value:g}" for value in rules.ct_window)
    policies = " ".join(f"{name}={policy}" for name, policy in BURNED_IN_DEFAULTS.items())
    assert shown["burned_in"] == policies


def test_options_become_rules() -> None:
    rules = parse_rules(
        modality="us",
        px=96,
        ct_window="-600,1500.5",
        labels="folder",
        patients="folder",
        burned_in=["mask", "declared=skip", "photo=accept"],
        duplicates="keep",
        frames=3,
        tiles=9,
    )
    assert rules == Rules(
        px=96,
        modality="us",
        ct_window=(-600.0, 1500.5),
        frames=3,
        tiles=9,
        patients="folder",
        labels="folder",
        duplicates="keep",
        burned_in={**dict.fromkeys(BURNED_IN_DEFAULTS, "mask"), "declared": "skip"}
        | {"photo": "accept"},
    )


def test_a_recipe_gives_pixels_and_window(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[images]\npx = 80\nct_window = [50, 350]\n[views]\nglobal_px = 64\n")
    rules = parse_rules(recipe=recipe)
    assert (rules.px, rules.ct_window) == (80, (50.0, 350.0))
    with pytest.raises(UserError, match="leave --px and --ct-window out"):
        parse_rules(recipe=recipe, px=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "mri"}, "expected --modality ct, cxr, .*, found 'mri'"),
        ({"px": 15}, "expected --px from 16 to 1024, found 15"),
        ({"px": 2048}, "expected --px from 16 to 1024, found 2048"),
        ({"ct_window": "40"}, "expected --ct-window CENTRE,WIDTH .* found '40'"),
        ({"ct_window": "40,nan"}, "a width from 1 to 10000, found '40,nan'"),
        ({"ct_window": "40,0"}, "a width from 1 to 10000, found '40,0'"),
        ({"labels": "yes"}, "expected --labels none, folder, found 'yes'"),
        ({"patients": "name"}, "expected --patients file, folder, found 'name'"),
        ({"duplicates": "no"}, "expected --duplicates remove, keep, found 'no'"),
        (
            {"burned_in": ["hide"]},
            "a policy of skip, mask, accept, or a policy alone, found 'hide'",
        ),
        ({"burned_in": ["xray=mask"]}, "a class of declared, screen, .*, found 'xray=mask'"),
        ({"burned_in": ["=mask"]}, "found '=mask'"),
        ({"frames": 0}, "expected --frames of at least 1, found 0"),
        ({"tiles": -1}, "expected --tiles of at least 1, found -1"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_rules(**options)
