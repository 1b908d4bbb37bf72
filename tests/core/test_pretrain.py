from types import SimpleNamespace

import numpy as np
import pytest
import torch

import core.pretrain
from core.config import ModelConfig
from core.errors import UserError
from core.evaluation.models import open_model
from core.initial import initial_state
from core.pretrain import Pretraining, pretrain
from core.train import network_arrays

SHORT = Pretraining(steps=30, phantoms=12, batch_size=14, learning_rate=3e-3)


def test_a_backbone_learns_to_describe_phantoms_better_than_what_is_usual(recipe) -> None:
    losses: list[float] = []
    pretrain(recipe, SHORT, on_step=losses.append)
    assert losses[-1] < 0.6 * losses[0]
    assert len(losses) == SHORT.steps


def test_the_same_seed_gives_the_same_backbone_and_another_seed_another(recipe) -> None:
    quick = Pretraining(steps=2, phantoms=4, batch_size=7)
    first, again = (pretrain(recipe, quick).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = pretrain(recipe.model_copy(update={"seed": 9}), quick).state_dict()
    assert not torch.equal(first["backbone.patch_embed.proj.weight"],
                           other["backbone.patch_embed.proj.weight"])  # fmt: skip


def test_the_head_stays_as_the_study_would_draw_it(recipe) -> None:
    drawn = initial_state(recipe).student
    trained = pretrain(recipe, Pretraining(steps=2, phantoms=4, batch_size=7)).state_dict()
    for name in (n for n in drawn if n.startswith("head.")):
        assert torch.equal(trained[name], torch.from_numpy(drawn[name]))


def test_a_recipe_says_how_many_pictures_and_the_rate_grows_with_their_root(
    recipe, monkeypatch
) -> None:
    asked = {"phantom_steps": 3, "phantom_batch": 56, "phantoms": 20}
    begun = recipe.model_copy(update={"model": recipe.model.model_copy(update=asked)})
    settings = Pretraining.of(begun)
    assert (settings.steps, settings.batch_size, settings.phantoms) == (3, 56, 20)
    assert Pretraining.of(recipe) == Pretraining(steps=0)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    initial_state(begun)
    assert max(rates) == pytest.approx(2 * settings.learning_rate)


def test_a_recipe_may_have_its_study_begin_so_and_says_how_far_it_is(recipe, monkeypatch) -> None:
    quick = Pretraining(steps=2, phantoms=4, batch_size=7)
    monkeypatch.setattr(core.pretrain, "Pretraining", SimpleNamespace(of=lambda recipe: quick))
    model = recipe.model.model_copy(update={"phantom_steps": 2})
    begun = recipe.model_copy(update={"model": model})
    losses: list[float] = []
    state = initial_state(begun, losses.append)
    assert len(losses) == 2
    trained = network_arrays(pretrain(recipe, quick))
    for arrays in (state.student, state.teacher):
        assert all(np.array_equal(arrays[name], trained[name]) for name in trained)
    drawn, scratch = initial_state(recipe).student, initial_state(begun.from_scratch).student
    assert all(np.array_equal(drawn[name], scratch[name]) for name in drawn)


def test_who_evaluates_a_recipe_sees_how_far_its_pretraining_is(tmp_path, monkeypatch) -> None:
    quick = Pretraining(steps=2, phantoms=4, batch_size=7)
    monkeypatch.setattr(core.pretrain, "Pretraining", SimpleNamespace(of=lambda recipe: quick))
    file = tmp_path / "recipe.toml"
    file.write_text(
        "[model]\noptions = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }\n"
        "phantom_steps = 2\n[views]\nglobal_px = 16\nlocal_px = 8\n"
    )
    told: list[tuple[int, int]] = []
    loaded = open_model(str(file), on_step=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)]
    assert (loaded.name, loaded.kind) == ("start (recipe)", "start")


def test_a_backbone_without_class_token_is_refused_in_plain_words(recipe) -> None:
    options = {**recipe.model.options, "class_token": False, "global_pool": "avg"}
    model = ModelConfig.model_validate({**recipe.model.model_dump(), "options": options})
    with pytest.raises(UserError, match="needs a vision transformer with a class token"):
        pretrain(recipe.model_copy(update={"model": model}), SHORT)
