import json

import numpy as np
from typer.testing import CliRunner

from core.checkpoint import load_arrays
from core.initial import initial_state
from server.__main__ import app


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


def test_another_seed_pretrains_another_backbone(tmp_path, recipe) -> None:
    file = write_toml(tmp_path / "recipe.toml", recipe)
    digests = set()
    for seed in ("0", "1"):
        command = ["pretrain", str(file), str(tmp_path / "start.safetensors"), "--steps", "1"]
        options = ["--phantoms", "2", "--device", "cpu", "--seed", seed]
        result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        digests.add(result.output.split("sha256 ")[1])
    assert len(digests) == 2
