"""One bad site among good ones, through the real apps and our strategy."""

import json
import pickle

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict

from core.checkpoint import load_arrays
from core.wire import GlobalState
from server.app import app as server_app
from server.attendance import QuorumError
from server.engines import load_client_app, server_context
from server.grid import InProcessGrid
from server.history import open_run, read_history


class FaultyGrid(InProcessGrid):
    """Calls `fault` on every train reply of the last site; what it returns is what arrives."""

    def __init__(self, site_files, fault):
        super().__init__(load_client_app(), [{"site": str(file)} for file in site_files])
        self.fault = fault
        self.last = max(super().get_node_ids())

    def deliver(self, message):
        reply = super().deliver(message)
        is_last = message.metadata.dst_node_id == self.last
        if is_last and message.metadata.message_type == "train":
            return self.fault(message, reply)
        return reply


def run(tmp_path, recipe, grid, sites=0):
    open_run(tmp_path / "run", recipe)
    context = server_context(tmp_path / "run", [tmp_path] * sites)
    server_app(grid, context)
    return read_history(tmp_path / "run")


@pytest.fixture
def sites(make_sites):
    """Two good sites and one that will misbehave."""
    return make_sites({"charite": ["ct"], "karolinska": ["us"], "st-mary": ["ct", "oct"]})


def array(name, value):
    def fault(message, reply):
        reply.content["arrays"][name] = Array(np.asarray(value))
        return reply

    return fault


def metric(name, value):
    def fault(message, reply):
        reply.content["metrics"][name] = value
        return reply

    return fault


def nan(message, reply):
    name = next(iter(reply.content["arrays"]))
    values = reply.content["arrays"][name].numpy().copy()
    values.flat[0] = np.nan
    reply.content["arrays"][name] = Array(values)
    return reply


def missing(message, reply):
    del reply.content["arrays"][next(iter(reply.content["arrays"]))]
    return reply


def shape(message, reply):
    name = next(iter(reply.content["arrays"]))
    reply.content["arrays"][name] = Array(np.ones((3, 5, 7), np.float32))
    return reply


def garbage(message, reply):
    name = next(iter(reply.content["arrays"]))
    reply.content["arrays"][name] = Array("float32", (3,), "numpy.ndarray", b"not an array")
    return reply


def extra_record(message, reply):
    reply.content["patients"] = ConfigRecord({"name": "Jane Roe"})
    return reply


def no_records(message, reply):
    return Message(RecordDict({"metrics": MetricRecord({})}), reply_to=message)


def without_round(reply):
    del reply.content["metrics"]["round"]
    return reply


def oversized(message, reply):
    for number in range(3):
        for name, whole in list(message.content["arrays"].items()):
            reply.content["arrays"][f"{number}/{name}"] = whole
    return reply


def long_array(message, reply):
    name = next(iter(reply.content["arrays"]))
    reply.content["arrays"][name] = Array(np.ones(2_000_000, np.float32))
    return reply


def pickled(message, reply):
    name = next(iter(reply.content["arrays"]))
    whole = Array("object", (1,), "numpy.ndarray", pickle.dumps([1]))
    reply.content["arrays"][name] = whole
    return reply


def torn(message, reply):
    name, whole = next(iter(reply.content["arrays"].items()))
    data = whole.data[:-4]
    reply.content["arrays"][name] = Array("float32", whole.shape, "numpy.ndarray", data)
    return reply


def long_name(message, reply):
    reply.content["arrays"]["student/" + "x" * 10_000_000] = Array(np.ones(1, np.float32))
    return reply


