"""`fedmermed-server` as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import read_json, sha256_file
from core.phantoms import make_phantoms
from server.history import read_history

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "tiny"
[model]
options = { embed_dim = 32, depth = 1, num_heads = 2, patch_size = 8 }
head_hidden = 32
embedding_dim = 16
[views]
global_px = 32
local_px = 16
local_views = 1
[memory]
entries_per_modality = 32
[optim]
batch_size = 8
precision = "fp32"
[federation]
rounds = 2
local_steps = 2
prototypes_per_modality = 3
"""


def server(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "server", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe of two rounds."""
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE)
    return file


def write_npz(directory):
    """Two hospitals as npz files with MedMNIST keys."""
    directory.mkdir()
    for modality in ("oct", "cfp"):
        shard = make_phantoms(modality, patients=21, images_per_patient=2, px=32, seed=0)
        keys = {}
        for split in ("train", "val", "test"):
            inside = shard.split == split
            keys[f"{split}_images"] = shard.images[inside]
            keys[f"{split}_labels"] = shard.label[inside][:, None]
        np.savez(directory / f"{modality}_phantom.npz", **keys)


def test_phantoms_make_a_first_run_with_all_its_results(tmp_path, recipe_file):
    result = server("simulate", recipe_file, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "runs" / "tiny"
    summary = read_json(out / "summary.json")
    assert summary["rounds"] == 2
    assert summary["engine"] == "inprocess"
    assert summary["seed"] == 0
    assert len(summary["sites"]) == 7
    assert set(summary["metrics"]) == {
        "ct", "cxr", "us", "pathology", "cfp", "oct", "dermatology",
    }  # fmt: skip
    for row in summary["metrics"].values():
        assert {"images", "loss_first", "loss_last", "knn_auroc_first", "knn_auroc_last"} <= set(
            row
        )
    assert summary["outliers"] == []
    assert summary["bytes_up"] > 0
    assert summary["bytes_down"] > 0
    assert {"exchange", "aggregate", "sites_train"} <= set(summary["seconds"])
    model = summary["model"]
    assert sha256_file(tmp_path / model["path"]) == model["sha256"]
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    for words in ("round 1 of 2: 7 of 7 sites admitted", "chest X-ray", "model.safetensors"):
        assert words in result.stdout

    before = (out / "summary.json").read_bytes()
    again = server("simulate", recipe_file, cwd=tmp_path)
    assert again.returncode == 0
    assert "chest X-ray" in again.stdout
    assert "sites train" not in again.stdout
    assert (out / "summary.json").read_bytes() == before


SITE_PRIVACY = """teacher = "rebuild"
robust = "none"
quarantine_after = 0
[privacy]
mode = "site"
sites = {sites}
noise_multiplier = 4.0
"""


def test_a_study_with_site_privacy_tells_its_cost_before_it_begins(tmp_path, recipe_file):
    write_npz(tmp_path / "data")
    recipe_file.write_text(RECIPE + SITE_PRIVACY.format(sites=2))
    result = server("simulate", recipe_file, "--data", "data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    before, _, after = result.stdout.partition("sites train")
    assert "has to be trusted" in before
    assert "it drowns what the sites learn" in before
    assert "round 2 of 2" in after
    spent = read_history(tmp_path / "runs" / "tiny")[-1]["metrics"]["epsilon"]
    assert f"epsilon {spent:.3g} at delta 1e-05 after 2 rounds" in before
    assert f"epsilon  model {spent:.3f}, at delta 1e-05" in after


def test_more_sites_than_site_privacy_divides_by_are_refused_at_once(tmp_path, recipe_file):
    recipe_file.write_text(RECIPE + SITE_PRIVACY.format(sites=6))
    result = server("simulate", recipe_file, cwd=tmp_path)
    assert result.returncode == 2
    assert "7 sites take part, but noise and divisor are made for privacy.sites = 6" in (
        result.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_npz_files_a_seed_and_an_export(tmp_path, recipe_file):
    write_npz(tmp_path / "npz")
    arguments = ("simulate", recipe_file, "--data", tmp_path / "npz", "--out", tmp_path / "run")
    result = server(*arguments, "--seed", 4, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "run" / "recipe.json")["seed"] == 4
    assert set(read_json(tmp_path / "run" / "summary.json")["metrics"]) == {"oct", "cfp"}

    other_seed = server(*arguments, cwd=tmp_path)
    assert other_seed.returncode == 2
    assert "'seed' is 4 there and 0 here; give another directory" in other_seed.stderr

    exported = server("export", tmp_path / "run", tmp_path / "model.safetensors", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    digest = read_json(tmp_path / "run" / "summary.json")["model"]["sha256"]
    assert f"teacher after round 2, sha256 {digest}" in exported.stdout
    assert sha256_file(tmp_path / "model.safetensors") == digest

    other = tmp_path / "other"
    write_npz(other)
    changed = server("simulate", recipe_file, "--data", other, "--out", tmp_path / "run",
                     "--seed", 4, cwd=tmp_path)  # fmt: skip
    assert changed.returncode == 2
    assert "began with data" in changed.stderr


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (("rounds", "roundz"), (), "unknown key 'federation.roundz'; check its spelling"),
        (
            ("rounds = 2", "rounds = '2'"),
            (),
            "'federation.rounds': input should be a valid integer",
        ),
        (
            ("rounds = 2", "rounds = 2\nmin_sites = 9"),
            (),
            "needs 9 sites (federation.min_sites), but",
        ),
        ((), ("--data", "nowhere"), "data directory 'nowhere' does not exist; check the path"),
        ((), ("--data", "."), "'.' holds neither npz files nor shards"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, recipe_file, change, arguments, words):
    if change:
        recipe_file.write_text(RECIPE.replace(*change))
    result = server("simulate", recipe_file, *arguments, "--out", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missed_quorum_ends_with_a_status_that_is_not_zero(tmp_path, recipe_file):
    recipe_file.write_text(RECIPE.replace("rounds = 2", "rounds = 2\nwait_for_sites_seconds = 0.1"))
    write_npz(tmp_path / "npz")
    arguments = ("simulate", recipe_file, "--data", tmp_path / "npz", "--out", tmp_path / "run")
    site = tmp_path / "run" / "sites" / "oct" / "site.toml"
    site.parent.mkdir(parents=True)
    shards = json.dumps(str(tmp_path / "run" / "data" / "oct"))
    site.write_text(f"name = 'oct'\nshards = [{shards}]\n[policy]\nmin_images = 1000\n")
    result = server(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: round 1: 1 of 2 sites admitted, 2 needed (site 'oct' error: ")
    assert "fewer than the 1000 its policy asks for" in last
    assert read_history(tmp_path / "run") == []
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_directory_without_a_run_cannot_be_exported(tmp_path):
    result = server("export", tmp_path, tmp_path / "model.safetensors", cwd=tmp_path)
    assert result.returncode == 2
    assert "holds no finished round; give the directory of a run" in result.stderr
