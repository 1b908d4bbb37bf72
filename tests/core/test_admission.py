import numpy as np
import pytest

from core.admission import Rejected, admit, printable
from core.wire import GlobalState, Prototypes


@pytest.fixture
def reference():
    student = {"a": np.full((2, 2), 2.0, np.float32), "b": np.ones(3, np.float32)}
    return GlobalState(student=student, teacher={n: a.copy() for n, a in student.items()})


@pytest.fixture
def good(reference):
    rows = np.eye(16, dtype=np.float32)[:3]
    update = GlobalState(
        student=reference.student,
        teacher=reference.teacher,
        prototypes=Prototypes({"ct": rows}, {"ct": np.array([2, 5, 9], np.float32)}),
    )
    return update.to_arrays(), {
        "round": 7, "num_examples/ct": 20, "loss/ct": 3.5, "seconds_train": 1.0,
    }  # fmt: skip


def judge(arrays, metrics, reference, recipe):
    return admit(
        arrays, metrics, site="st-mary", round_number=7, reference=reference, recipe=recipe
    )


def test_a_good_update_is_admitted_as_it_is(good, reference, recipe):
    update = judge(*good, reference, recipe)
    assert update.round_number == 7
    assert update.num_examples == {"ct": 20}
    assert update.metrics == {"loss/ct": 3.5, "seconds_train": 1.0}
    assert update.prototypes.counts["ct"].tolist() == [2.0, 5.0, 9.0]
    assert update.student["a"] is reference.student["a"]


