import itertools
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from client.policy import PolicyRefusal, Refusal
from client.state import StoredReply, open_state
from core.checkpoint import save_arrays, sha256_arrays
from core.wire import Prototypes, SiteUpdate


def update(value):
    return SiteUpdate(
        round_number=value,
        student={"w": np.full(3, value, np.float32)},
        teacher={"w": np.full(3, -value, np.float32)},
        prototypes=Prototypes({"ct": np.eye(2, dtype=np.float32)}, {"ct": np.full(2, 12.0)}),
        num_examples={"ct": 20},
        metrics={"loss/ct": 0.1 + value},
    )


@pytest.fixture
def state(tmp_path):
    """A site that has trained rounds 1 and 2."""
    state = open_state(tmp_path, "ab" * 16)
    with state.locked():
        for number in (1, 2):
            reply = StoredReply(update(number), {"ct": 12})
            state.commit(number, f"digest-{number}", reply, {"m": np.full(2, number)})
    return state


def test_a_stored_reply_comes_back_as_it_was(state):
    reply = state.stored_reply(2, "digest-2")
    assert reply.patients == {"ct": 12}
    stored = reply.update
    assert stored.to_metrics() == update(2).to_metrics()
    for name, array in update(2).to_arrays().items():
        assert stored.to_arrays()[name].tobytes() == array.tobytes()


def test_only_the_last_round_is_kept(state):
    assert [path.name for path in state.directory.glob("round-*")] == ["round-0002"]
    assert state.private()["m"].tolist() == [2, 2]


def test_a_new_round_has_no_reply_yet(state):
    assert state.stored_reply(3, "digest-3") is None
    assert state.stored_reply(9, "digest-9") is None  # a site may have been absent for rounds


def test_the_same_round_with_other_weights_is_refused(state):
    with pytest.raises(Refusal, match="round 2 was asked for again with other weights"):
        state.stored_reply(2, "digest-x")


def test_an_older_round_is_refused(state):
    with pytest.raises(Refusal, match="already at round 2 of this study; a site does not go back"):
        state.stored_reply(1, "digest-1")


def test_studies_do_not_see_each_other(state, tmp_path):
    other = open_state(tmp_path, "cd" * 16)
    assert other.last_round() == 0
    assert other.private() == {}


@pytest.mark.parametrize("study", ["", "..", "../../x", "ABCDEF0123", "ab" * 40, "abababab\n"])
def test_a_study_id_that_is_no_plain_name_is_refused(tmp_path, study):
    with pytest.raises(Refusal, match="hexadecimal"):
        open_state(tmp_path, study)


def test_killed_at_any_file_operation_the_state_can_be_loaded(state, kill_points):
    """Round 3's commit is killed before its 1st, 2nd, ... operation on the disk."""

    def commit():
        state.commit(3, "digest-3", StoredReply(update(3), {"ct": 12}), {"m": np.full(2, 3)})

    rounds = []
    for _ in kill_points(commit):
        last = state.last_round()
        reply = state.stored_reply(last, f"digest-{last}")
        assert reply.update.student["w"].tolist() == [last] * 3
        assert state.private()["m"].tolist() == [last, last]
        rounds.append(last)
    assert rounds[0] == 2
    assert rounds[-1] == 3
    assert rounds == sorted(rounds)
    assert [path.name for path in state.directory.glob("round-*")] == ["round-0003"]


def test_a_charged_round_is_paid_once_whatever_operation_on_the_disk_is_killed(
    state, tmp_path, kill_points
):
    """A reply of each try is another, as its noise is; only what is paid for may be kept."""
    paid, tries = tmp_path / "paid", itertools.count()

    def charged(number):
        return paid.read_text().split() if paid.exists() else []

    def pay(digest):
        with open(paid, "a") as file:
            file.write(digest + "\n")
            file.flush()
            os.fsync(file.fileno())

    def round_3(value):
        state.recover(charged)
        if state.last_round() < 3:
            reply = replace(update(3), student={"w": np.full(3, value, np.float32)})
            state.commit(3, "d", StoredReply(reply, {"ct": 12}), {"m": np.full(2, 3)}, pay)

    killed_after_payment = 0
    for killed in kill_points(lambda: round_3(next(tries))):
        # What a new process finds: an unpaid round is not there, a paid one is finished.
        killed_after_payment += bool(killed and charged(3) and state.last_round() == 2)
        state.recover(charged)
        assert state.last_round() == (3 if charged(3) else 2)
        assert len(charged(3)) <= 1
        if charged(3):
            kept = state.stored_reply(3, "d").update
            assert [sha256_arrays(kept.to_arrays())] == charged(3)
            if killed:  # begin anew, to be killed one operation later
                paid.unlink()
                shutil.rmtree(state.directory)
                with state.locked():
                    state.commit(2, "d", StoredReply(update(2), {"ct": 12}), {"m": np.zeros(2)})
    assert killed_after_payment >= 2
    assert state.last_round() == 3


def test_what_is_not_paid_for_stays_untrained(state):
    def refuse(digest):
        raise PolicyRefusal("no")

    with pytest.raises(PolicyRefusal):
        state.commit(3, "d", StoredReply(update(3), {"ct": 12}), {}, refuse)
    state.recover(lambda number: [])
    assert state.last_round() == 2


def test_a_reply_that_was_paid_for_is_not_taken_from_a_changed_file(state):
    def die(digest):
        paid.append(digest)
        raise KeyboardInterrupt

    paid: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        state.commit(3, "d", StoredReply(update(3), {"ct": 12}), {}, die)
    aside = next(state.directory.glob(".round-*"))
    save_arrays(aside / "reply.safetensors", update(9).to_arrays())
    state.recover(lambda number: paid)
    assert state.last_round() == 2
