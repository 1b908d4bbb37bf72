import json
from pathlib import Path

import pytest

from core.config import Recipe, load_recipe, recipe_from_json
from core.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_survives_the_wire(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem.replace("_", "-")
    assert recipe_from_json(recipe.to_json(), "the wire") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rouns = 3", "unknown key 'rouns'"),
        ("[optim]\nbatch = 3", "unknown key 'optim.batch'"),
        ('seed = "x"', "'seed': .*integer, found 'x'"),
        ("seed = 1.5", "'seed': .*integer, found 1.5"),
        ("[optim]\nlearning_rate = true", "'optim.learning_rate': .*number, found True"),
        ("[optim]\nlearning_rate = nan", "'optim.learning_rate'"),
        ("[views]\nglobal_area = [0.5, 0.2]", r"must be \[low, high\]"),
        ("[images]\npx = 15", "'images.px': .*greater than or equal to 16, found 15"),
        ("[images]\nct_window = [40.0, 0.0]", r"'images.ct_window.1': .*found 0.0"),
        ("[images]\nct_window = [40.0, -400.0]", r"'images.ct_window.1': .*found -400.0"),
        ("[images]\nct_window = [nan, 400.0]", r"'images.ct_window.0'"),
        ("[images]\nct_window = [40.0]", r"'images.ct_window.1': field required"),
        ("[optim]\nbatch_size = 4\naccumulate = 5", "5 parts of 4 images leave some empty"),
        ("[memory]\nblocks = 1000", "a block needs at least 8 entries"),
        ("[optim]\nclip_norm = 1e-10", r"'optim.clip_norm': .*greater than or equal to 0.001"),
        ('[federation]\nteacher = "freeze"', "'average' or 'rebuild'"),
        ("seed = = 1", "not valid TOML"),
        ('[model]\nbackbone = "hf-hub:timm/vit_tiny"', "must be a plain timm name"),
        ('[model]\ninit_file = "a"\nphantom_steps = 3', "are two starts: give one of them"),
        ("[model]\nphantoms = 1", "'phantoms' must be 2 or more, or 0"),
        ("[model]\nphantom_batch = 6", "model.phantom_batch"),
        ("[model]\noptions = { pretrained = true }", "option 'pretrained' is not allowed"),
        ('[model]\noptions = { checkpoint_path = "a" }', "option 'checkpoint_path' is not"),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "wrong.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_full_size_recipes_ask_for_pictures_larger_than_their_views() -> None:
    for name in ("vits16", "vitb16"):
        recipe = load_recipe(CONFIGS / f"{name}.toml")
        assert recipe.images.px == 256 > recipe.views.global_px
        assert recipe.images.ct_window == (40.0, 400.0)


def test_a_recipe_written_before_images_were_in_it_is_still_the_same() -> None:
    table = json.loads(Recipe(seed=3).to_json())
    del table["images"]
    assert recipe_from_json(json.dumps(table), "an older run") == Recipe(seed=3)


def test_a_missing_recipe_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give the path of a TOML file"):
        load_recipe(tmp_path / "none.toml")


def test_a_recipe_cannot_be_changed_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3
