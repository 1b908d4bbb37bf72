"""The real ClientApp behind the in-process grid: what goes in, what may come out."""

import io
import json
import re
from datetime import datetime

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.app import CLIENT_APP_ERROR, app, respond
from client.chain import append, read
from client.policy import PolicyRefusal
from core.wire import NOT_NOW, metric_is_declared
from server.grid import FIRST_NODE_ID, InProcessGrid
from server.study import initial_state

STUDY = "ab" * 16


def train_message(study_recipe, **changes):
    state = initial_state(study_recipe)
    arrays = {name: Array(array) for name, array in state.to_arrays().items()}
    arrays |= changes.pop("arrays", {})
    config = {"study": STUDY, "round": 1, "step": 0, "recipe": study_recipe.to_json()} | changes
    content = {"arrays": ArrayRecord(arrays), "config": ConfigRecord(config)}
    return Message(RecordDict(content), FIRST_NODE_ID, "train")


def ask(site_file, message):
    grid = InProcessGrid(app, [{"site": str(site_file)}])
    (reply,) = grid.send_and_receive([message()])
    return reply


def audit(site_file):
    text = (site_file.parent / "state" / "audit.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_query_is_answered_with_name_and_version_alone(make_sites):
    (file,) = make_sites({"st-mary": ["ct"]})
    config = ConfigRecord({"study": STUDY})
    reply = ask(file, lambda: Message(RecordDict({"config": config}), FIRST_NODE_ID, "query"))
    assert set(reply.content) == {"info"}
    assert set(reply.content["info"]) == {"site", "version"}
    assert reply.content["info"]["site"] == "st-mary"
    assert [line["direction"] for line in audit(file)] == ["in", "out"]


def expected_arrays(recipe, modalities):
    names = set(initial_state(recipe).student)
    expected = {f"{group}/{name}" for group in ("student", "teacher") for name in names}
    for modality in modalities:
        expected |= {f"prototypes/{modality}", f"prototype_counts/{modality}"}
    return expected


def test_a_reply_holds_exactly_the_declared_keys(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct", "us"]})
    reply = ask(file, lambda: train_message(recipe))
    assert set(reply.content) == {"arrays", "metrics"}
    assert set(reply.content["arrays"]) == expected_arrays(recipe, ["ct", "us"])
    metrics = reply.content["metrics"]
    assert all(metric_is_declared(name) for name in metrics)
    assert {n for n in metrics if n.startswith("num_examples/")} == {
        "num_examples/ct", "num_examples/us",
    }  # fmt: skip
    assert {"loss/ct", "knn_auroc/us", "seconds_train"} <= set(metrics)


def test_a_private_reply_holds_exactly_the_declared_keys(make_sites, make_record_recipe):
    (file,) = make_sites({"st-mary": ["ct"]}, policy="declared_images.ct = 500\n")
    recipe = make_record_recipe({"teacher": "rebuild"})
    reply = ask(file, lambda: train_message(recipe))
    names = {f"student/{name}" for name in initial_state(recipe).student}
    assert set(reply.content) == {"arrays", "metrics"}
    assert set(reply.content["arrays"]) == names
    metrics = dict(reply.content["metrics"])
    epsilon = metrics.pop("epsilon")
    assert metrics == {"round": 1, "num_examples/ct": 500}
    assert epsilon > 0
    assert audit(file)[-1]["epsilon"] == epsilon


def test_a_policy_that_sends_less_sends_exactly_that(make_sites, make_recipe):
    recipe = make_recipe(teacher="rebuild")
    policy = "send_metrics = false\nsend_prototypes = false\n"
    (file,) = make_sites({"st-mary": ["ct"]}, policy=policy)
    reply = ask(file, lambda: train_message(recipe))
    names = {f"student/{name}" for name in initial_state(recipe).student}
    assert set(reply.content["arrays"]) == names
    assert set(reply.content["metrics"]) == {"round", "num_examples/ct"}


def test_the_same_round_asked_twice_is_trained_once(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]})
    first, again = (ask(file, lambda: train_message(recipe)) for _ in range(2))
    for name, array in first.content["arrays"].items():
        assert again.content["arrays"][name].numpy().tobytes() == array.numpy().tobytes()
    # Equal timings show that nothing ran again.
    assert dict(first.content["metrics"]) == dict(again.content["metrics"])
    decisions = [line["decision"] for line in audit(file) if line["direction"] == "out"]
    assert decisions == ["trained and sent", "stored reply sent again"]


def set_policy(file, text):
    file.write_text(file.read_text().partition("[policy]")[0] + f"[policy]\n{text}\n")


