import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from core.backbone import BACKBONE
from core.checkpoint import save_arrays, write_json
from core.config import Recipe
from core.evaluate import Features, Task, labelled_tasks
from core.evaluation.intervals import draw_weights, resample
from core.evaluation.models import open_model
from core.evaluation.protocol import FeatureSource, embed_task
from core.evaluation.stability import (
    ABOVE,
    CLEAN,
    MEAN,
    PERTURBATIONS,
    Row,
    bootstrap_rows,
    conclusion,
    left_out_rows,
    perturb,
    perturbation_rows,
    run_variants,
    seed_rows,
    variant_rows,
    with_means,
)
from core.evaluation.types import Prediction
from core.initial import initial_state
from core.phantoms import make_phantoms

FACTORS = list(dict.fromkeys(factor for factor, _ in PERTURBATIONS))


def smooth_images(count: int = 3, px: int = 32) -> np.ndarray:
    """Grey images of a bright disc on a ramp."""
    y, x = np.mgrid[:px, :px] / px
    disc = ((y - 0.4) ** 2 + (x - 0.6) ** 2 < 0.04) * 0.3
    return np.repeat(np.uint8(255 * (0.3 + 0.3 * x + disc))[None, ..., None], count, 0)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_second_level_changes_an_image_more_than_the_first(factor: str) -> None:
    images = smooth_images().astype(float)
    levels = [level for f, level in PERTURBATIONS if f == factor]
    assert len(levels) == 2
    first, second = (
        np.abs(perturb(smooth_images(), factor, level, seed=0) - images).mean() for level in levels
    )
    assert 0.5 < first < second < 60


def test_perturbations_do_what_they_are_called() -> None:
    images = smooth_images(40).astype(float)
    noise = perturb(smooth_images(40), "noise", "sd .05", seed=0) - images
    assert noise.std() / 255 == pytest.approx(0.05, rel=0.05)
    assert abs(noise.mean()) < 0.5
    darker = perturb(smooth_images(), "intensity", "gamma 1.5", seed=0)
    assert darker[0] == pytest.approx((images[0] / 255) ** 1.5 * 255, abs=0.51)
    coarse = perturb(smooth_images(), "resolution", "half", seed=0)
    assert coarse[0, 8:10, 8:10].mean() == pytest.approx(images[0, 8:10, 8:10].mean(), abs=1.5)
    blurred = perturb(smooth_images(), "blur", "sigma 3 % of the width", seed=0)
    assert blurred.mean() == pytest.approx(images.mean(), abs=0.5)
    steps = [np.abs(np.diff(part[0].astype(float), axis=1)).max() for part in (blurred, images)]
    assert steps[0] < 0.5 * steps[1]
    turned = perturb(smooth_images(), "rotation", "30 degrees", seed=0)
    assert turned[0, 0, 0, 0] == 0
    assert turned[0, 16, 16, 0] == pytest.approx(images[0, 16, 16, 0], abs=6)


def test_the_same_seed_gives_the_same_noise_and_colour_images_keep_their_shape() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    for factor, level in PERTURBATIONS:
        first, again = (perturb(images, factor, level, seed=4) for _ in range(2))
        assert np.array_equal(first, again)
        assert first.shape == images.shape
    assert not np.array_equal(
        perturb(images, "noise", "sd .05", seed=4), perturb(images, "noise", "sd .05", seed=5)
    )


def brightness_task() -> Task:
    """Images of which class 1 is brighter by .1 in one row of pixels."""
    shard = make_phantoms("us", patients=63, images_per_patient=2, px=16, seed=0)
    label = shard.label % 2
    images = np.full((len(label), 16, 16, 1), 128, np.uint8)
    images[label == 1, 0] += 26
    changed = dataclasses.replace(shard, images=images, label=label, classes={"us": ("a", "b")})
    (task,) = labelled_tasks([changed])
    return task


def first_pixels(task: Task, indices: np.ndarray) -> Features:
    """Cosine and sine of the brightness of a few pixels, so that the vote by angle sees it."""
    value = task.shard.images[indices, 0, :2, 0].astype(np.float32).mean(1) / 255
    return np.stack([np.cos(3 * value), np.sin(3 * value)], 1)


