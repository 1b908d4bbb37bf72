from dataclasses import replace

import numpy as np
import pytest
import torch

import core.pretrain
from core.config import ModelConfig
from core.describe import FIGURES, describe
from core.errors import UserError
from core.initial import initial_state
from core.pretrain import GRID_CELLS, PATCH_CELLS, Lesson, Pretraining, pretrain
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


def test_a_recipe_may_have_its_study_begin_so_and_says_how_far_it_is(recipe, monkeypatch) -> None:
    quick = Pretraining(steps=2, phantoms=4, batch_size=7)
    monkeypatch.setattr(core.pretrain, "Pretraining", lambda steps: replace(quick, steps=steps))
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


def test_an_answer_that_is_right_costs_nothing_and_the_usual_one_costs_one_a_part() -> None:
    class Backbone(torch.nn.Module):
        num_features, num_prefix_tokens, has_class_token = 8, 1, True
        pos_embed = torch.zeros(1, 1 + 16, 8)

    lesson = Lesson(Backbone(), seed=0).requires_grad_(False)
    pictures = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    usual = lesson.usual(pictures.byte())
    pixels = pictures.byte().float() / 255
    nothing = torch.zeros(40, 17, 8)  # biases are zero: the answer is what is usual
    assert float(lesson(nothing, pixels, usual)) == pytest.approx(2, abs=0.1)

    one = pixels[:1]
    told = torch.zeros(1, 17, 8)
    lesson.grid.bias.copy_(((describe(one, GRID_CELLS) - usual[0]) / usual[1]).flatten())
    patches_only = float(lesson(told, one, usual))
    fine = (describe(one, 4 * PATCH_CELLS) - usual[2]) / usual[3]
    assert patches_only == pytest.approx(float(fine.square().mean()), rel=1e-5)
    corner = fine[0, :, :PATCH_CELLS, :PATCH_CELLS].flatten()
    lesson.patch.bias.copy_(corner)  # right for the first patch alone
    shifted = fine - corner.view(FIGURES, PATCH_CELLS, PATCH_CELLS).tile(1, 4, 4)
    assert float(lesson(told, one, usual)) == pytest.approx(
        float(shifted.square().mean()), rel=1e-5
    )


def test_a_backbone_without_class_token_is_refused_in_plain_words(recipe) -> None:
    options = {**recipe.model.options, "class_token": False, "global_pool": "avg"}
    model = ModelConfig.model_validate({**recipe.model.model_dump(), "options": options})
    with pytest.raises(UserError, match="needs a vision transformer with a class token"):
        pretrain(recipe.model_copy(update={"model": model}), SHORT)
