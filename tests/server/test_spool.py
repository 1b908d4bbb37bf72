import errno
import tempfile

import numpy as np
import pytest

from core.errors import UserError
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.aggregate import aggregate
from server.spool import Spool


def update(rng, images):
    student = {
        "matrix": rng.normal(size=(3, 5)).astype(np.float32),
        "transposed": rng.normal(size=(4, 2)).astype(np.float32).T,
        "scalar": np.array(rng.normal(), np.float32),
        "nothing": np.zeros((0, 7), np.float32),
    }
    return SiteUpdate(
        round_number=1,
        student=student,
        teacher={name: -array for name, array in student.items()},
        prototypes=Prototypes({}, {}),
        num_examples={"ct": images},
        metrics={"loss/ct": 1.0},
    )


def test_spooled_arrays_come_back_bit_for_bit_as_often_as_they_are_asked_for(tmp_path):
    rng, spool = np.random.default_rng(0), Spool(tmp_path)
    updates = [update(rng, 9), update(rng, 8)]
    spooled = [spool.put(one) for one in updates]
    for _ in range(2):
        for one, other in zip(reversed(updates), reversed(spooled), strict=True):
            assert other.metrics == one.metrics
            for group, again in ((one.student, other.student), (one.teacher, other.teacher)):
                assert list(again) == list(group)
                assert len(again) == len(group)
                for name, array in group.items():
                    assert again[name].shape == array.shape
                    assert again[name].dtype == np.float32
                    assert again[name].tobytes() == array.tobytes()


def test_a_teacher_that_is_not_sent_stays_absent(tmp_path):
    one = update(np.random.default_rng(0), 9)
    spooled = Spool(tmp_path).put(SiteUpdate(**{**vars(one), "teacher": {}}))
    assert not spooled.teacher


def test_the_spool_has_no_name_that_a_killed_server_could_leave_behind(tmp_path):
    spooled = Spool(tmp_path).put(update(np.random.default_rng(0), 9))
    assert list(tmp_path.iterdir()) == []
    assert spooled.student["matrix"].shape == (3, 5)


def test_updates_on_disk_give_the_bits_of_updates_in_memory(tmp_path, recipe):
    rng, spool = np.random.default_rng(1), Spool(tmp_path)
    updates = {name: update(rng, int(rng.integers(5, 99))) for name in "badce"}
    zero = {name: np.zeros_like(array) for name, array in updates["a"].student.items()}
    state = GlobalState(student=zero, teacher=zero)
    spooled = {name: spool.put(one) for name, one in updates.items()}
    one, _, weights = aggregate(recipe, state, {}, updates, round_number=1)
    other, _, same = aggregate(recipe, state, {}, spooled, round_number=1)
    assert weights == same
    for name, array in one.to_arrays().items():
        assert array.tobytes() == other.to_arrays()[name].tobytes(), name


def test_a_full_disk_is_reported_with_what_to_do(tmp_path, monkeypatch):
    def full(dir):
        return open("/dev/full", "r+b", buffering=0)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    words = rf"cannot hold the updates of a round: .Errno {errno.ENOSPC}. .*; make room and run"
    with pytest.raises(UserError, match=words):
        Spool(tmp_path).put(update(np.random.default_rng(0), 9))
