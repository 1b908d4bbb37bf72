"""The SuperNode that looks more often than Flower's own."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from flwr.supernode import start_client_internal as flower

from client.guard import FIRST_PAUSE_SECONDS
from client.parts import python_path
from client.pauses import Pauses
from client.supernode import look_sooner
from core.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """A clock that sleeping moves; returns the sleeps."""
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    return slept


def test_a_pause_is_a_tenth_of_the_wait_and_never_longer_than_flowers(clock):
    pauses = Pauses()
    for _ in range(60):
        pauses.sleep(3)
    assert clock[:10] == pytest.approx([0.3] * 10)  # ten looks in the first three seconds
    waited = sum(clock[:20])
    assert clock[20] == pytest.approx(waited / 10)
    assert clock[-1] == 3
    assert sorted(clock) == clock


def test_another_wait_begins_with_short_pauses_again(clock):
    pauses = Pauses()
    for seconds in (*[3] * 60, 0.5, *[0.5] * 60, 3):
        pauses.sleep(seconds)
    assert clock[60] == pytest.approx(0.05)
    assert clock[-2] == 0.5
    assert clock[-1] == pytest.approx(0.3)


def test_the_installed_flower_sleeps_where_we_know_it():
    copy = SimpleNamespace(**vars(flower))
    look_sooner(copy)
    assert isinstance(copy.time, Pauses)
    assert copy.pull_objects.keywords == {"initial_backoff": FIRST_PAUSE_SECONDS}
    # All that its loop takes from the module `time`.
    for code in (flower.start_client_internal.__code__, flower._push_messages.__code__):
        inner = [c for c in code.co_consts if hasattr(c, "co_names")]
        for each in (code, *inner):
            after = [b for a, b in zip(each.co_names, each.co_names[1:], strict=False)
                     if a == "time"]  # fmt: skip
            assert set(after) <= {"sleep"}


def test_a_flower_that_sleeps_elsewhere_is_refused(monkeypatch):
    for caller in ("start_client_internal", "_push_messages"):
        for other in (lambda: None, None):
            copy = SimpleNamespace(**vars(flower) | {caller: other, "__name__": "copy"})
            with pytest.raises(UserError, match=rf"has no pause in 'copy.{caller}'; install Flow"):
                look_sooner(copy)
            assert copy.time is time
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.42.0")
    with pytest.raises(UserError, match=r"Flower 1.42.0 is installed"):
        look_sooner(SimpleNamespace(**vars(flower)))


def test_it_takes_the_arguments_of_flowers_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "client.supernode", "--help"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(os.environ)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--auth-supernode-private-key" in done.stdout


def test_a_heartbeat_that_fails_for_good_ends_the_process():
    program = """
import time
from client.supernode import end_with_any_thread
from flwr.supercore.heartbeat import HeartbeatSender

def beat():
    raise RuntimeError("500")

end_with_any_thread()
HeartbeatSender(beat).start()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: 500" in done.stderr
    assert done.stdout == "the SuperNode ends with the error above\n"
