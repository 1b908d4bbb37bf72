"""The last gate, fed with replies as no honest app of ours would make them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.egress import cut, hold_evaluation, hold_query, hold_training
from client.policy import Policy, PolicyRefusal
from core.wire import Prototypes, SiteUpdate

SENT = {
    "student/w": np.zeros((2, 3), np.float32),
    "teacher/w": np.zeros((2, 3), np.float32),
}


def training(**changes):
    """A reply that passes, with other arrays, metrics or records; None takes one away."""
    arrays = {
        "student/w": np.ones((2, 3), np.float32),
        "teacher/w": np.ones((2, 3), np.float16),
        "prototypes/ct": np.ones((2, 16), np.float32),
        "prototype_counts/ct": np.array([10, 12], np.float32),
    } | changes.pop("arrays", {})
    metrics = {"round": 1, "num_examples/ct": 20, "loss/ct": 0.5, "rankme": 3} | changes.pop(
        "metrics", {}
    )
    kept = {name: Array(array) for name, array in arrays.items() if array is not None}
    records = {"arrays": ArrayRecord(kept), "metrics": MetricRecord(metrics)} | changes
    return RecordDict(records)


OPEN = Policy(allowed_modalities=("ct",), min_patients_per_prototype=10)


def test_an_honest_training_reply_passes(recipe):
    hold_training(OPEN, recipe, SENT, training())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"more": MetricRecord({})}, "its records"),
        ({"metrics": {"loss/ct": [0.5, 0.25]}}, "a metric's name or type"),
        ({"metrics": {"patient_7": 1}}, "a metric's name or type"),
        ({"metrics": {"loss/us": 0.5}}, "a metric's modality"),
        ({"metrics": {"num_examples/us": 3}}, "a metric's modality"),
        ({"arrays": {"student/x": np.ones(3, np.float32)}}, "an array's name"),
        ({"arrays": {"images": np.ones(3, np.float32)}}, "an array's name"),
        ({"arrays": {"student/w": np.ones((2, 4), np.float32)}}, "an array's shape"),
        ({"arrays": {"student/w": np.ones((2, 3), np.float64)}}, "an array's type"),
        ({"arrays": {"student/w": np.ones((2, 3), np.uint8)}}, "an array's type"),
        ({"arrays": {"prototype_counts/ct": None}}, "prototypes without their counts"),
        ({"arrays": {"prototypes/ct": None}}, "prototypes without their counts"),
        ({"arrays": {"prototypes/ct": np.ones((3, 16), np.float32)}}, "the prototypes' shape"),
        ({"arrays": {"prototypes/ct": np.ones((2, 17), np.float32)}}, "the prototypes' shape"),
        ({"arrays": {"prototype_counts/ct": np.array([9, 12], np.float32)}}, "too few patients"),
        ({"arrays": {"prototype_counts/ct": np.array([10, np.nan], np.float32)}}, "too few"),
    ],
)
def test_what_is_not_on_the_list_is_held_back(changes, part, recipe):
    with pytest.raises(PolicyRefusal, match=f"held its reply back at its last gate: .*{part}"):
        hold_training(OPEN, recipe, SENT, training(**changes))


EIGHT_BITS = {name: np.ones((2, 3), np.int8) for name in SENT}


def test_eight_bits_leave_where_the_recipe_says_so(make_recipe):
    hold_training(OPEN, make_recipe(transport="delta8"), SENT, training(arrays=EIGHT_BITS))


@pytest.mark.parametrize(
    ("transport", "arrays"),
    [
        ("delta16", EIGHT_BITS),
        ("delta8", {}),
        ("delta8", EIGHT_BITS | {"prototypes/ct": np.ones((2, 16), np.int8)}),
    ],
)
def test_no_other_type_leaves_than_the_transports(transport, arrays, make_recipe):
    with pytest.raises(PolicyRefusal, match="an array's type"):
        hold_training(OPEN, make_recipe(transport=transport), SENT, training(arrays=arrays))


def test_more_prototypes_than_the_recipe_says_are_held_back(recipe):
    many = {
        "prototypes/ct": np.ones((4, 16), np.float32),
        "prototype_counts/ct": np.full(4, 12, np.float32),
    }
    with pytest.raises(PolicyRefusal, match="the prototypes' shape"):
        hold_training(OPEN, recipe, SENT, training(arrays=many))


def test_prototypes_of_a_modality_that_is_not_allowed_are_held_back(recipe):
    us = {
        "prototypes/us": np.ones((2, 16), np.float32),
        "prototype_counts/us": np.full(2, 12, np.float32),
    }
    with pytest.raises(PolicyRefusal, match="a prototype's modality"):
        hold_training(OPEN, recipe, SENT, training(arrays=us))


def test_the_teacher_is_held_back_if_the_recipe_rebuilds_it(make_recipe):
    with pytest.raises(PolicyRefusal, match="an array's name"):
        hold_training(OPEN, make_recipe(teacher="rebuild"), SENT, training())


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ({"send_prototypes": False}, "prototypes, as the policy sends none"),
        ({"send_metrics": False}, "a metric, as the policy sends none"),
        ({"min_patients_per_prototype": 11}, "a prototype of too few patients"),
    ],
)
def test_what_the_policy_does_not_send_is_held_back(policy, part, recipe):
    with pytest.raises(PolicyRefusal, match=part):
        hold_training(OPEN.model_copy(update=policy), recipe, SENT, training())


def test_cut_leaves_out_prototypes_of_too_few_patients(make_recipe):
    update = SiteUpdate(
        round_number=1,
        student={},
        teacher={"w": np.ones(1)},
        prototypes=Prototypes(
            {"ct": np.eye(3, dtype=np.float32), "us": np.eye(3, dtype=np.float32)},
            {"ct": np.array([9, 10, 30]), "us": np.array([9, 9, 9])},
        ),
        num_examples={"ct": 20},
        metrics={"loss": 0.5, "patient_7": 1},
    )
    kept = cut(OPEN, make_recipe(prototype_min_patients=10, teacher="rebuild"), update)
    assert kept.prototypes.counts["ct"].tolist() == [10, 30]
    assert kept.prototypes.centroids["ct"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert set(kept.prototypes.counts) == {"ct"}
    assert (kept.teacher, kept.metrics) == ({}, {"loss": 0.5})


def evaluation(**changes):
    rows = np.array([[50, 12], [100, 0]], np.int64)
    records = {
        "metrics": {"num_test/ct": 30, "probe_auroc/ct": 0.75},
        "histograms": {"histogram/ct/1/positives": rows},
        "notes": {"skipped/us": "this site's policy does not allow it"},
    } | changes
    return RecordDict(
        {
            "metrics": MetricRecord(records["metrics"]),
            "histograms": ArrayRecord({n: Array(a) for n, a in records["histograms"].items()}),
            "notes": ConfigRecord(records["notes"]),
        }
    )


SHARING = Policy(allowed_modalities=("ct",), send_score_histograms=True)


def test_an_honest_evaluation_passes():
    hold_evaluation(SHARING, evaluation())


def rows(*pairs):
    return {"histogram/ct/1/positives": np.array(pairs, np.int64)}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"metrics": {"loss": 0.5}}, "a figure's name or type"),
        ({"metrics": {"probe_auroc/us": 0.5}}, "a figure's modality"),
        ({"histograms": {"scores/ct": np.ones((2, 2), np.int64)}}, "a histogram"),
        ({"histograms": {"histogram/us/1/positives": np.array([[100, 12]])}}, "modality"),
        ({"histograms": rows((50, 9), (100, 12))}, "a histogram's counts"),
        ({"histograms": rows((50, 12), (99, 12))}, "a histogram's counts"),
        ({"notes": {"skipped/ct": "x" * 301}}, "a note"),
        ({"notes": {"skipped/ct": "two\nlines"}}, "a note"),
        ({"notes": {"skipped/ct": b"bytes"}}, "a note"),
        ({"notes": {"names": "none"}}, "a note"),
    ],
)
def test_what_is_not_on_an_evaluations_list_is_held_back(changes, part):
    with pytest.raises(PolicyRefusal, match=f"last gate: {part}|last gate: .*{part}"):
        hold_evaluation(SHARING, evaluation(**changes))


@pytest.mark.parametrize(
    ("policy", "part"),
    [({"send_metrics": False}, "figures"), ({"send_score_histograms": False}, "a histogram")],
)
def test_an_evaluation_holds_what_the_policy_sends(policy, part):
    with pytest.raises(PolicyRefusal, match=part):
        hold_evaluation(SHARING.model_copy(update=policy), evaluation())


def test_an_answer_to_a_query_holds_name_and_version_alone():
    info = {"site": "st-mary", "version": "1"}
    hold_query("st-mary", RecordDict({"info": ConfigRecord(info)}))
    for other in (info | {"site": "city"}, info | {"path": "/srv"}, {"site": "st-mary"}):
        with pytest.raises(PolicyRefusal, match="what a query asks for"):
            hold_query("st-mary", RecordDict({"info": ConfigRecord(other)}))
    with pytest.raises(PolicyRefusal, match="its records"):
        hold_query("st-mary", RecordDict({"info": ConfigRecord(info), "x": MetricRecord({})}))


DECLARING = Policy(
    allowed_modalities=("ct",), declared_images={"ct": 500}, min_patients_per_prototype=10
)
NO_PROTOTYPES = {"prototypes/ct": None, "prototype_counts/ct": None}
EXACT = {"round": 1, "num_examples/ct": 500, "epsilon": 1.5}


def with_metrics(content, metrics):
    """The reply with these metrics and no other."""
    content["metrics"] = MetricRecord(metrics)
    return content


def test_a_private_reply_of_exactly_the_declared_keys_passes(make_record_recipe):
    held = with_metrics(training(arrays=NO_PROTOTYPES), EXACT)
    hold_training(DECLARING, make_record_recipe(), SENT, held)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"loss/ct": 0.5}, "a private metric"),
        ({"rankme": 3.0}, "a private metric"),
        ({"seconds_train": 3.0}, "a private metric"),
        ({"num_examples/ct": 499}, "a private metric"),
        ({"num_examples/us": 500}, "a private metric"),
        ({"epsilon": 1}, "the round or epsilon"),
        ({"round": 1.0}, "the round or epsilon"),
    ],
)
def test_a_private_reply_with_anything_else_is_held_back(more, part, make_record_recipe):
    held = with_metrics(training(arrays=NO_PROTOTYPES), {**EXACT, **more})
    with pytest.raises(PolicyRefusal, match=f"last gate: {part}"):
        hold_training(DECLARING, make_record_recipe(), SENT, held)


def test_a_private_reply_without_its_epsilon_is_held_back(make_record_recipe):
    held = with_metrics(training(arrays=NO_PROTOTYPES), {"round": 1})
    with pytest.raises(PolicyRefusal, match="the round or epsilon"):
        hold_training(DECLARING, make_record_recipe(), SENT, held)


def test_prototypes_leave_in_the_rounds_that_release_them_alone(make_record_recipe):
    once = make_record_recipe(prototype_releases=1)  # in the last of two rounds
    first, last = (with_metrics(training(), {**EXACT, "round": n}) for n in (1, 2))
    hold_training(DECLARING, once, SENT, last)
    with pytest.raises(PolicyRefusal, match="prototypes in this round"):
        hold_training(DECLARING, once, SENT, first)


def test_cut_leaves_of_a_private_update_what_was_noised_or_declared(make_record_recipe):
    update = SiteUpdate(
        round_number=1, student={"w": np.ones(1)}, teacher={}, prototypes=Prototypes({}, {}),
        num_examples={"ct": 137}, metrics={"loss/ct": 0.5, "seconds_train": 3.0, "epsilon": 1.5},
    )  # fmt: skip
    kept = cut(DECLARING, make_record_recipe(), update)
    assert kept.to_metrics() == {"round": 1, "num_examples/ct": 500, "epsilon": 1.5}
    silent = DECLARING.model_copy(update={"send_metrics": False})
    assert cut(silent, make_record_recipe(), update).metrics == {"epsilon": 1.5}
