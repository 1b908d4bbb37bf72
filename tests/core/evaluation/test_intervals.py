import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import UserError
from core.evaluation.intervals import (
    Comparison,
    Resampled,
    Subgroup,
    compare,
    delong,
    draw_weights,
    holm,
    interval,
    mean_over_modalities,
    resample,
    subgroups,
)
from core.evaluation.metrics import METRICS
from core.evaluation.types import Prediction

spec = importlib.util.spec_from_file_location(
    "coverage_benchmark", Path(__file__).parents[3] / "benchmarks/coverage.py"
)
assert spec
assert spec.loader
simulation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spread(value: float, deviation: float, freedom: float, seed: int = 0) -> Resampled:
    """A measure whose draws have exactly this mean and deviation."""
    draws = generator(seed).normal(size=999)
    draws = (draws - draws.mean()) / draws.std(ddof=1)
    return Resampled(value, value + deviation * draws, freedom)


def test_patients_are_drawn_whole_and_as_many_as_there_are() -> None:
    groups = np.array([7, 3, 7, 9, 3, 7])
    weights = draw_weights(groups, 50, generator())
    assert weights.shape == (50, 6)
    for patient in (3, 7, 9):
        mine = weights[:, groups == patient]
        assert (mine == mine[:, :1]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(weights, axis=0)) == 10  # ways to draw 3 of 3