BAD_ARRAYS = {
    "missing": ({"student/a": None}, r"array 'student/a' is missing \(1 missing in all\)"),
    "extra": ({"student/c": np.ones(1, np.float32)}, "array 'student/c' was not asked for"),
    "foreign": ({"patients": np.ones(1, np.float32)}, "array 'patients' was not asked for"),
    "shape": ({"student/b": np.ones(4, np.float32)}, r"has shape \(4,\), expected \(3,\)"),
    "float64": ({"student/b": np.ones(3)}, "dtype float64, expected float32"),
    "half": ({"student/b": np.ones(3, np.float16)}, "dtype float16, expected float32"),
    "nan": ({"student/b": np.array([1, np.nan, 1], np.float32)}, "'student/b' is not finite"),
    "inf": ({"teacher/b": np.array([1, np.inf, 1], np.float32)}, "'teacher/b' is not finite"),
    "far": ({"student/b": np.full(3, 1e30, np.float32)}, "student moved by 1.73e"),
    "far teacher": ({"teacher/b": np.full(3, -1e3, np.float32)}, "teacher moved by"),
    "not unit": ({"prototypes/ct": np.full((3, 16), 0.5, np.float32)}, "not of unit length"),
    "many": (
        {"prototypes/ct": np.eye(16, dtype=np.float32)},
        r"shape \(16, 16\), expected \(1 to 3",
    ),
    "dim": ({"prototypes/ct": np.eye(3, dtype=np.float32)}, r"shape \(3, 3\), expected"),
    "flat": ({"prototypes/ct": np.ones(16, np.float32)}, r"shape \(16,\), expected"),
    "no counts": ({"prototype_counts/ct": None}, "prototypes of 'ct' lack their counts"),
    "counts shape": ({"prototype_counts/ct": np.ones(2, np.float32)}, r"counts .* shape \(2,\)"),
    "few patients": ({"prototype_counts/ct": np.array([1, 5, 9], np.float32)}, "range from 1 to 9"),
    "negative": ({"prototype_counts/ct": np.array([-5, 5, 9], np.float32)}, "range from -5 to 9"),
    "huge": ({"prototype_counts/ct": np.array([2, 5, 1e30], np.float32)}, "the 20 images"),
    "more than the memory": (
        {"prototype_counts/ct": np.array([11, 11, 11], np.float32)},
        "counts of 'prototypes/ct' sum to 33, more than the memory's 32 entries",
    ),
    "nan counts": ({"prototype_counts/ct": np.array([2, 5, np.nan], np.float32)}, "not finite"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_rejected_by_site_name_and_reason(case, good, reference, recipe):
    changes, reason = BAD_ARRAYS[case]
    arrays = {**good[0], **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(
        Rejected, match=rf"^site 'st-mary', round 7: .*{reason}.*; update rejected$"
    ):
        judge(arrays, good[1], reference, recipe)


BAD_METRICS = {
    "negative": (
        {"num_examples/ct": -1},
        "'num_examples/ct' is -1, expected a whole number from 1",
    ),
    "zero": ({"num_examples/ct": 0}, "is 0, expected"),
    "huge": ({"num_examples/ct": 10**12}, "is 1000000000000, expected"),
    "fraction": ({"num_examples/ct": 20.0}, "is 20.0, expected"),
    "bool": ({"num_examples/ct": True}, "is True, expected"),
    "list": ({"loss/ct": [1.0]}, "metric 'loss/ct' is of type list, expected from -1e"),
    "count list": (
        {"num_examples/ct": [20]},
        "'num_examples/ct' is of type list, expected a whole",
    ),
    "vast": ({"num_examples/ct": 10**5000}, "'num_examples/ct' is of type int, expected a whole"),
    "vast metric": ({"loss/ct": -(10**5000)}, "metric 'loss/ct' is of type int, expected from"),
    "bool metric": ({"loss/ct": True}, "metric 'loss/ct' is True, expected from"),
    "auroc": ({"knn_auroc/ct": 1.5}, "metric 'knn_auroc/ct' is 1.5, expected from 0 to 1"),
    "cosine": ({"mean_cosine/ct": -2.0}, "'mean_cosine/ct' is -2.0, expected from -1.001 to 1.001"),
    "seconds": ({"seconds_train": -1.0}, "'seconds_train' is -1.0, expected from 0"),
    "other round": ({"round": 6}, "it answers round 6, not this one"),
    "round as a list": ({"round": [7]}, "it answers round of type list, not this one"),
    "round as a float": ({"round": 7.0}, "it answers round 7.0, not this one"),
    "no round": ({"round": None}, "'round' is missing: the site's software is older"),
    "many metrics": (
        {f"loss/{number}": 1.0 for number in range(100)},
        "104 metrics were sent, at most 97",
    ),
    "nan": ({"loss/ct": float("nan")}, "metric 'loss/ct' is nan"),
    "unknown": ({"patient_age/ct": 1.0}, "metric 'patient_age/ct' is not on the list"),
    "modality": ({"num_examples/mri": 20}, "metric 'num_examples/mri' is not on the list"),
    "bare": ({"num_examples": 20}, "metric 'num_examples' is not on the list"),
    "none": ({"num_examples/ct": None}, "no 'num_examples/<modality>' was sent"),
    "other": ({"num_examples/ct": None, "num_examples/us": 9}, "no images of this modality"),
}


@pytest.mark.parametrize("case", BAD_METRICS)
def test_bad_numbers_are_rejected_by_site_name_and_reason(case, good, reference, recipe):
    changes, reason = BAD_METRICS[case]
    metrics = {n: v for n, v in {**good[1], **changes}.items() if v is not None}
    with pytest.raises(
        Rejected, match=rf"^site 'st-mary', round 7: .*{reason}.*; update rejected$"
    ):
        judge(good[0], metrics, reference, recipe)


def test_a_teacher_is_not_asked_for_when_the_server_rebuilds_it(good, reference, recipe):
    federation = recipe.federation.model_copy(update={"teacher": "rebuild"})
    rebuilding = recipe.model_copy(update={"federation": federation})
    with pytest.raises(Rejected, match="array 'teacher/a' was not asked for"):
        judge(*good, reference, rebuilding)
    arrays = {n: a for n, a in good[0].items() if not n.startswith("teacher/")}
    assert judge(arrays, good[1], reference, rebuilding).teacher == {}


def test_an_update_at_the_limit_is_admitted_and_one_beyond_is_not(good, reference, recipe):
    # |student| = sqrt(4 * 2^2 + 3) = sqrt(19); the limit is 10 times that.
    for factor, admitted in ((0.999, True), (1.001, False)):
        moved = reference.student["b"] + np.float32(factor * 10 * np.sqrt(19 / 3))
        arrays = {**good[0], "student/b": moved}
        if admitted:
            judge(arrays, good[1], reference, recipe)
        else:
            with pytest.raises(Rejected, match=r"student moved by 43.6, more than 10 times"):
                judge(arrays, good[1], reference, recipe)


def test_names_from_outside_are_cut_and_made_printable(good, reference, recipe):
    arrays = {**good[0], "student/\x1b[31m" + "x" * 10_000: np.ones(1, np.float32)}
    with pytest.raises(Rejected) as caught:
        judge(arrays, good[1], reference, recipe)
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)
    assert printable("a\nb" + "c" * 500) == "a b" + "c" * 294 + "..."


PRIVATE = {"round": 7, "num_examples/ct": 20, "epsilon": 1.5}


@pytest.fixture
def private_recipe(make_record_recipe):
    """Releases prototypes in rounds 5 and 10 of ten."""
    return make_record_recipe({"rounds": 10}, prototype_releases=2)


def test_a_private_update_of_exactly_the_declared_keys_is_admitted(good, reference, private_recipe):
    weights = {n: a for n, a in good[0].items() if not n.startswith("prototype")}
    assert judge(weights, PRIVATE, reference, private_recipe).metrics == {"epsilon": 1.5}
    every = private_recipe.privacy.model_copy(update={"prototype_releases": 10})
    releasing = private_recipe.model_copy(update={"privacy": every})
    noised = good[0] | {"prototype_counts/ct": np.array([900, 5, 9], np.float32)}  # of 20 images
    assert judge(noised, PRIVATE, reference, releasing).prototypes.counts["ct"].max() == 900


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss/ct": 3.5}, "metric 'epsilon' leave alone; 'loss/ct' is too much"),
        ({"seconds_train": 1.0}, "'seconds_train' is too much"),
        ({"epsilon": None}, "'epsilon' is missing"),
        ({}, "this round releases no prototypes, and some were sent"),
    ],
)
def test_a_private_update_with_more_is_rejected(metrics, reason, good, reference, private_recipe):
    sent = {n: v for n, v in {**PRIVATE, **metrics}.items() if v is not None}
    with pytest.raises(Rejected, match=reason):
        judge(good[0], sent, reference, private_recipe)