def test_a_source_that_looks_at_a_few_pixels_falls_under_noise_and_darkness() -> None:
    task = brightness_task()
    source = FeatureSource("few pixels", first_pixels)
    rows = perturbation_rows(source, task, embed_task(source, task))
    found = {(row.factor, row.level): row for row in rows}
    assert len(rows) == 1 + len(PERTURBATIONS)
    assert found[CLEAN, ""].value == 1
    assert found["noise", "sd .10"].change < -0.02
    assert found["noise", "sd .10"].change <= found["noise", "sd .05"].change
    assert found["rotation", "30 degrees"].value == 0.5  # the corner is black in both classes
    for row in rows:
        assert row.change == pytest.approx(row.value - 1)
        assert (row.task, row.model, row.method) == (
            "us/phantoms-us", "few pixels", "knn20",
        )  # fmt: skip


def test_training_images_are_not_perturbed_and_the_test_images_are_bounded() -> None:
    task = brightness_task()
    asked: list[int] = []

    def extract(chosen: Task, indices: np.ndarray) -> Features:
        asked.append(len(indices))
        return first_pixels(chosen, indices)

    source = FeatureSource("counting", extract)
    data = embed_task(source, task)
    asked.clear()
    perturbation_rows(source, task, data, max_images=10)
    assert asked == [10] * len(PERTURBATIONS)


