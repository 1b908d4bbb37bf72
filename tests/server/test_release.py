"""A round under site privacy is paid for before it is released, and once, whoever is killed."""

import json
import shutil

import numpy as np
import pytest

from core.checkpoint import sha256_file
from core.errors import UserError
from core.privacy.accounting import epsilon, round_events
from core.privacy.ledger import Ledger
from core.privacy.noise import PrivateRandom
from core.wire import GlobalState
from server import release
from server.history import Checkpoint, open_run, read_history
from server.release import commit, finish_release, spent_epsilon

ROUNDS = 3


@pytest.fixture
def recipe(make_site_recipe):
    return make_site_recipe({"rounds": ROUNDS}, noise_multiplier=2.0)


def initial():
    arrays = {"w": np.zeros(4, np.float32)}
    return GlobalState(student=arrays, teacher=arrays)


def next_round(run, checkpoint, recipe):
    """A round whose noise is new each time, as a server draws it."""
    number = checkpoint.round_number + 1
    arrays = {"w": PrivateRandom().normal(4).astype(np.float32)}
    checkpoint = Checkpoint(number, GlobalState(student=arrays, teacher=arrays), {})
    return commit(run, recipe, checkpoint, {"round": number, "metrics": {"loss/ct": 1.0}})


def go_on(path, recipe, rounds=ROUNDS):
    """What a server does when it is started, again and again."""
    run = open_run(path, recipe)
    finish_release(run, recipe)
    while (checkpoint := run.load(initial)).round_number < rounds:
        next_round(run, checkpoint, recipe)


def cost(recipe, rounds):
    """Epsilon of so many rounds, accounted for at once."""
    events = [e for number in range(1, rounds + 1) for e in round_events(recipe, number)]
    return epsilon(events, recipe.privacy.delta)


def charges(run, number):
    return Ledger(run.path / "ledger.jsonl").charged(run.study, number)


def digest(run, number):
    return sha256_file(run.checkpoint_path(number))


def test_a_round_is_charged_under_the_digest_of_its_checkpoint(tmp_path, recipe):
    go_on(tmp_path / "run", recipe)
    run = open_run(tmp_path / "run", recipe)
    lines = read_history(run.path)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert charges(run, line["round"]) == [line["sha256"]] == [digest(run, line["round"])]
        assert line["metrics"]["loss/ct"] == 1.0
    assert not list(run.path.glob("prepared*"))


def test_the_history_tells_the_epsilon_of_all_rounds_so_far(tmp_path, recipe):
    go_on(tmp_path / "run", recipe)
    told = [line["metrics"]["epsilon"] for line in read_history(tmp_path / "run")]
    assert told == [cost(recipe, rounds) for rounds in (1, 2, 3)]
    assert told == sorted(told)
    assert spent_epsilon(open_run(tmp_path / "run", recipe), recipe) == told[-1]


def test_killed_at_any_operation_nothing_is_released_unpaid_and_nothing_is_paid_twice(
    tmp_path, recipe, kill_points
):
    begun = tmp_path / "begun"
    go_on(begun, recipe, rounds=1)
    recovered, redone, path = 0, 0, tmp_path / "run"
    shutil.copytree(begun, path)
    for _ in kill_points(lambda: go_on(path, recipe, rounds=2)):
        run = open_run(path, recipe)
        prepared = (path / "prepared.json").exists() and json.loads(
            (path / "prepared.json").read_text()
        )["sha256"]
        if run.checkpoint_path(2).exists():  # released: then it is paid for
            assert charges(run, 2) == [digest(run, 2)]
        for line in read_history(path):
            assert charges(run, line["round"]) == [line["sha256"]]
        go_on(path, recipe)
        for number in (1, 2, 3):
            assert charges(run, number) == [digest(run, number)]
        if prepared and len(read_history(path)) > 1:
            same = digest(run, 2) == prepared
            recovered, redone = recovered + same, redone + (not same)
        spent = Ledger(path / "ledger.jsonl").events(run.study)
        assert epsilon(spent, recipe.privacy.delta) == cost(recipe, ROUNDS)
        assert not list(path.glob("prepared*"))
        shutil.rmtree(path)
        shutil.copytree(begun, path)
    assert recovered >= 3
    assert redone == 0  # whatever was prepared whole is what was released


def test_what_was_not_prepared_whole_is_drawn_anew_and_costs_nothing(tmp_path, recipe):
    go_on(tmp_path / "run", recipe, rounds=1)
    run = open_run(tmp_path / "run", recipe)
    run.save(Checkpoint(2, initial(), {}), run.path / release.STATE)  # killed before the line
    go_on(tmp_path / "run", recipe, rounds=2)
    assert charges(run, 2) == [digest(run, 2)]


def test_a_round_done_again_because_of_a_damaged_checkpoint_is_charged_again(tmp_path, recipe):
    go_on(tmp_path / "run", recipe, rounds=2)
    run = open_run(tmp_path / "run", recipe)
    run.checkpoint_path(2).write_bytes(b"damaged")
    go_on(tmp_path / "run", recipe)
    assert len(charges(run, 2)) == 2
    assert charges(run, 2)[-1] == digest(run, 2)
    events = [e for number in (1, 2, 2, 3) for e in round_events(recipe, number)]
    assert read_history(run.path)[-1]["metrics"]["epsilon"] == epsilon(events, 1e-5)


def test_without_a_ledger_that_can_be_written_nothing_is_released(tmp_path, recipe, monkeypatch):
    go_on(tmp_path / "run", recipe, rounds=1)
    run = open_run(tmp_path / "run", recipe)

    def full(*_args, **_options):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "charge", full)
        with pytest.raises(UserError, match="the disk is full"):
            go_on(run.path, recipe, rounds=2)
    assert not run.checkpoint_path(2).exists()
    assert len(read_history(run.path)) == 1
    prepared = sha256_file(run.path / release.STATE)
    go_on(run.path, recipe, rounds=2)
    assert charges(run, 2) == [prepared] == [digest(run, 2)]


def test_a_study_without_privacy_keeps_no_ledger(tmp_path, make_recipe):
    go_on(tmp_path / "run", make_recipe(rounds=2), rounds=2)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert "epsilon" not in read_history(tmp_path / "run")[-1]["metrics"]
