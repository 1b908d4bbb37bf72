"""A lock file tells a process that lives from one that was killed."""

import fcntl
import os

from core.lock import held


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path):
    lock = tmp_path / "lock"
    assert not held(lock)
    with open(lock, "w") as file:
        assert not held(lock)
        fcntl.flock(file, fcntl.LOCK_EX)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if held(lock) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not held(lock)