def prediction(model: str, task: str, scores: np.ndarray, **changes: object) -> Prediction:
    labels = np.arange(len(scores)) % 2
    found = Prediction(
        model, task, "knn20", 100, 0, 50, np.stack([1 - scores, scores], 1), labels,
        np.arange(len(scores)), ("a", "b"),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_subsets_of_labels_give_the_distance_from_their_mean() -> None:
    labels = np.arange(8) % 2
    right, half = labels * 0.5 + 0.2, np.array([0.1, 0.2, 0.3, 0.15, 0.1, 0.2, 0.3, 0.15])
    rows = seed_rows([
        prediction("m", "us/a", right, fraction=10.0, seed=0),
        prediction("m", "us/a", half, fraction=10.0, seed=1),
        prediction("m", "us/a", right),  # all labels: no subset
    ])  # fmt: skip
    # Positives score .2 or .15, negatives .1 or .3: half of the pairs are in order.
    assert [(row.level, row.value) for row in rows] == [
        ("10 %, subset 0", 1.0), ("10 %, subset 1", 0.5),
    ]  # fmt: skip
    assert [row.change for row in rows] == pytest.approx([0.25, -0.25])


def test_draws_of_patients_tell_a_clear_lead_from_none() -> None:
    draws = np.random.default_rng(0)
    labels = np.arange(200) % 2
    noise = draws.normal(size=200)
    scores = {
        "good": labels + 0.3 * noise,
        "poor": labels + 3 * noise,
        "same": labels + 0.3 * noise,
    }
    measured = {}
    weights = draw_weights(np.arange(200), 200, np.random.default_rng(1))
    for name, values in scores.items():
        squashed = 1 / (1 + np.exp(-values))
        found = resample(prediction(name, "us/a", squashed), weights)
        measured[name] = {"us/a": found["auroc"]}
    rows = bootstrap_rows(measured, "good", "knn20")
    shares = {row.metric.removeprefix(ABOVE): row.value for row in rows if row.metric != "auroc"}
    assert shares == {"poor": 1.0, "same": 0.0}
    assert [row.model for row in rows if row.metric == "auroc"] == ["good", "poor", "same"]
    assert all(0 < row.change < 0.1 for row in rows if row.metric == "auroc" and row.value < 0.999)


def test_leaving_a_site_out_gives_the_mean_over_the_other_modalities() -> None:
    rows = left_out_rows({"m": {"ct/a": 1.0, "us/a": 0.6, "us/b": 0.8}}, "knn20")
    # All: (1 + .7) / 2 = .85.
    assert [(row.level, row.value) for row in rows] == [
        ("without ct/a", pytest.approx(0.7)),
        ("without us/a", pytest.approx(0.9)),
        ("without us/b", pytest.approx(0.8)),
    ]
    assert [row.change for row in rows] == pytest.approx([-0.15, 0.05, -0.05])
    assert left_out_rows({"m": {"ct/a": 1.0}}, "knn20") == []


def test_each_modality_counts_once_in_the_mean_of_a_condition() -> None:
    values = {"ct/a": 1.0, "us/a": 0.6, "us/b": 0.8}
    rows = [
        Row("noise", "sd .05", "m", "knn20", "auroc", value, -0.1, task)
        for task, value in values.items()
    ]
    *given, mean = with_means(rows)
    assert given == rows
    assert (mean.task, mean.value, mean.change) == (
        MEAN, pytest.approx(0.85), pytest.approx(-0.1),
    )  # fmt: skip


def row(factor: str, level: str, model: str, value: float, change: float = 0.0) -> Row:
    return Row(factor, level, model, "knn20", "auroc", value, change, MEAN)


def test_the_conclusion_names_what_survives_and_what_does_not_with_figures() -> None:
    rows = [
        *(row(CLEAN, "", *pair) for pair in (("m", 0.8), ("random", 0.7), ("HOG", 0.9))),
        row("noise", "sd .05", "m", 0.79), row("noise", "sd .05", "random", 0.69),
        row("noise", "sd .10", "m", 0.75), row("noise", "sd .10", "random", 0.74),
        row("rotation", "10 degrees", "m", 0.70), row("rotation", "10 degrees", "random", 0.69),
        row("rotation", "20 degrees", "m", 0.66), row("rotation", "20 degrees", "random", 0.66),
        row("rotation", "30 degrees", "m", 0.65), row("rotation", "30 degrees", "random", 0.66),
        row("aggregation", "student", "m", 0.6, -0.2),
        dataclasses.replace(row("patients", "1,000 draws", "m", 0.9), metric=ABOVE + "random"),
        dataclasses.replace(row("blur", "x", "m", 0.1), method="probe"),
    ]  # fmt: skip
    assert conclusion(rows, "m", ["random", "HOG"], "knn20") == (
        "On clean test images m has a mean AUROC of 0.800 (knn20), above random (0.700), not above "
        "HOG (0.900). The lead over random survives noise and does not survive rotation (30 "
        "degrees: 0.650 against 0.660), aggregation (student: 0.600 against 0.700), patients "
        "(above in 90.0% of 1,000 draws)."
    )


def test_a_model_that_leads_nowhere_has_no_lead_to_survive() -> None:
    rows = [row(CLEAN, "", "m", 0.6), row(CLEAN, "", "random", 0.7), row("noise", "x", "m", 0.9)]
    assert conclusion(rows, "m", ["random"], "knn20") == (
        "On clean test images m has a mean AUROC of 0.600 (knn20), not above random (0.700)."
    )


def test_variants_of_a_run_are_its_last_student_and_the_teacher_halfway(
    tmp_path: Path, recipe: Recipe
) -> None:
    write_json(tmp_path / "recipe.json", recipe.model_dump(mode="json"))
    state = initial_state(recipe)
    for number in range(5):
        student = {name: a + np.float32(0.001) for name, a in state.student.items()}
        teacher = {name: a + np.float32(number) for name, a in state.teacher.items()}
        arrays = dataclasses.replace(state, student=student, teacher=teacher).to_arrays()
        save_arrays(tmp_path / f"round-{number:04d}.safetensors", arrays, {})
    loaded = open_model(str(tmp_path))
    variants = run_variants(tmp_path, loaded)
    assert list(variants) == ["student of the last round", "teacher of round-0002"]
    key = "blocks.0.mlp.fc1.weight"
    original = torch.from_numpy(state.teacher[BACKBONE + key])
    weights = [model.model.backbone.get_parameter(key) for model in (loaded, *variants.values())]
    for found, added in zip(weights, (4, 0.001, 2), strict=True):
        assert torch.allclose(found, original + added)
    rows = variant_rows("aggregation", "m", "knn20", {"us/a": 0.7}, {"student": {"us/a": 0.6}})
    assert (rows[0].level, rows[0].value, rows[0].change) == (
        "student", 0.6, pytest.approx(-0.1),
    )  # fmt: skip
