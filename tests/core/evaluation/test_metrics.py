import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import UserError
from core.evaluate import auroc
from core.evaluation.metrics import (
    METRICS,
    check_scores,
    class_groups,
    metrics,
    resampled_metrics,
)

# Six images of three classes, worked by hand below.
SCORES = np.array(
    [
        [0.7, 0.2, 0.1],  # 0, chosen 0
        [0.4, 0.5, 0.1],  # 0, chosen 1
        [0.2, 0.6, 0.2],  # 1, chosen 1
        [0.3, 0.4, 0.3],  # 1, chosen 1
        [0.5, 0.1, 0.4],  # 2, chosen 0
        [0.1, 0.1, 0.8],  # 2, chosen 2
    ]
)
LABELS = np.array([0, 0, 1, 1, 2, 2])

# Four images of two labels.
SEVERAL_SCORES = np.array([[0.9, 0.2], [0.6, 0.7], [0.3, 0.8], [0.1, 0.6]])
SEVERAL_LABELS = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])


def naive_auroc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    pairs = [(a > b) + (a == b) / 2 for a in scores[truth] for b in scores[~truth]]
    return float(np.mean(pairs))


def naive_average_precision(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = truth[scores >= threshold]
        total += found.mean() * (found.sum() / truth.sum() - recall)
        recall = found.sum() / truth.sum()
    return total


def test_each_measure_of_three_classes_is_the_one_worked_by_hand() -> None:
    found = metrics(SCORES, LABELS)
    assert tuple(found) == METRICS
    # Pairs in order, of 2 x 4 a class. Class 0: .7 beats 4; .4 beats .2, .3, .1.
    # Class 1: .6 beats 4; .4 beats .2, .1, .1. Class 2: .8 beats 4; .4 beats 4.
    assert found["auroc"] == pytest.approx((7 / 8 + 7 / 8 + 1) / 3)
    # Precision at each true image, from the highest score down: 1, 2/3; 1, 2/3; 1, 1.
    assert found["auprc"] == pytest.approx((5 / 6 + 5 / 6 + 1) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["sensitivity"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert found["balanced_accuracy"] == pytest.approx(found["sensitivity"])
    assert found["specificity"] == pytest.approx((3 / 4 + 3 / 4 + 1) / 3)
    # Precisions 1/2, 2/3, 1 with sensitivities 1/2, 1, 1/2.
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    squares = [0.09 + 0.04 + 0.01, 0.36 + 0.25 + 0.01, 0.04 + 0.16 + 0.04]
    squares += [0.09 + 0.36 + 0.09, 0.25 + 0.01 + 0.36, 0.01 + 0.01 + 0.04]
    assert found["brier"] == pytest.approx(sum(squares) / 12)
    # Highest scores .7 right, .5 wrong, .6 right, .4 right, .5 wrong, .8 right; .5 and .5 share
    # a bin (7/15 to 8/15), the others have one each.
    assert found["ece"] == pytest.approx((0.3 + 2 * 0.5 + 0.4 + 0.6 + 0.2) / 6)


def test_each_measure_of_several_labels_is_the_one_worked_by_hand() -> None:
    found = metrics(SEVERAL_SCORES, SEVERAL_LABELS)
    # Label 0: .9 beats 2, .3 beats .1. Label 1: .7 beats 2, .8 beats 2.
    assert found["auroc"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["auprc"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    # Chosen: label 0 yes yes no no, label 1 no yes yes yes.
    assert found["accuracy"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert found["sensitivity"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["specificity"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert found["brier"] == pytest.approx(
        (0.01 + 0.36 + 0.49 + 0.01 + 0.04 + 0.09 + 0.04 + 0.36) / 8
    )
    # Each score has a bin of its own: mean |score - truth| of each label.
    assert found["ece"] == pytest.approx(((0.1 + 0.6 + 0.7 + 0.1) + (0.2 + 0.3 + 0.2 + 0.6)) / 8)


def test_two_classes_are_one_question_about_the_second() -> None:
    ill = np.array([0.9, 0.4, 0.2, 0.7, 0.1])
    found = metrics(np.stack([1 - ill, ill], 1), np.array([1, 1, 1, 0, 0]))
    assert found["sensitivity"] == pytest.approx(1 / 3)
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.64 + 0.49 + 0.01) / 5)


def test_ranking_measures_equal_naive_loops_with_ties_and_a_class_that_no_image_has() -> None:
    draws = np.random.default_rng(0)
    scores = draws.integers(1, 6, size=(80, 4)).astype(float)  # ties
    scores /= scores.sum(1, keepdims=True)
    labels = draws.integers(0, 3, size=80)
    found = metrics(scores, labels)
    questions = [(scores[:, c], labels == c) for c in range(3)]
    assert found["auroc"] == pytest.approx(np.mean([naive_auroc(*q) for q in questions]))
    assert found["auprc"] == pytest.approx(
        np.mean([naive_average_precision(*q) for q in questions])
    )
    assert found["auroc"] == pytest.approx(auroc(scores, labels))


def test_calibration_error_of_honest_scores_is_small_and_of_bold_ones_is_their_excess() -> None:
    draws = np.random.default_rng(1)
    sure = draws.uniform(0.5, 1, size=50_000)
    right = draws.random(50_000) < sure
    honest = np.stack([1 - sure, sure], 1)
    assert metrics(honest, right.astype(int))["ece"] < 0.01
    bold = np.tile([0.05, 0.95], (50_000, 1))
    assert metrics(bold, right.astype(int))["ece"] == pytest.approx(0.95 - right.mean())


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_count_as_repeated_images(several: bool, classes: int) -> None:
    draws = np.random.default_rng(2)
    scores = draws.integers(1, 9, size=(60, classes)) / 9  # ties
    if not several:
        scores /= scores.sum(1, keepdims=True)
    shape = (60, classes) if several else 60
    labels = draws.integers(0, 2 if several else classes, size=shape)
    weights = draws.poisson(1, size=(5, 60)).astype(np.uint16)
    found = resampled_metrics(scores, labels, weights)
    for row, weight in enumerate(weights):
        repeated = np.repeat(np.arange(60), weight)
        expected = metrics(scores[repeated], labels[repeated])
        assert {name: found[name][row] for name in METRICS} == pytest.approx(expected, abs=1e-12)


def test_a_draw_of_one_class_has_no_auroc_but_an_accuracy() -> None:
    weights = np.array([[2, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.uint16)
    found = resampled_metrics(SCORES, LABELS, weights)
    assert np.isnan(found["auroc"]).tolist() == [True, False]
    assert found["accuracy"] == pytest.approx([2 / 3, 4 / 6])


def test_large_test_sets_are_measured_in_parts_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = np.random.default_rng(3).poisson(1, size=(7, 6)).astype(np.uint16)
    whole = resampled_metrics(SCORES, LABELS, weights)
    monkeypatch.setattr("core.evaluation.metrics.ROWS_AT_ONCE", 14)  # two resamplings a part
    for name, values in resampled_metrics(SCORES, LABELS, weights).items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.where(SCORES == 0.7, np.nan, SCORES), LABELS, "1 of 6 rows of scores are not finite"),
        (np.where(SCORES == 0.7, np.inf, SCORES), LABELS, "not finite"),
        (SCORES, LABELS + 1, "expected labels from 0 to 2, found 1 to 3"),
        (SCORES, LABELS - 1, "found -1 to 1"),
        (SEVERAL_SCORES, SEVERAL_LABELS * 2, "expected labels from 0 to 1, found 0 to 2"),
        (SCORES, np.zeros(6, int), "all 6 images have the same label"),
        (SEVERAL_SCORES, np.tile([1, 0], (4, 1)), "all 4 images have the same label"),
        (SCORES[:5], LABELS, r"found scores \[5, 3\] and labels \[6\]"),
        (SCORES[:0], LABELS[:0], r"found scores \[0, 3\]"),
        (SCORES * 2 - 0.5, LABELS, "expected probabilities, found scores between -0.3"),
        (SCORES / 2, LABELS, "row sums between 0.5 and 0.5"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    scores: NDArray[np.float64], labels: NDArray[np.int64], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        metrics(scores, labels)
    with pytest.raises(UserError, match=r"^cxr/nih, probe: "):
        check_scores(scores, labels, where="cxr/nih, probe")


def test_patients_of_each_class_are_counted_once() -> None:
    groups = np.array([5, 5, 5, 6, 7, 8])
    assert class_groups(LABELS, groups) == [1, 2, 2]
    assert class_groups(SEVERAL_LABELS, groups[:4]) == [1, 1]
