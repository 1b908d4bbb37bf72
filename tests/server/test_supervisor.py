import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import UserError
from server import supervisor
from server.supervisor import Part, Supervisor


def part(place, program, name="part", **options):
    command = [sys.executable, "-c", program]
    return Part(name, command, dict(os.environ), place / f"{name}.log", **options)


def wait_for(ready, watched=None):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        if watched:
            watched.check()
        time.sleep(0.02)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SAY_PID = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def pids(log):
    return [int(word) for word in log.read_text().split()] if log.exists() else []


def test_a_part_that_is_killed_is_started_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    log = tmp_path / "part.log"
    with Supervisor() as watched:
        watched.start(part(tmp_path, SAY_PID))
        wait_for(lambda: len(pids(log)) == 1, watched)
        os.kill(pids(log)[0], signal.SIGKILL)
        wait_for(lambda: len(pids(log)) == 2, watched)
        second = pids(log)[1]
        assert lives(second)
    assert not lives(second)
    assert "'part' ended by signal 9; started again at once" in caplog.text


def test_a_part_that_ends_at_once_is_started_again_ever_more_slowly(tmp_path, caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(supervisor, "MAX_WAIT_SECONDS", 4.0)
    with Supervisor() as watched:
        watched.start(part(tmp_path, "raise SystemExit(1)"))
        for _ in range(4):
            watched._children["part"].process.wait()
            watched.check()
            clock[0] += 4.0
            watched.check()
        clock[0] -= 1000  # lets the context's own waits end
    waits = [r.getMessage().partition("again in ")[2].split(" s;")[0] for r in caplog.records]
    assert waits == ["1", "2", "4", "4"]


def test_a_part_that_refuses_its_input_is_told_by_its_last_line(tmp_path):
    with Supervisor() as watched:
        watched.start(part(tmp_path, "print('note'); print('error: no key'); raise SystemExit(2)"))
        with pytest.raises(UserError, match=r"^'part': error: no key$"):
            wait_for(lambda: False, watched)


def test_parts_that_serve_are_stopped_after_the_others(tmp_path):
    program = """
import signal, sys, time
def leave(*_):
    time.sleep({seconds})
    print("left", time.monotonic(), flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""
    with Supervisor() as watched:
        for name, seconds, serves in (("link", 0, True), ("site", 0.5, False)):
            watched.start(part(tmp_path, program.format(seconds=seconds), name, serves=serves))
        logs = [tmp_path / "link.log", tmp_path / "site.log"]
        wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    link, site = (float(log.read_text().split()[-1]) for log in logs)
    assert site < link


def test_a_part_that_does_not_listen_to_sigterm_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SAY_PID
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}],"
    program += f" start_new_session=True); {deaf}"
    log = tmp_path / "part.log"
    with Supervisor() as watched:
        watched.start(part(tmp_path, program))
        wait_for(lambda: len(pids(log)) == 2)
    wait_for(lambda: not any(lives(pid) for pid in pids(log)))  # SIGKILL takes a moment


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for it")
@pytest.mark.parametrize("last_word", ["SIGKILL", "SIGTERM"])
def test_parts_die_with_a_supervisor_that_is_killed(tmp_path, last_word):
    program = f"""
import time
from pathlib import Path
from server.supervisor import Part, Supervisor
import os, signal, sys
with Supervisor() as watched:
    watched.start(Part("part", [sys.executable, "-c", {SAY_PID!r}], dict(os.environ),
                       Path({str(tmp_path / "part.log")!r}), last_word=signal.{last_word}))
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    log = tmp_path / "part.log"
    wait_for(lambda: len(pids(log)) == 1)
    [child] = pids(log)
    assert lives(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not lives(child))


def test_a_log_that_grows_is_begun_anew_while_its_part_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 10_000)
    program = "import time\nwhile True: print('x' * 999, flush=True); time.sleep(0.02)"
    log, before = tmp_path / "part.log", tmp_path / "part.log.1"
    with Supervisor() as watched:
        watched.start(part(tmp_path, program))
        wait_for(before.exists, watched)
        wait_for(lambda: 0 < log.stat().st_size < 10_000, watched)
    assert before.stat().st_size > 10_000
