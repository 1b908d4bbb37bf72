import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import core.pretrain_state
from core.checkpoint import load_arrays
from core.initial import initial_state
from server import study
from server.__main__ import app
from server.history import open_run
from server.study import PRETRAINING, open_state


def write_toml(path, recipe):
    """The parts of a tiny recipe that pretraining reads, as a file."""
    options = ", ".join(f"{k} = {json.dumps(v)}" for k, v in recipe.model.options.items())
    path.write_text(
        f"seed = {recipe.seed}\n[model]\noptions = {{ {options} }}\n"
        f"[views]\nglobal_px = {recipe.views.global_px}\nlocal_px = {recipe.views.local_px}\n"
    )
    return path


def test_a_study_starts_from_the_file_that_pretrain_writes(tmp_path, recipe) -> None:
    file, out = write_toml(tmp_path / "recipe.toml", recipe), tmp_path / "start.safetensors"
    command = ["pretrain", str(file), str(out), "--steps", "2", "--phantoms", "3"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "backbone pretrained on phantoms, sha256 " in result.output
    weights, metadata = load_arrays(out)
    assert json.loads(metadata["timm"])["img_size"] == recipe.views.global_px
    model = recipe.model.model_copy(update={"init_file": str(out)})
    state = initial_state(recipe.model_copy(update={"model": model}))
    drawn = initial_state(recipe).student
    for name, array in weights.items():
        assert np.array_equal(state.student[f"backbone.{name}"], array)
    changed = [n for n in weights if not np.array_equal(drawn[f"backbone.{n}"], weights[n])]
    assert "patch_embed.proj.weight" in changed


def test_a_study_that_is_killed_while_it_pretrains_goes_on_there(
    tmp_path, make_recipe, monkeypatch
):
    monkeypatch.setattr(core.pretrain_state, "KEPT_SECONDS", 0)
    recipe = make_recipe()
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"phantom_steps": 3, "phantoms": 4})}
    )
    done: list[int] = []

    def until(last):
        def on_steps(number, steps):
            done.append(number)
            if number == last:
                raise KeyboardInterrupt

        return on_steps

    run = open_run(tmp_path, recipe)
    with pytest.raises(KeyboardInterrupt):
        open_state(run, recipe, until(2))
    assert (tmp_path / PRETRAINING).exists()
    checkpoint = open_state(run, recipe, until(None))
    assert done == [0, 1, 2, 0, 3]
    whole = study.initial_state(recipe).to_arrays()
    found = checkpoint.state.to_arrays()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert not (tmp_path / PRETRAINING).exists()  # round 0 has it


def test_pretrain_that_is_killed_goes_on_and_leaves_nothing_beside_its_file(
    tmp_path, recipe, monkeypatch
):
    monkeypatch.setattr(core.pretrain_state, "KEPT_SECONDS", 0)
    file, out = write_toml(tmp_path / "recipe.toml", recipe), tmp_path / "start.safetensors"
    command = ["pretrain", str(file), str(out), "--steps", "3", "--phantoms", "3"]
    step, steps = torch.optim.AdamW.step, []

    def killed(optimizer):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)
    assert CliRunner().invoke(app, [*command, "--device", "cpu"]).exit_code != 0
    assert not out.exists()
    result = CliRunner().invoke(app, [*command, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(steps) == 4  # the third one again, and no other
    assert {path.name for path in tmp_path.iterdir()} == {file.name, out.name}


def test_another_seed_pretrains_another_backbone(tmp_path, recipe) -> None:
    file = write_toml(tmp_path / "recipe.toml", recipe)
    digests = set()
    for seed in ("0", "1"):
        command = ["pretrain", str(file), str(tmp_path / "start.safetensors"), "--steps", "1"]
        options = ["--phantoms", "2", "--device", "cpu", "--seed", seed]
        result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        digests.add(result.output.split("sha256 ")[1])
    assert len(digests) == 2