def test_a_stored_reply_is_cut_to_the_policy_of_now(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct", "us"]})
    first = ask(file, lambda: train_message(recipe))
    counts = {m: first.content["arrays"][f"prototype_counts/{m}"].numpy() for m in ("ct", "us")}
    least = int(min(rows.max() for rows in counts.values()))
    set_policy(file, f"send_metrics = false\nmin_patients_per_prototype = {least + 1}")
    again = ask(file, lambda: train_message(recipe))
    assert set(again.content["metrics"]) == {"round", "num_examples/ct", "num_examples/us"}
    for modality, rows in counts.items():
        kept = rows[rows > least].tolist()
        name = f"prototype_counts/{modality}"
        sent = again.content["arrays"].get(name)
        assert (sent.numpy().tolist() if sent else []) == kept
    set_policy(file, "send_prototypes = false")
    names = ask(file, lambda: train_message(recipe)).content["arrays"]
    assert not [name for name in names if name.startswith("prototype")]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("allowed_modalities = ['us']", "does not allow training on 'ct'"),
        ("min_images = 1000", "fewer than the 1000"),
        ("min_patients = 1000", "fewer than the 1000"),
        ("privacy = 'record'", "differential privacy of mode 'record'"),
    ],
)
def test_a_stored_reply_is_refused_if_the_policy_of_now_forbids_it(
    policy, reason, make_sites, recipe
):
    (file,) = make_sites({"st-mary": ["ct"]})
    assert ask(file, lambda: train_message(recipe)).has_content()
    set_policy(file, policy)
    reply = ask(file, lambda: train_message(recipe))
    assert reply.error.code == CLIENT_APP_ERROR
    assert reason in reply.error.reason


@pytest.mark.parametrize("kind", ["query", "training"])
def test_every_reply_passes_the_last_gate_before_it_leaves(kind, make_sites, recipe, monkeypatch):
    (file,) = make_sites({"st-mary": ["ct"]})

    def hold(*_):
        raise PolicyRefusal("held back")

    monkeypatch.setattr(f"client.app.hold_{kind}", hold)
    make = {"query": lambda: simple_message("query"), "training": lambda: train_message(recipe)}
    reply = ask(file, make[kind])
    assert reply.error.reason == "held back"
    assert audit(file)[-1]["decision"] == "not done: held back"


def simple_message(kind):
    config = ConfigRecord({"study": STUDY})
    return Message(RecordDict({"config": config}), FIRST_NODE_ID, kind)


def test_outside_the_hours_only_a_query_is_answered(make_sites, recipe, monkeypatch):
    (file,) = make_sites({"st-mary": ["ct"]}, policy="hours = ['mon-sun 08:00-09:00']\n")
    monkeypatch.setattr("client.policy.opens_at", lambda *_: datetime(2026, 11, 28, 8, 0))
    reply = ask(file, lambda: train_message(recipe))
    assert reply.error.code == NOT_NOW
    assert "ask again from 2026-11-28T08:00" in reply.error.reason
    assert ask(file, lambda: simple_message("query")).has_content()
    decisions = [line["decision"] for line in audit(file)]
    assert decisions[0] == "accepted for checking"
    assert decisions[1].startswith("not done: this site works mon-sun 08:00-09:00")


def test_a_run_with_another_bundle_is_refused_and_both_lines_name_it(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]}, policy=f"allowed_apps = ['{'ab' * 32}']\n")
    for message in (lambda: simple_message("query"), lambda: train_message(recipe)):
        for bundle, answered in (("cd" * 32, False), ("", False), ("ab" * 32, True)):
            grid = InProcessGrid(
                lambda message, context, bundle=bundle: respond(message, context, bundle),
                [{"site": str(file)}],
            )
            (reply,) = grid.send_and_receive([message()])
            assert reply.has_content() == answered
            incoming, outgoing = audit(file)[-2:]
            assert incoming["bundle"] == outgoing["bundle"] == bundle
            assert outgoing["decision"].startswith("not done: this site's policy does") != answered


def test_a_message_of_a_type_of_its_own_is_refused_and_audited(make_sites):
    (file,) = make_sites({"st-mary": ["ct"]})
    grid = InProcessGrid(respond, [{"site": str(file)}])
    (reply,) = grid.send_and_receive([simple_message("train.odd")])
    assert "answers messages of type query, train and evaluate alone" in reply.error.reason
    assert [line["direction"] for line in audit(file)] == ["in", "out"]


