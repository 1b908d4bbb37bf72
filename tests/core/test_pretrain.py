import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import core.pretrain
import core.pretrain_state
from core.config import ModelConfig
from core.errors import UserError
from core.evaluation.models import open_model
from core.initial import initial_state
from core.pretrain import Pretraining, pretrain
from core.train import network_arrays

SHORT = Pretraining(steps=30, phantoms=12, batch_size=14, learning_rate=3e-3)


def test_a_backbone_learns_to_describe_phantoms_better_than_what_is_usual(recipe) -> None:
    losses: list[float] = []
    pretrain(recipe, SHORT, on_step=lambda done, steps, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert len(losses) == SHORT.steps


def test_the_same_seed_gives_the_same_backbone_and_another_seed_another(recipe) -> None:
    quick = Pretraining(steps=2, phantoms=4, batch_size=7)
    first, again = (pretrain(recipe, quick).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = pretrain(recipe.model_copy(update={"seed": 9}), quick).state_dict()
    assert not torch.equal(first["backbone.patch_embed.proj.weight"],
                           other["backbone.patch_embed.proj.weight"])  # fmt: skip


class KilledError(Exception):
    pass


def noting(done, last=None):
    def on_step(step, steps, loss):
        done.append(step)
        if step == last:
            raise KilledError

    return on_step


def test_one_that_is_killed_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch) -> None:
    settings, keep = Pretraining(steps=6, phantoms=4, batch_size=9), tmp_path / "kept"
    whole = pretrain(recipe, settings).state_dict()
    monkeypatch.setattr(core.pretrain_state, "KEPT_SECONDS", 0)
    done: list[int] = []
    for last in (2, 5):
        with pytest.raises(KilledError):
            pretrain(recipe, settings, keep=keep, on_step=noting(done, last))
    for _ in range(2):  # the second time killed before the result was written
        resumed = pretrain(recipe, settings, keep=keep, on_step=noting(done)).state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert done == [1, 2, 3, 4, 5, 6]


def test_what_was_kept_of_another_pretraining_counts_for_nothing(
    recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(core.pretrain_state, "KEPT_SECONDS", 0)
    settings, keep = Pretraining(steps=3, phantoms=4, batch_size=7), tmp_path / "kept"
    anew = pretrain(recipe, settings).state_dict()
    for other, how in (
        (recipe.model_copy(update={"seed": 9}), settings),
        (recipe, dataclasses.replace(settings, steps=4)),
    ):
        with pytest.raises(KilledError):
            pretrain(other, how, keep=keep, on_step=noting([], last=2))
        done: list[int] = []
        found = pretrain(recipe, settings, keep=keep, on_step=noting(done)).state_dict()
        assert done == [1, 2, 3]
        assert all(torch.equal(anew[name], found[name]) for name in anew)


def test_what_a_version_with_other_weights_has_kept_counts_for_nothing(
    recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(core.pretrain_state, "KEPT_SECONDS", 0)
    settings, keep = Pretraining(steps=3, phantoms=4, batch_size=7), tmp_path / "kept"
    own_start = core.pretrain._start

    def with_one_weight_more(asked):
        network = own_start(asked)
        network.register_parameter("of_another_version", torch.nn.Parameter(torch.zeros(2)))
        return network

    monkeypatch.setattr(core.pretrain, "_start", with_one_weight_more)
    with pytest.raises(KilledError):
        pretrain(recipe, settings, keep=keep, on_step=noting([], last=2))
    monkeypatch.setattr(core.pretrain, "_start", own_start)
    done: list[int] = []
    pretrain(recipe, settings, keep=keep, on_step=noting(done))
    assert done == [1, 2, 3]


def test_between_minutes_nothing_is_written(recipe, tmp_path) -> None:
    keep = tmp_path / "kept"
    with pytest.raises(KilledError):
        pretrain(recipe, Pretraining(steps=4, phantoms=4), keep=keep, on_step=noting([], 3))
    assert not keep.exists()


def test_a_damaged_file_is_told_of(recipe, tmp_path) -> None:
    (keep := tmp_path / "kept").write_bytes(b"half")
    with pytest.raises(UserError, match="kept' is not a whole safetensors file"):
        pretrain(recipe, Pretraining(steps=4, phantoms=4), keep=keep)


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
    told: list[tuple[int, int]] = []
    state = initial_state(begun, lambda done, steps, loss: told.append((done, steps)))
    assert told == [(1, 2), (2, 2)]
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
