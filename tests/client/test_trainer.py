"""The trainer: which tasks it takes, and the launcher that it keeps ready for them."""

import json
import os
import subprocess
import sys
import time

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec

from client import trainer
from client.launcher import Order
from client.parts import python_path


def spec(kind=TaskType.CLIENT_APP):
    return ExecutionSpec(
        task_type=kind, runtime_api_address="127.0.0.1:1", token="the token", insecure=True,
        root_certificates_path=None, runtime_dependency_install=True, parent_pid=os.getpid(),
        suppress_output=False, task_id=1,
    )  # fmt: skip


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A program in our Python's place that writes down how it was called and what it is told."""
    out = tmp_path / "out"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {out}; echo "$PYTHONPATH" >> {out}\n'
                       f"[ -e {tmp_path}/slow ] || echo >&0\n"
                       f"while read line; do echo $line >> {out}; done\n")  # fmt: skip
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    launches = trainer.Launches(tmp_path / "site.toml")
    yield launches, out
    launches.close()
    launches._launcher.wait(30)  # by the signal, or because nobody is at the other end


def lines(out, count):
    deadline = time.monotonic() + 30
    while not out.exists() or out.read_text().count("\n") < count:
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.05)
    return out.read_text().splitlines()


def takes(launches):
    return launches.get_eligible_capacity(set(TaskType))


def test_the_trainer_takes_tasks_of_client_apps_alone_once_a_launcher_is_ready(launcher):
    launches, out = launcher
    assert takes(launches) == (set(), set())
    launches.reconcile()
    lines(out, 2)
    deadline = time.monotonic() + 30
    while takes(launches) != ({TaskType.CLIENT_APP}, set()):
        assert time.monotonic() < deadline
    for kind in set(TaskType) - {TaskType.CLIENT_APP}:
        assert launches.launch(spec(kind)).status == "failed"
    assert takes(launches) == ({TaskType.CLIENT_APP}, set())
    launches._launcher.kill()
    launches._launcher.wait()
    assert takes(launches) == (set(), set())


def test_no_task_is_taken_while_the_launcher_still_imports(launcher, tmp_path):
    launches, out = launcher
    (tmp_path / "slow").touch()
    launches.reconcile()
    lines(out, 2)
    assert takes(launches) == takes(launches) == (set(), set())


def test_a_launcher_is_ready_before_a_task_comes_and_no_token_is_an_argument(launcher, tmp_path):
    launches, out = launcher
    launches.reconcile()
    words, path = lines(out, 2)
    assert words == f"-P -m client.launcher --site {tmp_path}/site.toml"
    assert path == python_path(os.environ)
    for _ in range(2):
        launches.reconcile()
        assert launches.launch(spec()).status == "accepted"
    orders = [json.loads(line) for line in lines(out, 4)[2:]]
    assert [Order(**order) for order in orders] == 2 * [
        Order("127.0.0.1:1", "the token", True, None, os.getpid())
    ]


def test_a_launcher_that_was_killed_is_started_again_for_the_next_task(launcher):
    launches, out = launcher
    launches.reconcile()
    lines(out, 2)
    launches._launcher.kill()
    launches._launcher.wait()
    launches.reconcile()  # not at once: it may end again and again
    assert launches._launcher.poll() is not None
    assert launches.launch(spec()).status == "accepted"
    assert '"token": "the token"' in lines(out, 5)[4]


def test_a_launcher_that_ended_is_made_ready_again_after_a_while(launcher, monkeypatch):
    launches, _ = launcher
    launches.reconcile()
    first = launches._launcher
    first.kill()
    first.wait()
    monkeypatch.setattr(trainer, "AGAIN_SECONDS", 0.0)
    launches.reconcile()
    assert launches._launcher is not first
    assert launches._launcher.poll() is None


def test_a_launcher_that_cannot_start_is_a_failed_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    launches = trainer.Launches(tmp_path / "site.toml")
    monkeypatch.setattr(subprocess.Popen, "__init__", _ended(subprocess.Popen.__init__))
    assert launches.launch(spec()).status == "failed"


def _ended(start):
    def started(process, *words, **options):
        start(process, *words, **options)
        process.wait()

    return started
