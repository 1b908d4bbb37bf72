import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from core.__main__ import app
from core.backbone import create_backbone
from core.checkpoint import load_arrays
from core.config import ModelConfig, Recipe
from core.errors import UserError
from core.evaluate import (
    auroc,
    check_task,
    extract,
    fit_probe,
    knn_scores,
    labelled_tasks,
    mean_over_modalities,
    probe_scores,
)
from core.export import export_teacher, load_model
from core.initial import initial_state
from core.phantoms import make_phantoms
from core.shards import Shard, write_shard

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE = Recipe.model_validate_json(
    json.dumps({"model": {"options": TINY}, "views": {"global_px": 16, "local_px": 8}})
)


def phantoms(modality: str = "dermatology", patients: int = 40) -> Shard:
    return make_phantoms(modality, patients=patients, images_per_patient=2, px=16, seed=0)


def test_auroc_equals_the_share_of_rightly_ordered_pairs() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    scores = np.array([0.1, 0.6, 0.4, 0.6, 0.9])
    pairs = [(0.4 > 0.1) + (0.4 > 0.6), 1 + 0.5, 2]  # a tie counts a half
    expected = sum(pairs) / 6
    assert auroc(np.stack([1 - scores, scores], 1), labels) == pytest.approx(expected)


def test_auroc_counts_a_class_that_training_never_saw_as_guessing() -> None:
    assert auroc(np.eye(2)[[0, 1, 0]], np.array([0, 1, 2])) == pytest.approx((0.75 + 1 + 0.5) / 3)


def test_knn_votes_by_weighted_cosine() -> None:
    train = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    query = np.array([[0.6, 0.8]], np.float32)  # cosines .6, .96, .8
    weights = np.exp(np.array([0.96, 0.8]) / 0.07)
    scores = knn_scores(train, np.array([0, 1, 0]), query, neighbours=2)
    assert scores[0] == pytest.approx([weights[1] / weights.sum(), weights[0] / weights.sum()])


def test_a_probe_separates_what_a_line_separates_and_nothing_in_noise() -> None:
    draws = np.random.default_rng(0)
    labels = np.arange(300) % 2
    noise = draws.normal(size=(300, 5)).astype(np.float32)
    signal = noise + 3 * labels[:, None]
    for features, low, high in ((signal, 0.97, 1.0), (noise, 0.3, 0.7)):
        part = np.split(features, 3)
        scores = probe_scores(part[0], labels[:100], part[1], labels[100:200], part[2])
        assert low <= auroc(scores, labels[200:]) <= high


def test_features_do_not_depend_on_batching_and_take_three_tokens_of_each_block() -> None:
    backbone = create_backbone(ModelConfig(options=TINY), 16)
    images = phantoms().images[:7]
    whole = extract(backbone, images, "dermatology", 16, last_blocks=2)
    parts = extract(backbone, images, "dermatology", 16, last_blocks=2, batch_size=3)
    assert whole.shape == (7, 2 * 3 * 32)
    assert whole == pytest.approx(parts, abs=1e-5)


def test_an_image_and_its_mirror_image_have_the_same_features() -> None:
    backbone = create_backbone(ModelConfig(options=TINY), 16)
    images = phantoms().images[:7]
    plain, mirrored = (
        extract(backbone, rows, "dermatology", 16, last_blocks=2)
        for rows in (images, images[:, :, ::-1])
    )
    assert mirrored == pytest.approx(plain, abs=1e-5)
    assert extract(backbone, images[:, ::-1], "dermatology", 16, last_blocks=2) != pytest.approx(
        plain, abs=1e-3
    )


def test_each_modality_counts_once_in_the_mean() -> None:
    row = {"accuracy": 0.5, "balanced_accuracy": 0.5}
    rows = {
        "ct/a": {"auroc": 1.0, **row},
        "cxr/a": {"auroc": 0.6, **row},
        "cxr/b": {"auroc": 0.8, **row},
    }
    assert mean_over_modalities(rows)["auroc"] == pytest.approx(0.85)


def test_a_class_with_one_training_image_is_refused_by_name() -> None:
    shard = phantoms()
    train = np.flatnonzero((shard.split == "train") & (shard.label == 0))
    label = shard.label.copy()
    label[train[1:]] = 1
    with pytest.raises(UserError, match=r"class '.*' has 1 training image, at least 2 are needed"):
        check_task(labelled_tasks([dataclasses.replace(shard, label=label)])[0])


def test_a_split_with_one_class_is_refused() -> None:
    shard = phantoms()
    label = np.where(shard.split == "test", 0, shard.label)
    with pytest.raises(UserError, match="split 'test' holds 1 labelled class"):
        check_task(labelled_tasks([dataclasses.replace(shard, label=label)])[0])


def test_an_export_loads_in_plain_timm_and_gives_the_same_features(tmp_path: Path) -> None:
    state = initial_state(RECIPE)
    export_teacher(RECIPE, state, tmp_path / "model.safetensors")
    _, metadata = load_arrays(tmp_path / "model.safetensors")
    plain = timm.create_model(**json.loads(metadata["timm"]))
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ours = load_model(tmp_path / "model.safetensors")
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images), ours.backbone(images), atol=1e-5)


def test_the_command_measures_an_export_and_writes_json(tmp_path: Path) -> None:
    export_teacher(RECIPE, initial_state(RECIPE), tmp_path / "model.safetensors")
    write_shard(tmp_path / "data" / "site", phantoms())
    for command in ("knn", "probe"):
        out = tmp_path / f"{command}.json"
        arguments = [command, str(tmp_path / "model.safetensors"), "--data", str(tmp_path / "data")]
        result = CliRunner().invoke(app, [*arguments, "--json", str(out)])
        assert result.exit_code == 0, result.output
        report = json.loads(out.read_text())
        assert 0 <= report["mean"]["auroc"] <= 1
        assert next(iter(report["tasks"])).startswith("dermatology/")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("none.safetensors", "does not exist"),
        ("torn.safetensors", "not a whole safetensors file"),
        ("empty", "holds no round-"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / model)


def test_a_probe_on_fewer_images_than_features_is_the_direct_solution() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    rows = (rng.normal(size=(60, 200)) + labels[:, None]).astype(np.float32)
    train, val, queries = rows[:30], rows[30:45], rows[45:]
    scale, model = fit_probe(train, labels[:30], val, labels[30:45])
    direct = LogisticRegression(C=model.C, max_iter=5000, tol=1e-6).fit(
        scale.transform(train), labels[:30]
    )
    assert model.coef_.shape == (3, 200)
    assert np.allclose(
        model.predict_proba(scale.transform(queries)),
        direct.predict_proba(scale.transform(queries)),
        atol=5e-3,
    )