REJECTED = {
    "other round": (metric("round", 2), "it answers round 2, not this one"),
    "no round": (lambda message, reply: without_round(reply), "'round' is missing"),
    "oversized": (oversized, "arrays, no update of this study has more than"),
    "long array": (long_array, "bytes of arrays, no update of this study has more than"),
    "long name": (long_name, "bytes of arrays, no update of this study has more than"),
    "long list": (metric("loss/ct", [1.0] * 1000), "metrics, no update of this study has more"),
    "pickled": (pickled, "cannot be decoded (no header of a numpy array"),
    "torn array": (torn, "bytes of numbers are not what its shape needs"),
    "nan": (nan, "is not finite"),
    "missing key": (missing, "is missing (1 missing in all)"),
    "wrong shape": (shape, "has shape (3, 5, 7), expected"),
    "undecodable": (garbage, "cannot be decoded"),
    "extra key": (array("student/spy", np.ones(2, np.float32)), "'student/spy' was not asked for"),
    "extra record": (extra_record, "not one 'arrays' and one 'metrics' record"),
    "no arrays": (no_records, "not one 'arrays' and one 'metrics' record"),
    "negative count": (metric("num_examples/ct", -4), "'num_examples/ct' is -4"),
    "huge count": (metric("num_examples/ct", 10**15), "'num_examples/ct' is 1000000000000000"),
    "negative patients": (
        array("prototype_counts/ct", np.full(3, -1, np.float32)), "counts of 'prototypes/ct'",
    ),
    "huge patients": (
        array("prototype_counts/ct", np.full(3, 1e20, np.float32)), "counts of 'prototypes/ct'",
    ),
    "unknown metric": (metric("mean_age", 61.0), "metric 'mean_age' is not on the list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_a_bad_update_is_rejected_by_site_name_and_the_round_completes(
    case, tmp_path, make_recipe, sites
):
    fault, reason = REJECTED[case]
    (line,) = run(tmp_path, make_recipe(rounds=1), FaultyGrid(sites, fault))
    outcome = line["sites"].pop("st-mary")
    assert outcome["outcome"] == "rejected"
    assert outcome["reason"].startswith("site 'st-mary', round 1: ")
    assert reason in outcome["reason"]
    assert {o["outcome"] for o in line["sites"].values()} == {"admitted"}
    arrays, _ = load_arrays(tmp_path / "run" / "round-0001.safetensors")
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_rejected_site_leaves_no_bit_in_the_result(tmp_path, make_recipe, sites):
    """The round equals one in which the bad site never was."""
    recipe = make_recipe(rounds=1)
    run(tmp_path / "bad", recipe, FaultyGrid(sites, nan))
    good = InProcessGrid(load_client_app(), [{"site": str(file)} for file in sites[:2]])
    run(tmp_path / "good", recipe, good)
    bad, good = (tmp_path / name / "run" / "round-0001.safetensors" for name in ("bad", "good"))
    for one, other in zip(both(bad), both(good), strict=True):
        assert one.tobytes() == other.tobytes()


def both(path):
    state = GlobalState.from_arrays(load_arrays(path)[0])
    return [*state.student.values(), *state.teacher.values()]


def test_a_silent_site_is_recorded_and_the_round_goes_on(tmp_path, recipe, sites):
    lines = run(tmp_path, recipe, FaultyGrid(sites, lambda message, reply: None))
    assert len(lines) == 2
    for line in lines:
        assert line["sites"]["st-mary"] == {
            "outcome": "silent", "reason": "no reply before the deadline",
        }  # fmt: skip


def test_a_site_whose_process_dies_is_asked_again_and_the_result_is_the_calm_one(
    tmp_path, make_recipe, sites
):
    recipe, deaths = make_recipe(rounds=1), ["ClientApp stopped responding", "Node unavailable"]
    left = list(deaths)

    def fault(message, reply):
        codes = {deaths[0]: 8, deaths[1]: 5}
        if not left:
            return reply
        reason = left.pop(0)
        return Message(Error(codes[reason], reason), reply_to=message)

    (line,) = run(tmp_path / "killed", recipe, FaultyGrid(sites, fault))
    assert line["sites"]["st-mary"]["outcome"] == "admitted"
    assert line["sites"]["st-mary"]["asked"] == 3
    assert line["sites"]["st-mary"]["failures"] == deaths
    assert "asked" not in line["sites"]["charite"]
    calm = make_calm(tmp_path, recipe, sites)
    assert (tmp_path / "killed" / "run" / "round-0001.safetensors").read_bytes() == calm


def make_calm(tmp_path, recipe, sites):
    for site in sites:  # as new sites: they have trained this round of another study
        assert (site.parent / "state" / "studies").exists()
    run(tmp_path / "calm", recipe, FaultyGrid(sites, lambda message, reply: reply))
    return (tmp_path / "calm" / "run" / "round-0001.safetensors").read_bytes()


def test_an_error_is_recorded_with_its_reason_and_made_printable(tmp_path, make_recipe, sites):
    def fault(message, reply):
        return Message(Error(2, "out of memory\n\x1b[31m" + "x" * 5000), reply_to=message)

    (line,) = run(tmp_path, make_recipe(rounds=1), FaultyGrid(sites, fault))
    outcome = line["sites"]["st-mary"]
    assert outcome["outcome"] == "error"
    assert outcome["reason"].startswith("out of memory")
    assert len(outcome["reason"]) <= 300
    assert outcome["reason"].isprintable()


def test_an_error_made_by_the_superlink_is_put_down_to_the_site_that_was_asked(
    tmp_path, make_recipe, sites
):
    def fault(message, reply):
        reply = Message(Error(5, "Node unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    (line,) = run(tmp_path, make_recipe(rounds=1), FaultyGrid(sites, fault))
    outcome = line["sites"]["st-mary"]
    assert (outcome["outcome"], outcome["reason"]) == ("error", "Node unavailable")
    assert (outcome["asked"], outcome["failures"]) == (5, 5 * ["Node unavailable"])


def test_a_policy_refusal_is_visible_to_the_coordinator(tmp_path, make_recipe, make_sites):
    files = make_sites({"charite": ["ct"], "karolinska": ["us"]})
    files += make_sites({"st-mary": ["oct"]}, policy="allowed_modalities = ['ct']\n")
    grid = InProcessGrid(load_client_app(), [{"site": str(file)} for file in files])
    (line,) = run(tmp_path, make_recipe(rounds=1), grid)
    outcome = line["sites"]["st-mary"]
    assert outcome["outcome"] == "error"
    assert outcome["reason"] == "this site's policy does not allow training on 'oct'"
    assert "asked" not in outcome  # a refusal is not asked again


def test_below_the_quorum_the_run_fails_and_keeps_its_last_checkpoint(tmp_path, make_recipe, sites):
    def second_round_only(message, reply):
        return reply if message.content["config"]["round"] == 1 else nan(message, reply)

    recipe = make_recipe(min_sites=3)
    with pytest.raises(
        QuorumError, match=r"round 2: 2 of 3 sites admitted, 3 needed \(site 'st-mary'"
    ):
        run(tmp_path, recipe, FaultyGrid(sites, second_round_only))
    assert [line["round"] for line in read_history(tmp_path / "run")] == [1]
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert "site 'st-mary', round 2: array 'student/" in failure["reason"]
    # Mended, the study goes on from round 1.
    lines = run(tmp_path, recipe, FaultyGrid(sites, lambda message, reply: reply))
    assert [line["round"] for line in lines] == [1, 2]


def test_too_few_connected_sites_fail_the_run_with_what_to_do(tmp_path, make_recipe, make_sites):
    files = make_sites({"charite": ["ct"]})
    grid = InProcessGrid(load_client_app(), [{"site": str(files[0])}, {"site": "/nowhere.toml"}])
    with pytest.raises(
        QuorumError, match=r"1 site\(s\) connected after 1 s, 2 needed; .*; start the"
    ):
        run(tmp_path, make_recipe(), grid)


def test_the_first_round_goes_on_with_the_quorum_when_expected_sites_do_not_come(
    tmp_path, make_recipe, make_sites
):
    files = make_sites({"charite": ["ct"], "karolinska": ["us"]})
    grid = InProcessGrid(load_client_app(), [{"site": str(file)} for file in files])
    lines = run(tmp_path, make_recipe(), grid, sites=3)
    assert len(lines) == 2


def test_of_two_sites_with_one_name_one_trains_and_the_other_is_recorded(
    tmp_path, make_recipe, make_sites
):
    files = make_sites({"charite": ["ct"], "karolinska": ["us"], "impostor": ["ct"]})
    files[2].write_text(files[2].read_text().replace('"impostor"', '"charite"'))
    grid = InProcessGrid(load_client_app(), [{"site": str(file)} for file in files])
    (line,) = run(tmp_path, make_recipe(rounds=1), grid)
    assert {site: o["outcome"] for site, o in line["sites"].items()} == {
        "charite": "admitted", "karolinska": "admitted",
    }  # fmt: skip
    assert line["refused_nodes"] == ["another node already answers as site 'charite'"]
    assert not (files[2].parent / "state" / "studies").exists()


class RepeatingGrid(FaultyGrid):
    """Hands the last site's reply over twice, and one that nobody was asked for."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        if replies and replies[-1].metadata.message_type == "train":
            stray = Message(RecordDict({}), reply_to=replies[0])
            replies += [replies[-1], stray]
        return replies


def test_a_site_that_answers_twice_counts_once(tmp_path, make_recipe, sites):
    recipe = make_recipe(rounds=1)
    run(tmp_path / "twice", recipe, RepeatingGrid(sites, lambda message, reply: reply))
    run(tmp_path / "once", recipe, FaultyGrid(sites, lambda message, reply: reply))
    twice, once = (tmp_path / name / "run" / "round-0001.safetensors" for name in ("twice", "once"))
    assert twice.read_bytes() == once.read_bytes()