BAD_REQUESTS = {
    "step": ({"step": 5}, "round 1 starts at step 0 of the recipe, not at 5"),
    "round": ({"round": 3, "step": 4}, "round 3 is not one of the recipe's rounds 1 to 2"),
    "study": ({"study": "../.."}, "the study's id is not 8 to 64 hexadecimal digits"),
    "type": ({"round": "1"}, "'round' in the message is not of type int"),
    "key": ({"data_dir": "/etc"}, "does not hold exactly what a train message should"),
    "recipe": ({"recipe": '{"sed": 1}'}, "unknown key 'sed'"),
    "array": ({"arrays": {"x": Array(np.ones(1))}}, "an array that is not on the list"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_plain_words_and_audited(case, make_sites, recipe):
    changes, words = BAD_REQUESTS[case]
    (file,) = make_sites({"st-mary": ["ct"]})
    reply = ask(file, lambda: train_message(recipe, **changes))
    assert reply.has_error()
    assert words in reply.error.reason
    assert words in json.dumps(audit(file))
    assert [line["direction"] for line in audit(file)] == ["in", "out"]
    assert not list((file.parent / "state").glob("**/round-*"))


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_message_of_another_shape_and_the_answer_to_it_are_audited(kind, make_sites):
    (file,) = make_sites({"st-mary": ["ct"]})
    records = RecordDict({"arrays": ConfigRecord({}), "config": ConfigRecord({})})
    reply = ask(file, lambda: Message(records, FIRST_NODE_ID, kind))
    assert reply.has_error()
    incoming, outgoing = audit(file)
    assert (incoming["direction"], incoming["message"]) == ("in", kind)
    assert incoming["decision"].startswith("not understood: ")
    assert (outgoing["direction"], outgoing["message"]) == ("out", kind)
    assert outgoing["decision"].startswith("not done: ")


@pytest.mark.parametrize("direction", ["in", "out"])
def test_nothing_leaves_when_its_line_cannot_be_written(direction, make_sites, recipe, monkeypatch):
    (file,) = make_sites({"st-mary": ["ct"]})

    def fail(directory, line):
        if line["direction"] == direction:
            raise OSError(28, "No space left on device")
        append(directory, line)

    monkeypatch.setattr("client.audit.append", fail)
    reply = ask(file, lambda: train_message(recipe))
    assert not reply.has_content()
    assert reply.error.reason == "the site could not do this (OSError); its log says why"
    monkeypatch.undo()
    again = ask(file, lambda: train_message(recipe))
    assert set(again.content["arrays"]) == expected_arrays(recipe, ["ct"])
    assert read(file.parent / "state").problem == ""


def test_weights_that_do_not_fit_leave_no_trace_in_the_state(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]})
    name = "student/" + next(iter(initial_state(recipe).student))
    reply = ask(file, lambda: train_message(recipe, arrays={name: Array(np.ones(7))}))
    assert reply.has_error()
    assert not list((file.parent / "state").glob("**/round-*"))


def break_shard(file):
    (file.parent / "data" / "ct" / "table.csv").write_text("secret,patient\n")


def break_site_file(file):
    file.write_text("nonsense = [")


def remove_data(file):
    (file.parent / "data").rename(file.parent / "elsewhere")


@pytest.mark.parametrize("damage", [break_shard, break_site_file, remove_data])
def test_no_failure_tells_a_path_or_a_traceback(damage, make_sites, recipe, caplog):
    (file,) = make_sites({"st-mary": ["ct"]})
    damage(file)
    reply = ask(file, lambda: train_message(recipe))
    assert reply.error.reason == "the site could not do this (UserError); its log says why"
    assert str(file.parent) in caplog.text  # the operator is told
    if (file.parent / "state").exists():
        assert str(file.parent) not in json.dumps(audit(file))


def test_the_audit_file_names_no_patient_and_no_path(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]})
    ask(file, lambda: train_message(recipe))
    text = json.dumps(audit(file))
    assert str(file.parent) not in text
    assert not re.search(r"patient|\.npy|\.png", text)
    incoming, outgoing = audit(file)
    assert incoming["bytes"] > 0
    assert set(outgoing["arrays"]) == expected_arrays(recipe, ["ct"])
    assert re.fullmatch("[0-9a-f]{64}", outgoing["sha256"])


def test_a_gpu_that_is_not_there_is_an_error_of_the_site(make_sites, recipe, monkeypatch):
    (file,) = make_sites({"st-mary": ["ct"]})
    file.write_text(file.read_text().replace("device = 'cpu'", "device = 'cuda:63'"))
    reply = ask(file, lambda: train_message(recipe))
    assert "could not do this (UserError)" in reply.error.reason


def test_ray_nodes_find_their_site_file_by_number(make_sites, monkeypatch):
    files = make_sites({"b": ["ct"], "a": ["us"]})
    monkeypatch.setenv("FEDMERMED_SITES_DIR", str(files[0].parent.parent))
    grid = InProcessGrid(app, [{"partition-id": 0}, {"partition-id": 1}])
    config = ConfigRecord({"study": STUDY})
    replies = grid.send_and_receive(
        [Message(RecordDict({"config": config}), FIRST_NODE_ID + i, "query") for i in range(2)]
    )
    assert [reply.content["info"]["site"] for reply in replies] == ["a", "b"]


def test_a_round_that_is_over_is_not_begun_but_what_was_trained_is_sent(make_sites, recipe):
    """Questions pile up while a site trains for longer than the coordinator waits."""

    def late():
        message = train_message(recipe)
        message.metadata.__dict__["_created_at"] -= message.metadata.ttl + 1
        return message

    one, other = make_sites({"st-mary": ["ct"], "charite": ["ct"]})
    reply = ask(one, late)
    assert reply.error.reason == "round 1 was over before this site could begin with it"
    assert not (one.parent / "state" / "studies" / STUDY / "round-0001").exists()
    assert not ask(other, lambda: train_message(recipe)).has_error()
    assert not ask(other, late).has_error()


def test_an_array_of_objects_is_refused_unread(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]})
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", pickled.getvalue())
    reply = ask(file, lambda: train_message(recipe, arrays={"prototypes/ct": array}))
    assert reply.error.reason.startswith("an array in the message cannot be decoded: not an array")