def test_the_same_generator_gives_the_same_draws() -> None:
    groups = np.arange(30) // 2
    first, second = (draw_weights(groups, 20, generator(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != draw_weights(groups, 20, generator(6))).any()


def test_images_of_one_patient_are_refused() -> None:
    with pytest.raises(UserError, match="all 4 test images are of one patient"):
        draw_weights(np.zeros(4, np.int64), 10, generator())


def accuracy_task(right: NDArray[np.bool_], groups: NDArray[np.int64]) -> Prediction:
    labels = np.arange(len(right)) % 2
    scores = np.eye(2)[np.where(right, labels, 1 - labels)]
    return Prediction("m", "cxr/a", "probe", 100, 0, 0, scores, labels, groups, ("no", "yes"))


def test_the_spread_of_accuracy_is_that_of_a_share_of_independent_patients() -> None:
    right = np.arange(200) % 10 < 7
    task = accuracy_task(right, np.arange(200))
    found = resample(task, draw_weights(task.groups, 4000, generator()))["accuracy"]
    assert found.value == pytest.approx(0.7)
    assert found.variance == pytest.approx(0.7 * 0.3 / 199, rel=0.06)
    assert found.freedom == 199


def test_images_that_are_right_together_count_as_one_patient() -> None:
    right = np.repeat(np.arange(50) % 10 < 7, 4)
    task = accuracy_task(right, np.repeat(np.arange(50), 4))
    found = resample(task, draw_weights(task.groups, 4000, generator()))["accuracy"]
    assert found.variance == pytest.approx(0.7 * 0.3 / 49, rel=0.06)


def test_class_means_have_the_freedom_of_their_rare_class() -> None:
    labels = np.repeat([0, 1], [80, 20])
    scores = np.tile([0.6, 0.4], (100, 1))
    task = Prediction(
        "m", "cxr/a", "probe", 100, 0, 0, scores, labels, np.arange(100), ("no", "yes")
    )
    found = resample(task, draw_weights(task.groups, 10, generator()))
    assert set(found) == set(METRICS)
    # Welch: (1/80 + 1/20)^2 / (1/80^2/79 + 1/20^2/19)
    assert found["auroc"].freedom == pytest.approx(0.00390625 / (1 / 505_600 + 1 / 7_600))


def test_a_class_of_one_patient_does_not_blur_the_mean_of_many_classes() -> None:
    labels = np.repeat(np.arange(5), [40, 30, 20, 10, 1])
    scores = generator().dirichlet(np.ones(5), size=101)
    task = Prediction(
        "m", "us/a", "probe", 100, 0, 0, scores, labels, np.arange(101), tuple("abcde")
    )
    found = resample(task, draw_weights(task.groups, 10, generator()))
    assert found["auroc"].freedom == 5


def test_an_interval_is_symmetric_in_log_odds_with_students_t() -> None:
    found = interval(spread(0.8, 0.05, 30))
    # t(.975; 30) = 2.0423; deviation of the log odds .05 * sqrt(1 + 1/30) / .16
    reach = 2.0423 * 0.05 * np.sqrt(31 / 30) / 0.16
    odds = [4 * np.exp(-reach), 4 * np.exp(reach)]
    assert (found.low, found.high) == pytest.approx([o / (1 + o) for o in odds], abs=1e-4)
    assert found.value == 0.8


def test_a_perfect_model_gets_wilsons_lower_bound() -> None:
    found = interval(Resampled(1.0, np.ones(100), 19))
    assert (found.low, found.high) == pytest.approx((20 / (20 + 1.959964**2), 1))
    worst = interval(Resampled(0.0, np.zeros(100), 19))
    assert (worst.low, worst.high) == pytest.approx((0, 1 - found.low))


def test_draws_of_one_class_are_left_out() -> None:
    whole = spread(0.8, 0.05, 30)
    holed = dataclasses.replace(whole, draws=np.append(whole.draws, [np.nan, np.nan]))
    assert interval(holed) == interval(whole)
    other = spread(0.75, 0.05, 30, 1)
    longer = dataclasses.replace(other, draws=np.append(other.draws, [0.7, 0.8]))
    assert compare(holed, longer) == compare(whole, other)


def test_p_is_twice_the_share_of_draws_beyond_0_with_the_sample_itself() -> None:
    b = Resampled(0.5, np.full(99, 0.5), 1e9)
    draws = np.linspace(0.48, 0.78, 99)  # 7 of them at or below .5
    found = compare(Resampled(0.6, draws, 1e9), b)
    assert found.p == pytest.approx(2 * (7 + 1) / (99 + 1))
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((-0.0125, 0.2725))
    assert compare(b, b) == Comparison(0, 0, 0, 1)


def test_few_patients_of_a_class_widen_the_interval_of_a_difference() -> None:
    b = Resampled(0.5, np.full(999, 0.5), 10)
    many = dataclasses.replace(spread(0.6, 0.04, 1e9), freedom=1e9)
    few = compare(dataclasses.replace(many, freedom=10), b)
    found = compare(many, dataclasses.replace(b, freedom=1e9))
    # t(.975; 10) = 2.2281
    widening = 2.2281 / 1.959964 * np.sqrt(11 / 10)
    assert few.high - few.low == pytest.approx(widening * (found.high - found.low), abs=1e-5)


def test_the_interval_of_a_difference_leaves_0_out_when_p_is_below_5_percent() -> None:
    for difference in (0.05, 0.12, 0.2):
        found = compare(spread(0.5 + difference, 0.05, 40, 1), spread(0.5, 0.04, 40, 2))
        assert (found.p < 0.05) == (found.low > 0)


def test_pairing_sees_a_small_difference_that_single_intervals_hide() -> None:
    draws = generator(3)
    labels = np.arange(200) % 2
    noise = draws.normal(size=200)
    tasks = []
    for model, signal in (("a", 1.0), ("b", 0.6)):
        odds = np.exp(signal * labels + noise + 0.2 * draws.normal(size=200))
        scores = np.stack([1 / (1 + odds), odds / (1 + odds)], 1)
        names = ("no", "yes")
        tasks.append(
            Prediction(model, "cxr/a", "probe", 100, 0, 0, scores, labels, np.arange(200), names)
        )
    weights = draw_weights(np.arange(200), 1000, generator())
    a, b = (resample(task, weights)["auroc"] for task in tasks)
    assert interval(a).low < interval(b).high
    assert compare(a, b).p < 0.01
    alone = resample(tasks[1], draw_weights(np.arange(200), 1000, generator(9)))["auroc"]
    assert compare(a, alone).p > 0.05


def test_the_mean_counts_every_modality_once_and_adds_independent_spreads() -> None:
    tasks = {
        "cxr/one": spread(0.6, 0.04, 30, 1),
        "cxr/two": spread(0.8, 0.02, 50, 2),
        "oct/three": spread(0.9, 0.03, 20, 3),
    }
    found = mean_over_modalities(tasks)
    assert found.value == pytest.approx((0.7 + 0.9) / 2)
    shares = np.array([0.25, 0.25, 0.5])
    expected = shares @ [task.draws for task in tasks.values()]
    np.testing.assert_allclose(found.draws, expected)
    parts = shares**2 * [task.variance for task in tasks.values()]
    assert found.variance == pytest.approx(parts.sum(), rel=0.1)
    assert found.freedom == pytest.approx(parts.sum() ** 2 / (parts**2 / [30, 50, 20]).sum())


def test_the_mean_of_perfect_tasks_is_not_certain() -> None:
    perfect = Resampled(1.0, np.ones(50), 19)
    found = interval(mean_over_modalities({f"{m}/x": perfect for m in ("ct", "us", "oct")}))
    assert found.low == pytest.approx(20 / (20 + 1.959964**2))


def naive_delong(
    labels: NDArray[np.int64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[float, float]:
    """Difference and its variance by all pairs, as the paper defines them."""
    placements = []
    for scores in (a, b):
        ill, well = scores[labels == 1], scores[labels == 0]
        wins = (ill[:, None] > well) + 0.5 * (ill[:, None] == well)
        placements.append((wins.mean(1), wins.mean(0)))
    (a10, a01), (b10, b01) = placements
    variance = np.var(a10 - b10, ddof=1) / len(a10) + np.var(a01 - b01, ddof=1) / len(a01)
    return float(a10.mean() - b10.mean()), float(variance)


@pytest.mark.parametrize("levels", [4, 1000])
def test_delong_equals_the_definition_by_all_pairs(levels: int) -> None:
    draws = generator(4)
    labels = (draws.random(70) < 0.3).astype(np.int64)
    a = np.round((labels + draws.normal(size=70)) * levels) / levels
    b = np.round(labels + 0.5 * a + draws.normal(size=70))
    difference, variance = naive_delong(labels, a, b)
    found = delong(labels, a, b)
    assert found.difference == pytest.approx(difference)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * np.sqrt(variance))
    z = abs(difference) / np.sqrt(variance)
    normal = draws.normal(size=400_000)
    assert found.p == pytest.approx((np.abs(normal) > z).mean(), abs=0.005)
    assert delong(labels, b, a).p == pytest.approx(found.p)
    assert delong(labels, a, a).p == 1


def test_delong_and_the_bootstrap_agree_on_independent_patients() -> None:
    population = simulation.POPULATIONS["2 classes, even"]
    a, b = simulation.draw_study(population, generator(8))
    weights = draw_weights(a.groups, 2000, generator())
    found = compare(*(resample(task, weights)["auroc"] for task in (a, b)))
    other = delong(a.labels, a.scores[:, 1], b.scores[:, 1])
    assert found.difference == pytest.approx(other.difference)
    assert found.high - found.low == pytest.approx(other.high - other.low, rel=0.1)


def test_holm_is_the_one_worked_by_hand() -> None:
    # In order .005 * 4, .01 * 3, .03 * 2, .04 * 1, none below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_subgroups_are_measured_apart_and_compared_with_the_best() -> None:
    ill = np.array([0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.6])
    labels = np.array([1, 0, 1, 0, 1, 0, 1])
    column = ["F", "F", "M", "M", "M", "M", ""]
    found = subgroups(np.stack([1 - ill, ill], 1), labels, column)
    # M: .8 beats .7 and .3, .2 beats none.
    assert found == [
        Subgroup("", 1, None, None),
        Subgroup("F", 2, 1.0, 0.0),
        Subgroup("M", 4, 0.5, -0.5),
    ]
    with pytest.raises(UserError, match="6 values for 7 test images"):
        subgroups(np.stack([1 - ill, ill], 1), labels, column[:6])


def test_intervals_hold_the_truth_and_tests_err_as_often_as_they_say() -> None:
    population = simulation.POPULATIONS["2 classes, 20 % ill, good model"]
    found = simulation.measure(
        simulation.one_task(population, draws=200),
        simulation.true_metrics(population, 50_000),
        studies=150,
        generator=generator(1),
    )
    # Two deviations of 150 studies are .036; benchmarks/coverage.py measures with more.
    for row in found.values():
        assert 0.91 <= row["held"] <= 0.99
        assert 0.01 <= row["erred"] <= 0.09
    assert found["auroc"]["plain"] < 0.9  # so a wrong interval is noticed


def test_intervals_that_take_a_patients_images_for_independent_do_not_hold_the_truth() -> None:
    population = simulation.POPULATIONS["3 classes, 1-7 images"]
    truth = simulation.true_metrics(population, 50_000)["accuracy"]
    draws = generator(2)
    held = {True: 0, False: 0}
    for _ in range(80):
        task, _ = simulation.draw_study(population, draws)
        for by_patient in held:
            groups = task.groups if by_patient else np.arange(len(task.groups))
            weights = draw_weights(groups, 100, draws)
            share = (weights @ (task.scores.argmax(1) == task.labels)) / weights.sum(1)
            value = float((task.scores.argmax(1) == task.labels).mean())
            found = interval(Resampled(value, share, len(np.unique(groups)) - 1))
            held[by_patient] += found.low <= truth <= found.high
    assert held[True] >= 72
    assert held[False] < 66
