"""Hostile updates against the real strategy: six honest sites, one that will harm the model.

Sites here draw their updates at random about a common direction, so that many rounds take seconds;
what real training sends is measured by benchmarks/hostile_updates.py.
"""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from core.checkpoint import load_arrays, read_json
from core.wire import GlobalState
from server.attendance import QuorumError
from server.grid import InProcessGrid
from server.history import open_run, read_history
from server.quarantine import manage
from server.strategy import FederatedMemory
from server.study import run_study

SHAPES = {"block.weight": (40, 30), "block.bias": (40,)}
HOSTILE = "x"
NAMES = ("a", "b", "c", "d", "e", "f", HOSTILE)


def direction(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {
        f"{group}/{name}": (size * rng.normal(size=shape)).astype(np.float32)
        for group in ("student", "teacher")
        for name, shape in SHAPES.items()
    }


class Sites(InProcessGrid):
    """`fault(round, sent, arrays, metrics)` changes in place what the hostile site sends."""

    def __init__(self, fault=None, names=NAMES):
        super().__init__(self.answer, [{"name": name} for name in names])
        self.fault = fault
        self.asked = []

    def answer(self, message, context):
        name = context.node_config["name"]
        if message.metadata.message_type == "query":
            return Message(RecordDict({"info": ConfigRecord({"site": name})}), reply_to=message)
        round_number = message.content["config"]["round"]
        self.asked.append((round_number, name))
        sent = {n: a.numpy() for n, a in message.content["arrays"].items()}
        common, own = direction(0, 0.01), direction([round_number, NAMES.index(name)], 0.015)
        arrays = {n: sent[n] + common[n] + own[n] for n in common}
        rows = np.eye(16, dtype=np.float32)[[0, 1 + NAMES.index(name)]]
        arrays |= {"prototypes/ct": rows, "prototype_counts/ct": np.full(2, 9, np.float32)}
        metrics = {"round": round_number, "num_examples/ct": 20 + NAMES.index(name)}
        if self.fault and name == HOSTILE:
            self.fault(round_number, sent, arrays, metrics)
        content = {
            "arrays": ArrayRecord({n: Array(a) for n, a in arrays.items()}),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def federate(tmp_path, make_recipe):
    """Run a study with six honest sites and a fault; returns its history and last arrays."""

    def run(name, fault=None, names=NAMES, **federation):
        path, recipe = tmp_path / name, make_recipe(**{"rounds": 4, **federation})
        open_run(path, recipe).load(begin)
        run_study(Sites(fault, names), recipe, path)
        lines = read_history(path)
        return lines, load_arrays(path / f"round-{len(lines):04d}.safetensors")[0]

    return run


def begin():
    start = direction(1)
    return GlobalState(
        student={n: start[f"student/{n}"] for n in SHAPES},
        teacher={n: start[f"teacher/{n}"] for n in SHAPES},
    )


def weights(arrays):
    return {n: a for n, a in arrays.items() if n.startswith(("student/", "teacher/"))}


def distance(one, other):
    return float(
        np.sqrt(sum(np.square(one[n].astype(np.float64) - other[n]).sum() for n in weights(one)))
    )


def scaled(factor):
    def fault(round_number, sent, arrays, metrics):
        for name in weights(arrays):
            arrays[name] = (sent[name] + factor * (arrays[name] - sent[name])).astype(np.float32)

    return fault


class Replay:
    """Sends the first round's student for ever, under the number of the round."""

    first = None

    def __call__(self, round_number, sent, arrays, metrics):
        self.first = self.first or dict(arrays)
        arrays.update(self.first)


class OldReply(Replay):
    """The same, with everything as it was."""

    def __call__(self, round_number, sent, arrays, metrics):
        super().__call__(round_number, sent, arrays, metrics)
        metrics["round"] = 1


def nan(round_number, sent, arrays, metrics):
    arrays["student/block.bias"] = np.full(40, np.nan, np.float32)


def flood(count):
    def fault(round_number, sent, arrays, metrics):
        rows = np.random.default_rng(0).normal(size=(3, 16))
        rows /= np.linalg.norm(rows, axis=1)[:, None]
        arrays["prototypes/ct"] = rows.astype(np.float32)
        arrays["prototype_counts/ct"] = np.full(3, count, np.float32)

    return fault


def copy(round_number, sent, arrays, metrics):
    """What site a sends in the same round."""
    common, own = direction(0, 0.01), direction([round_number, 0], 0.015)
    arrays.update({n: sent[n] + common[n] + own[n] for n in common})


REJECTED = {
    "nan": (nan, 1, "is not finite"),
    "replay": (Replay(), 2, "it sent the student that site 'x' sent in round 1"),
    "old reply": (OldReply(), 2, "it answers round 1, not this one"),
    "copy": (copy, 1, "it sent the same student as site 'a'"),
    "flood of counts": (flood(15), 1, "sum to 45, more than the memory's 32 entries"),
    "very long": (scaled(1e5), 1, "(federation.max_update_norm)"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_rejected_is_rejected_by_name_and_every_round_completes(case, federate):
    fault, since, reason = REJECTED[case]
    lines, arrays = federate(case, fault, quarantine_after=0)
    assert len(lines) == 4
    for line in lines[since - 1 :]:
        outcome = line["sites"][HOSTILE]
        assert outcome["outcome"] == "rejected"
        assert outcome["reason"].startswith(f"site 'x', round {line['round']}: ")
        assert reason in outcome["reason"]
        assert sum(o["outcome"] == "admitted" for o in line["sites"].values()) >= 5
    assert all(np.isfinite(a).all() for a in arrays.values())


@pytest.mark.parametrize("case", ["nan", "flood of counts", "very long"])
def test_what_is_rejected_leaves_no_bit(case, federate):
    _, arrays = federate(case, REJECTED[case][0], quarantine_after=0)
    _, without = federate("without", names=NAMES[:-1])
    for name in arrays:
        assert arrays[name].tobytes() == without[name].tobytes()


@pytest.mark.parametrize("factor", [100, -100])
def test_a_long_update_is_cut_reported_by_name_and_does_little(factor, federate):
    lines, arrays = federate("bounded", scaled(factor), quarantine_after=0)
    _, honest = federate("honest", quarantine_after=0)
    _, plain = federate("plain", scaled(factor), robust="none", quarantine_after=0)
    assert all(
        line["sites"][HOSTILE]["scaled_by"] == pytest.approx(0.03, rel=0.1) for line in lines
    )
    assert all({o["site"] for o in line["outliers"]} == {HOSTILE} for line in lines)
    assert distance(arrays, honest) < 0.06 * distance(plain, honest)


def test_a_flipped_update_is_reported_by_name(federate, caplog):
    lines, _ = federate("flipped", scaled(-1), quarantine_after=0, rounds=4)
    assert [len(line["outliers"]) for line in lines] == [0, 0, 1, 1]  # it has to last
    for line in lines[2:]:
        (outlier,) = line["outliers"]
        assert (outlier["site"], outlier["figure"]) == (HOSTILE, "cosine")
        assert f"round {line['round']}: {outlier['words']}" in caplog.text


def test_a_trimmed_mean_bounds_what_a_long_update_does(federate):
    recipe = {"robust": "trimmed_mean", "min_sites": 5, "quarantine_after": 0}
    lines, arrays = federate("trimmed", scaled(-100), **recipe)
    _, honest = federate("honest", **recipe)
    _, plain = federate("plain", scaled(-100), robust="none", quarantine_after=0)
    assert distance(arrays, honest) < 0.03 * distance(plain, honest)
    assert "scaled_by" not in lines[0]["sites"][HOSTILE]


def test_honest_bits_are_those_of_the_plain_mean(federate):
    lines, bounded = federate("bounded")
    _, plain = federate("plain", robust="none")
    assert all(line["outliers"] == [] for line in lines)
    for name in plain:
        assert bounded[name].tobytes() == plain[name].tobytes()


def test_a_flood_of_prototypes_within_the_limits_weighs_little(federate):
    _, arrays = federate("flood", flood(10))
    own = arrays["site_prototype_counts/x/ct"].sum()
    merged = arrays["prototype_counts/ct"].sum()
    assert own == 30
    assert own / merged < 3 / (3 + 6)


def test_a_site_is_put_into_quarantine_and_asked_again_when_it_is_released(tmp_path, make_recipe):
    path, recipe = tmp_path / "run", make_recipe(rounds=9, quarantine_after=3)
    run = open_run(path, recipe)
    checkpoint = run.load(begin)
    grid = Sites(scaled(-50))
    FederatedMemory(recipe, run, checkpoint).start(grid, ArrayRecord(), num_rounds=5)
    lines = read_history(path)
    assert [r for r, name in grid.asked if name == HOSTILE] == [1, 2, 3]
    outcome = lines[3]["sites"][HOSTILE]
    assert outcome["outcome"] == "quarantined"
    assert outcome["reason"].startswith("3 bad rounds in a row, the last: round 3: site 'x': its ")
    assert list(read_json(path / "quarantine.json")["held"]) == [HOSTILE]
    # Its prototypes go with it.
    arrays, _ = load_arrays(path / "round-0004.safetensors")
    assert not any(name.startswith("site_prototypes/x/") for name in arrays)

    manage(path, HOSTILE, release=True)  # while the study stands, or runs
    manage(path, "a", release=False)
    grid = Sites()
    run_study(grid, recipe, path)
    lines = read_history(path)
    assert [r for r, name in grid.asked if name == HOSTILE] == [6, 7, 8, 9]
    assert "a" not in {name for _, name in grid.asked}
    assert lines[5]["sites"][HOSTILE]["outcome"] == "admitted"
    assert lines[5]["sites"]["a"]["reason"] == "put there by the coordinator after round 5"


def test_quarantine_counts_against_the_quorum_and_the_run_says_so(tmp_path, make_recipe):
    path, recipe = tmp_path / "run", make_recipe(min_sites=7, robust="none")
    open_run(path, recipe).load(begin)
    manage(path, HOSTILE, release=False)
    with pytest.raises(QuorumError, match=r"6 site.* 7 needed; site 'x' is in quarantine"):
        run_study(Sites(), recipe, path)


def test_a_resumed_study_holds_the_same_sites_and_ends_with_the_same_bits(
    tmp_path, make_recipe, federate
):
    _, calm = federate("calm", scaled(-50), rounds=6)
    path, recipe = tmp_path / "cut", make_recipe(rounds=6)
    for rounds in (3, 4, 6):
        run = open_run(path, recipe)
        strategy = FederatedMemory(recipe, run, run.load(begin))
        strategy.start(Sites(scaled(-50)), ArrayRecord(), num_rounds=rounds)
        (path / "quarantine.json").unlink(missing_ok=True)  # as if the kill came before it
    arrays, _ = load_arrays(path / "round-0006.safetensors")
    assert read_history(path)[5]["sites"][HOSTILE]["outcome"] == "quarantined"
    for name in calm:
        assert arrays[name].tobytes() == calm[name].tobytes()
