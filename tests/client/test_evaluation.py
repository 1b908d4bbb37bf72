"""An evaluation at one site: what is measured, what may leave, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.app import app
from client.policy import PolicyRefusal
from core.evaluate import evaluate_knn, evaluate_probe, labelled_tasks
from core.evaluation.shared_probe import probe_arrays, read_probes
from core.export import load_model
from core.phantoms import make_phantoms
from core.shards import open_shard, write_shard
from core.wire import EVALUATION_COUNTS, MEASURES, METHODS, SIDES, EvaluationReply
from server.evaluation import make_request
from server.grid import FIRST_NODE_ID, InProcessGrid

SMALL = "min_test_images = 2\n"
OPEN = SMALL + "send_score_histograms = true\nmin_patients_per_cell = 2\n"
TOML = """
[model]
options = { embed_dim = 32, depth = 2, num_heads = 2, patch_size = 8 }
[views]
global_px = 32
local_px = 16
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and an evaluator's own images of two modalities."""
    home = tmp_path_factory.mktemp("evaluator")
    (home / "model.toml").write_text(TOML)
    for modality in ("us", "cxr"):
        shard = make_phantoms(modality, patients=42, images_per_patient=1, px=32, seed=99)
        write_shard(home / "images" / modality, shard)
    return home


@pytest.fixture(scope="module")
def alone(home):
    """A request without a shared probe, and its arrays."""
    return make_request(home / "model.toml", None, 2, 5)


@pytest.fixture(scope="module")
def shared(home):
    """A request with the evaluator's probes of us and cxr, and its arrays."""
    return make_request(home / "model.toml", home / "images", 2, 5)


def ask(site_file, question, **records):
    request, arrays = question
    text = json.dumps(request.model_dump(mode="json"))
    content = {
        "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        "config": ConfigRecord({"request": text}),
    } | records
    grid = InProcessGrid(app, [{"site": str(site_file)}])
    (reply,) = grid.send_and_receive([Message(RecordDict(content), FIRST_NODE_ID, "evaluate")])
    return reply


def audit(site_file):
    text = (site_file.parent / "state" / "audit.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def names(modality, methods):
    figures = {f"{method}_{measure}/{modality}" for method in methods for measure in MEASURES}
    return figures | {f"{count}/{modality}" for count in EVALUATION_COUNTS}


def test_a_site_measures_exactly_what_core_evaluate_does(make_sites, alone, home):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=SMALL)
    metrics = dict(ask(file, alone).content["metrics"])
    model = load_model(home / "model.toml")
    tasks = labelled_tasks([open_shard(file.parent / "data" / "us")])
    (probe,) = evaluate_probe(model, tasks, last_blocks=2).values()
    (knn,) = evaluate_knn(model, tasks, neighbours=5).values()
    for measure in MEASURES:
        assert metrics[f"probe_{measure}/us"] == probe[measure]
        assert metrics[f"knn_{measure}/us"] == knn[measure]
    assert metrics["num_train/us"] == probe["train"]
    assert metrics["num_test/us"] == probe["test"]


def test_two_shards_of_a_modality_are_one_task(make_sites, alone):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=SMALL)
    more = make_phantoms("us", patients=21, images_per_patient=2, px=32, seed=7)
    write_shard(file.parent / "data" / "more", dataclasses.replace(more, name="more"))
    metrics = ask(file, alone).content["metrics"]
    assert set(metrics) == names("us", ["probe", "knn"])
    both = [labelled_tasks([open_shard(file.parent / "data" / d)])[0] for d in ("us", "more")]
    assert metrics["num_test/us"] == sum(len(task.test) for task in both)


