"""`fedmermed-eval run`, `embed` and `export` as an evaluator types them."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from core.__main__ import main
from core.checkpoint import load_arrays, save_arrays
from core.config import load_recipe
from core.evaluation.findings import Findings
from core.evaluation.types import Prediction
from core.export import export_teacher
from core.initial import initial_state
from core.phantoms import make_phantoms
from core.shards import Shard, write_shard

RECIPE = """
[model]
options = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }
[views]
global_px = 32
"""


def phantoms(modality: str) -> Shard:
    return make_phantoms(modality, patients=30, images_per_patient=2, px=32, seed=4)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hospitals, a model of random weights; the working directory."""
    for modality in ("us", "oct"):
        write_shard(tmp_path / "data" / modality, phantoms(modality))
    (tmp_path / "start.toml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "start.toml")
    export_teacher(recipe, initial_state(recipe), tmp_path / "it.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `fedmermed-eval` with arguments; returns what it printed, or its error line."""

    def run(line: str, *, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["fedmermed-eval", *line.split()])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == (2 if fails else 0), printed.err
        if fails:
            assert printed.err.count("\n") == 1
            assert printed.err.startswith("error: ")
        return printed.err if fails else printed.out

    return run


QUICK = "--draws 100 --seeds 2 --fractions 30,100"


def test_one_command_makes_the_whole_report(home: Path, command) -> None:
    rows = [
        {"shard": "phantoms-us", "index": str(index), "sex": "FM"[index % 2]}
        for index in np.flatnonzero(phantoms("us").split == "test")
    ]
    with (home / "sex.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["shard", "index", "sex"])
        writer.writeheader()
        writer.writerows(rows)

    printed = command(f"run it.safetensors --data data --out report {QUICK} --subgroups sex.csv")
    assert "it reaches a mean AUROC of" in printed
    assert "report/report.html" in printed.replace("\n", "")
    results = json.loads((home / "report" / "results.json").read_text())
    models = [model["name"] for model in results["models"]]
    assert models == ["it", "random init", "pixels", "HOG, thumbnail, colours"]
    assert {row["task"].split("/")[0] for row in results["results"]} == {"us", "oct"}
    for row in results["results"]:
        auroc = row["metrics"]["auroc"]
        assert 0 <= auroc["value"] <= 1
        assert (auroc["low"] is None) == (row["fraction"] < 100)
        assert row["metrics"]["ece"]["low"] is None  # its interval would not hold the truth
    for mean in (r for r in results["means"] if r["metric"] == "auroc" and r["fraction"] == 100):
        which = (mean["model"], mean["method"], 100)
        values = [
            row["metrics"]["auroc"]["value"]
            for row in results["results"]
            if (row["model"], row["method"], row["fraction"]) == which
        ]
        assert mean["value"] == pytest.approx(np.mean(values))
    assert {row["b"] for row in results["comparisons"]} == set(models[1:])
    for row in results["comparisons"]:
        assert row["p"] <= row["p_holm"] <= 1
        assert row["low"] <= row["difference"] <= row["high"]
    assert {(row["column"], row["group"]) for row in results["subgroups"]} == {
        ("sex", "F"),
        ("sex", "M"),
    }
    assert "On clean test images it has" in results["stability_conclusion"]
    page = (home / "report" / "report.html").read_text()
    for heading in ("ROC curves", "Calibration", "Stability", "Nearest neighbours", "Attention"):
        assert f">{heading}<" in page, heading
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "Not for clinical use" in (home / "report" / "model_card.md").read_text()


def test_leaks_are_refused_unless_they_are_to_be_reported(home: Path, command) -> None:
    shard = phantoms("us")
    images = np.array(shard.images)
    copy, source = (np.flatnonzero(shard.split == split)[0] for split in ("test", "train"))
    images[copy] = images[source]
    write_shard(home / "planted" / "us", dataclasses.replace(shard, images=images))
    line = f"run it.safetensors --data planted --out report {QUICK} --no-stability --no-baselines"
    assert "identical image(s) of 'test' are also in 'train'" in command(line, fails=True)
    assert not (home / "report").exists()
    command(f"{line} --report-leaks")
    results = json.loads((home / "report" / "results.json").read_text())
    leak = results["leakage"][0]
    assert (leak["kind"], leak["count"]) == ("identical image", 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run nothing.safetensors --data data", "nothing.safetensors"),
        ("run it.safetensors --data nowhere", "does not exist; check the path"),
        (
            "run it.safetensors --data data --fractions 1,ten",
            "expected percentages that end in 100",
        ),
        ("run it.safetensors --data medmnist-29", "MedMNIST has sizes 28, 64, 128, 224"),
        ("run it.safetensors it.safetensors --data data", "two models have one name"),
        (
            "run it.safetensors --data data --subgroups start.toml",
            "expected a header shard,index",
        ),
        ("run vit_tiny_patch16_224:none.safetensors --data data", "none.safetensors"),
    ],
)
def test_wrong_input_ends_in_one_line(home: Path, command, line: str, expected: str) -> None:
    assert expected in command(f"{line} --out report", fails=True)
    assert not (home / "report").exists()


def test_a_model_with_nan_weights(home: Path, command) -> None:
    arrays, metadata = load_arrays(home / "it.safetensors")
    arrays["norm.weight"] = np.full_like(arrays["norm.weight"], np.nan)
    save_arrays(home / "nan.safetensors", arrays, metadata)
    error = command("run nan.safetensors --data data --out report", fails=True)
    assert "features of" in error
    assert "NaN or infinite; check the model's weights" in error
    assert not (home / "report").exists()


def test_weights_of_another_architecture(home: Path, command) -> None:
    line = "run vit_small_patch16_224:it.safetensors --data data --out report"
    assert "vit_small_patch16_224" in command(line, fails=True)
    assert not (home / "report").exists()


def test_a_test_split_of_one_class(home: Path, command) -> None:
    shard = phantoms("oct")
    label = np.where(shard.split == "test", 1, shard.label)
    write_shard(home / "data" / "oct", dataclasses.replace(shard, label=label))
    error = command("run it.safetensors --data data --out report", fails=True)
    assert "split 'test' holds 1 labelled class(es), at least 2 are needed" in error


def test_labels_out_of_range(home: Path, command) -> None:
    arrays = {}
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = np.zeros((count, 32, 32), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    arrays["test_labels"][0] = 7
    (home / "npz").mkdir()
    np.savez(home / "npz" / "cxr_a.npz", class_names=np.array(["no", "yes"]), **arrays)
    error = command("run it.safetensors --data npz --out report", fails=True)
    assert "cxr_a" in error
    assert "7" in error


def test_embed_and_export_write_what_others_read(home: Path, command) -> None:
    assert "120 embeddings" in command("embed it.safetensors rows.npz --data data")
    with np.load(home / "rows.npz") as rows:
        assert rows["embedding"].shape == (120, 96)
        assert set(rows["modality"]) == {"us", "oct"}
    assert "features differ" in command("export it.safetensors hub --format huggingface")
    assert (home / "hub" / "model.safetensors").exists()


def test_every_model_meets_the_same_patients_and_a_better_one_is_told_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    groups = np.arange(120) // 2
    findings = Findings(400, {})
    for model, strength in (("good", 2.0), ("poor", 0.1)):
        odds = strength * (2 * labels - 1) + rng.normal(size=120)
        score = 1 / (1 + np.exp(-odds))
        findings.add(Prediction(
            model, "cxr/a", "probe", 100, 0, 50, np.stack([1 - score, score], 1), labels, groups,
            ("no", "yes"),
        ))  # fmt: skip
    (row,) = findings.comparisons(["good", "poor"])
    assert row["test"] == "paired bootstrap"  # two images a patient
    assert row["low"] > 0
    assert row["p"] < 0.05
