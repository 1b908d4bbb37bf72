import json
import os
import signal

import numpy as np
import pytest

from core.errors import UserError
from core.wire import GlobalState, Prototypes
from server.history import Checkpoint, open_run, read_history


def state(value):
    arrays = {"w": np.full(4, value, np.float32)}
    return GlobalState(student=arrays, teacher=arrays)


def contributions(value):
    return {"st-mary": Prototypes({"ct": np.full((1, 2), value)}, {"ct": np.array([12.0])})}


def never():
    raise AssertionError("the initial state is made once")


@pytest.fixture
def run(tmp_path, recipe):
    """A run with two rounds done."""
    run = open_run(tmp_path / "run", recipe)
    run.load(lambda: state(0))
    for number in (1, 2):
        run.commit(Checkpoint(number, state(number), contributions(number)), {"round": number})
    return run


def test_a_run_goes_on_where_it_stood(run, recipe):
    again = open_run(run.path, recipe)
    checkpoint = again.load(never)
    assert again.study == run.study
    assert checkpoint.round_number == 2
    assert checkpoint.state.student["w"].tolist() == [2.0] * 4
    assert checkpoint.contributions["st-mary"].centroids["ct"].tolist() == [[2.0, 2.0]]
    assert checkpoint.contributions["st-mary"].counts["ct"].tolist() == [12.0]


def test_a_torn_last_line_is_dropped(run):
    history = run.path / "history.jsonl"
    whole = history.read_text()
    history.write_text(whole + '{"round": 3, "sha2')
    assert run.load(never).round_number == 2
    assert history.read_text() == whole


@pytest.mark.parametrize("damage", ["half", "missing"])
def test_a_round_without_its_intact_checkpoint_is_done_again(run, damage):
    path = run.checkpoint_path(2)
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[: len(data) // 2])
    assert run.load(never).round_number == 1
    assert [line["round"] for line in read_history(run.path)] == [1]


def test_equal_states_give_equal_files(run, tmp_path, recipe):
    other = open_run(tmp_path / "other", recipe)
    other.commit(Checkpoint(2, state(2), contributions(2)), {"round": 1, "seconds": 99})
    assert other.study != run.study
    assert other.checkpoint_path(2).read_bytes() == run.checkpoint_path(2).read_bytes()


def test_another_recipe_is_refused_with_the_key_that_differs(run, make_recipe):
    with pytest.raises(UserError, match=r"'federation.local_steps' is 2 there and 9 here; give"):
        open_run(run.path, make_recipe(local_steps=9))


def test_two_servers_cannot_hold_one_run(run):
    with run.locked(), pytest.raises(UserError, match="another process is working"):  # noqa: SIM117
        with run.locked():
            pass


def test_a_failure_is_left_to_read_and_cleared_when_the_run_goes_on(run, recipe):
    run.fail("round 3: quorum")
    told = json.loads((run.path / "failure.json").read_text())
    assert told == {"reason": "round 3: quorum", "final": True}
    open_run(run.path, recipe)
    assert not (run.path / "failure.json").exists()


def test_killed_at_any_file_operation_a_run_can_be_resumed(run, recipe, kill_points):
    """The third round's commit is killed before its 1st, 2nd, ... operation on the disk."""

    def commit():
        run.commit(Checkpoint(3, state(3), contributions(3)), {"round": 3})

    outcomes = [open_run(run.path, recipe).load(never).round_number for _ in kill_points(commit)]
    assert outcomes[0] == 2
    assert outcomes[-1] == 3
    assert outcomes == sorted(outcomes)


def test_a_checkpoint_survives_the_death_of_its_writer(run):
    child = os.fork()
    if child == 0:
        run.commit(Checkpoint(3, state(3), {}), {"round": 3})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert run.load(never).round_number == 3


def test_checkpoints_between_those_that_the_recipe_keeps_go_but_for_the_last_three(
    tmp_path, make_recipe
):
    recipe = make_recipe(keep_every=4, rounds=20)
    run = open_run(tmp_path / "run", recipe)
    run.load(lambda: state(0))
    for number in range(1, 11):
        run.commit(Checkpoint(number, state(number), {}), {"round": number})
    kept = sorted(int(f.stem[-4:]) for f in run.path.glob("round-*.safetensors"))
    assert kept == [0, 4, 8, 9, 10]
    run.checkpoint_path(10).write_bytes(b"")
    assert open_run(run.path, recipe).load(never).round_number == 9