def test_a_reply_holds_exactly_the_declared_keys(make_sites, shared):
    (file,) = make_sites({"a": ["us", "cxr", "ct"]}, patients=42, policy=OPEN)
    reply = ask(file, shared).content
    assert set(reply) == {"metrics", "histograms", "notes"}
    expected = names("us", METHODS) | names("cxr", METHODS) | names("ct", ["probe", "knn"])
    assert set(reply["metrics"]) == expected
    # Two classes mirror one another: one histogram; of three classes, each has its own.
    whole = {f"histogram/us/{c}" for c in range(3)} | {"histogram/cxr/1"}
    assert set(reply["histograms"]) == {f"{name}/{side}" for name in whole for side in SIDES}
    for name in whole:
        counts = [reply["histograms"][f"{name}/{side}"].numpy()[:, 1] for side in SIDES]
        assert sum(c.sum() for c in counts) == reply["metrics"][f"num_test/{name.split('/')[1]}"]
    assert dict(reply["notes"]) == {}


def test_the_audit_file_says_what_came_and_what_left(make_sites, shared):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=OPEN)
    reply = ask(file, shared).content
    incoming, outgoing = audit(file)
    assert (incoming["direction"], incoming["message"]) == ("in", "evaluate")
    assert set(incoming["arrays"]) == set(shared[1])
    assert (outgoing["direction"], outgoing["decision"]) == ("out", "measured and sent")
    assert set(outgoing["arrays"]) == set(reply["histograms"])
    assert outgoing["scalars"] == dict(reply["metrics"]) | dict(reply["notes"])
    assert incoming["study"] == outgoing["study"] == shared[0].study
    assert str(file.parent) not in json.dumps([incoming, outgoing])


def test_by_default_no_histogram_leaves(make_sites, shared):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=SMALL)
    reply = ask(file, shared).content
    assert set(reply["histograms"]) == set()
    assert "shared_probe_auroc/us" in reply["metrics"]
    assert reply["notes"]["pooling/us"] == "this site's policy sends no score histograms"


def test_a_class_of_few_patients_keeps_all_histograms_of_the_modality_back(make_sites, shared):
    (file,) = make_sites({"a": ["us", "cxr"]}, patients=42, policy=OPEN)
    shard = open_shard(file.parent / "data" / "us")
    test = np.flatnonzero((shard.split == "test") & (shard.label == 2))
    label = shard.label.copy()
    label[test[shard.patient[test] != shard.patient[test[0]]]] = 1  # one patient is left
    write_shard(file.parent / "data" / "us", dataclasses.replace(shard, label=label))
    reply = ask(file, shared).content
    assert set(reply["histograms"]) == {f"histogram/cxr/1/{side}" for side in SIDES}
    assert "fewer test patients than the 2" in reply["notes"]["pooling/us"]


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        ("min_test_images = 13\n", "fewer than the 13 test images that the policy asks for"),
        (SMALL + "min_images = 61\n", "fewer than the 61 training images that the policy asks for"),
        (SMALL + "allowed_modalities = ['ct']\n", "this site's policy does not allow it"),
        ("send_metrics = false\n", "this site's policy sends no metrics"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_with_the_reason(make_sites, alone, policy, note):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=policy)
    reply = ask(file, alone)
    assert reply.has_error()
    assert note in reply.error.reason
    assert note in audit(file)[-1]["decision"]


def test_one_modality_refused_leaves_the_others_measured(make_sites, alone):
    policy = SMALL + "allowed_modalities = ['ct']\n"
    (file,) = make_sites({"a": ["us", "ct"]}, patients=42, policy=policy)
    reply = ask(file, alone).content
    assert set(reply["metrics"]) == names("ct", ["probe", "knn"])
    assert dict(reply["notes"]) == {"skipped/us": "this site's policy does not allow it"}


def test_a_split_of_one_class_is_not_measured(make_sites, alone):
    (file,) = make_sites({"a": ["us", "ct"]}, patients=42, policy=SMALL)
    shard = open_shard(file.parent / "data" / "us")
    label = np.where(shard.split == "val", 0, shard.label)
    write_shard(file.parent / "data" / "us", dataclasses.replace(shard, label=label))
    notes = dict(ask(file, alone).content["notes"])
    assert notes == {"skipped/us": "train, val and test do not hold two classes each"}


