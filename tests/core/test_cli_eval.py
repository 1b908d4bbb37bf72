"""Bad input at `fedmermed-eval`, as its user meets it."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.__main__ import main
from core.phantoms import make_phantoms
from core.shards import write_shard

RECIPE = """
[model]
options = { patch_size = 8, embed_dim = 32, depth = 1, num_heads = 2 }
[views]
global_px = 16
"""


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command on recipe and data; it must fail with one line, which comes back."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    report = tmp_path / "report.json"

    def run(*arguments: str, model: str = "recipe.toml") -> str:
        line = ["probe", str(tmp_path / model), "--data", str(tmp_path / "data")]
        command = ["fedmermed-eval", *line, "--json", str(report), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not report.exists()
        return error

    return run


def phantoms():
    return make_phantoms("us", patients=21, images_per_patient=2, px=16, seed=0)


def test_a_missing_data_directory(fail) -> None:
    assert "does not exist; check the path" in fail()


def test_an_empty_shard(fail, tmp_path: Path) -> None:
    site = write_shard(tmp_path / "data" / "site", phantoms())
    manifest = json.loads((site / "manifest.json").read_text())
    (site / "manifest.json").write_text(json.dumps(manifest | {"count": 0}))
    assert "is empty (0 images); prepare it again" in fail()


def test_damaged_images(fail, tmp_path: Path) -> None:
    site = write_shard(tmp_path / "data" / "site", phantoms())
    (site / "images.npy").write_bytes((site / "images.npy").read_bytes()[:-100])
    assert "is damaged" in fail()


def test_a_class_with_one_training_image(fail, tmp_path: Path) -> None:
    shard = phantoms()
    rare = np.flatnonzero((shard.split == "train") & (shard.label == 2))[1:]
    label = shard.label.copy()
    label[rare] = 1
    write_shard(tmp_path / "data" / "site", dataclasses.replace(shard, label=label))
    assert "class 'malignant' has 1 training image, at least 2 are needed" in fail()


def test_no_label_at_all(fail, tmp_path: Path) -> None:
    shard = phantoms()
    write_shard(
        tmp_path / "data" / "site", dataclasses.replace(shard, label=np.full(len(shard.label), -1))
    )
    assert "holds no labelled image" in fail()


def test_a_recipe_with_an_unknown_key(fail, tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "site", phantoms())
    (tmp_path / "wrong.toml").write_text("seeds = 3")
    assert "unknown key 'seeds'" in fail(model="wrong.toml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none(fail, tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "site", phantoms())
    assert "torch sees 0 usable GPU(s) here" in fail("--device", "cuda")
