"""Whole federations under site privacy: what is released, what it costs, who is killed."""

import shutil

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from core.checkpoint import load_arrays, read_json, sha256_file
from core.errors import UserError
from core.privacy.accounting import epsilon, round_events, study_events
from core.privacy.ledger import Ledger
from core.wire import GlobalState
from server.engines import run_in_process
from server.grid import InProcessGrid
from server.history import SITE_PROTOTYPES, open_run, read_history
from server.overview_reader import OverviewReader
from server.report import write_report
from server.study import run_study


class Sites(InProcessGrid):
    """Each changes what it was sent by a number of its own; `fault` does more to what "x" sends."""

    def __init__(self, *names, fault=lambda arrays: None):
        super().__init__(self.answer, [{"name": name} for name in names])
        self.fault, self.trained, self.received = fault, [], []

    def answer(self, message, context):
        name = context.node_config["name"]
        if message.metadata.message_type == "query":
            return Message(RecordDict({"info": ConfigRecord({"site": name})}), reply_to=message)
        sent = {n: a.numpy().copy() for n, a in message.content["arrays"].items()}
        self.received.append(sent)
        self.trained.append(name)
        moved = np.float32(ord(name) / 1e4)
        arrays = {n: a + moved for n, a in sent.items() if n.startswith("student/")}
        arrays["prototypes/ct"] = np.eye(16, dtype=np.float32)[:1]
        arrays["prototype_counts/ct"] = np.float32([9])
        if name == "x":
            self.fault(arrays)
        content = {
            "arrays": ArrayRecord({n: Array(a) for n, a in arrays.items()}),
            "metrics": MetricRecord(
                {"round": message.content["config"]["round"], "num_examples/ct": 20}
            ),
        }
        return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def make_run(tmp_path):
    """A run directory with a small initial state."""

    def make(recipe, name="run"):
        run = open_run(tmp_path / name, recipe)
        arrays = {"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)}
        run.load(lambda: GlobalState(student=arrays, teacher=dict(arrays)))
        return run

    return make


def test_real_training_ends_with_the_stated_epsilon_and_a_noised_model(
    tmp_path, make_site_recipe, make_sites
):
    recipe = make_site_recipe(noise_multiplier=3.0, delta=1e-3)
    run = open_run(tmp_path / "run", recipe)
    run_in_process(run.path, make_sites({"a": ["ct"], "b": ["us", "ct"], "c": ["oct"]}))
    lines = read_history(run.path)
    cost = round_events(recipe, 1)
    assert round_events(recipe, 2) == cost
    spent = [epsilon(cost, 1e-3), epsilon([*cost, *cost], 1e-3)]
    assert [line["metrics"]["epsilon"] for line in lines] == spent
    assert {site["weight"] for site in lines[-1]["sites"].values()} == {1 / 3}
    assert read_json(run.path / "privacy.json")["epsilon"] == spent[-1]
    ledger = Ledger(run.path / "ledger.jsonl")
    for number, line in enumerate(lines, 1):
        assert ledger.charged(run.study, number) == [line["sha256"]]

    before, _ = load_arrays(run.checkpoint_path(1))
    after, _ = load_arrays(run.checkpoint_path(2))
    assert not [name for name in after if name.startswith(SITE_PROTOTYPES)]
    # Three updates of length 1 at the most and noise of deviation 3 on each number, by 3 sites.
    moved = np.concatenate([
        (after[n].astype(np.float64) - before[n]).reshape(-1)
        for n in after if n.startswith("student/")
    ])  # fmt: skip
    assert abs(moved.std() - 1.0) < 0.02

    view = OverviewReader(run.path).read()
    assert (view.privacy.mode, view.privacy.spent, view.privacy.planned) == (
        "site", spent[-1], spent[-1],
    )  # fmt: skip
    write_report(run.path, tmp_path / "report.html")
    assert f"({spent[-1]:.2f}, 0.001)-differentially" in (tmp_path / "report.html").read_text()


def test_sites_are_sent_releases_alone(make_run, make_site_recipe):
    recipe = make_site_recipe({"rounds": 3}, sites=3)
    run, sites = make_run(recipe), Sites("a", "b", "c")
    run_study(sites, recipe, run.path)
    assert len(sites.received) == 9
    for index, sent in enumerate(sites.received):
        released, _ = load_arrays(run.checkpoint_path(index // 3))
        assert set(sent) == {name for name in released if not name.startswith("prototype")}
        assert all((sent[name] == released[name]).all() for name in sent)


def test_killed_at_any_operation_a_study_ends_with_each_round_paid_for_once(
    make_run, make_site_recipe, kill_points
):
    recipe = make_site_recipe({"rounds": 2, "min_sites": 2}, sites=2)
    run = make_run(recipe)
    begun = run.path.with_name("begun")
    shutil.copytree(run.path, begun)
    deaths = 0
    for killed in kill_points(lambda: run_study(Sites("a", "b"), recipe, run.path)):
        deaths += killed
        run_study(Sites("a", "b"), recipe, run.path)
        ledger = Ledger(run.path / "ledger.jsonl")
        for number, line in enumerate(read_history(run.path), 1):
            assert ledger.charged(run.study, number) == [line["sha256"]]
            assert sha256_file(run.checkpoint_path(number)) == line["sha256"]
        assert len(read_history(run.path)) == 2
        one_shot = epsilon(study_events(recipe), recipe.privacy.delta)
        assert epsilon(ledger.events(run.study), recipe.privacy.delta) == one_shot
        assert read_history(run.path)[-1]["metrics"]["epsilon"] == one_shot
        shutil.rmtree(run.path)
        shutil.copytree(begun, run.path)
    assert deaths > 20


def test_a_finished_study_that_is_run_again_costs_nothing(make_run, make_site_recipe):
    recipe = make_site_recipe(sites=2)
    run = make_run(recipe)
    run_study(Sites("a", "b"), recipe, run.path)
    ledger = (run.path / "ledger.jsonl").read_bytes()
    run_study(Sites("a", "b"), recipe, run.path)
    assert (run.path / "ledger.jsonl").read_bytes() == ledger


def test_more_sites_than_the_recipe_says_are_refused_before_they_train(make_run, make_site_recipe):
    recipe = make_site_recipe(sites=3)
    run, sites = make_run(recipe), Sites("a", "b", "c", "d")
    with pytest.raises(UserError, match="round 1: 4 sites take part, but noise and divisor are"):
        run_study(sites, recipe, run.path)
    assert sites.trained == []
    assert not run.checkpoint_path(1).exists()


def test_an_update_that_is_not_finite_is_rejected_by_name_and_the_round_goes_on(
    make_run, make_site_recipe
):
    def poison(arrays):
        arrays["student/b"][2] = np.nan

    recipe = make_site_recipe(sites=3)
    run = make_run(recipe)
    run_study(Sites("a", "b", "x", fault=poison), recipe, run.path)
    outcome = read_history(run.path)[-1]["sites"]["x"]
    assert outcome["outcome"] == "rejected"
    assert "array 'student/b' is not finite" in outcome["reason"]
    state = run.load(lambda: None).state
    assert all(np.isfinite(array).all() for array in state.student.values())


def test_a_copy_counts_as_any_update_so_that_no_site_decides_whether_another_counts(
    make_run, make_site_recipe
):
    def copy(arrays):  # what site "a" sends
        for name in ("student/a", "student/b"):
            arrays[name] += np.float32(ord("a") / 1e4) - np.float32(ord("x") / 1e4)

    recipe = make_site_recipe({"rounds": 1}, sites=3, noise_multiplier=1e-9)
    run = make_run(recipe)
    run_study(Sites("a", "x", fault=copy), recipe, run.path)
    outcomes = read_history(run.path)[-1]["sites"].values()
    assert [outcome["outcome"] for outcome in outcomes] == ["admitted"] * 2
    state = run.load(lambda: None).state
    np.testing.assert_allclose(state.student["b"], 2 * ord("a") / 1e4 / 3, rtol=1e-5)