def test_a_class_that_the_shared_probe_lacks_is_not_scored_by_it(make_sites, shared):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=OPEN)
    request, arrays = shared
    classes = {**request.probe_classes, "us": ("normal", "benign", "cyst")}
    reply = ask(file, (request.model_copy(update={"probe_classes": classes}), arrays)).content
    assert set(reply["metrics"]) == names("us", ["probe", "knn"])
    assert "a class that the evaluator's probe lacks" in reply["notes"]["pooling/us"]


def test_classes_are_matched_by_name_not_by_number(make_sites, shared):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=OPEN)
    before = ask(file, shared).content
    request, arrays = shared
    order = [2, 0, 1]
    turned = {name: a[..., order] if name.endswith("/us") else a for name, a in arrays.items()}
    names = request.probe_classes["us"]
    classes = {**request.probe_classes, "us": tuple(names[i] for i in order)}
    after = ask(file, (request.model_copy(update={"probe_classes": classes}), turned)).content
    assert dict(after["metrics"]) == pytest.approx(dict(before["metrics"]))
    for number, old in enumerate(order):
        for side in SIDES:
            now, then = (
                reply["histograms"][f"histogram/us/{n}/{side}"].numpy()
                for reply, n in ((after, number), (before, old))
            )
            assert np.array_equal(now, then)


def with_array(question, name, value):
    request, arrays = question
    return request, arrays | {name: value}


BAD = {
    "nan": ("backbone/cls_token", np.full((1, 1, 32), np.nan, np.float32), "is not finite"),
    "shape": ("backbone/cls_token", np.ones((1, 1, 7), np.float32), "cannot be built: Error"),
    "name": ("images", np.ones(1), "an array that is not on the list"),
    "probe": ("probe_weight/us", np.ones((9, 3)), "takes 9 features, the model gives 192"),
    "classes": ("probe_weight/us", np.ones((192, 2)), "expected weights [F, 3]"),
    "no bias": ("probe_weight/ct", np.ones((192, 2)), "lack weights, biases or class names"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_array_is_refused_in_plain_words(case, make_sites, shared):
    name, value, words = BAD[case]
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=OPEN)
    reply = ask(file, with_array(shared, name, value))
    assert reply.has_error()
    assert words in reply.error.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"px": "32"}, "'px': input should be a valid integer"),
        ({"study": "../.."}, "'study': string should match pattern"),
        ({"seed": 1}, "'seed': extra inputs are not permitted"),
        ({"model": {"backbone": "no_such_vit"}}, "the model that was sent cannot be built"),
    ],
)
def test_a_bad_request_is_refused_and_audited(make_sites, alone, changes, words):
    (file,) = make_sites({"a": ["us"]}, policy=SMALL)
    text = json.dumps(alone[0].model_dump(mode="json") | changes)
    reply = ask(file, alone, config=ConfigRecord({"request": text}))
    assert reply.has_error()
    assert words in reply.error.reason
    assert words in audit(file)[-1]["decision"]


def test_a_message_with_more_than_a_request_is_refused(make_sites, alone):
    (file,) = make_sites({"a": ["us"]})
    reply = ask(file, alone, extra=ConfigRecord({"data_dir": "/etc"}))
    assert "does not hold exactly what an evaluate message should" in reply.error.reason


def test_probes_survive_the_wire(shared):
    request, arrays = shared
    probes = read_probes(arrays, request.probe_classes)
    again = probe_arrays(probes)
    assert set(probes) == {"us", "cxr"}
    assert all(np.array_equal(arrays[name], again[name]) for name in again)


def test_every_evaluation_passes_the_last_gate_before_it_leaves(make_sites, alone, monkeypatch):
    (file,) = make_sites({"st-mary": ["cxr"]}, policy=SMALL)

    def hold(*_):
        raise PolicyRefusal("held back")

    monkeypatch.setattr("client.app.hold_evaluation", hold)
    monkeypatch.setattr("client.evaluation.measure", lambda *_: EvaluationReply({}, {}, {}))
    assert ask(file, alone).error.reason == "held back"
