"""Real small programs under the supervisor."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HEAD = """
import logging, os, sys
from client import supervisor
from client.supervisor import Program, supervise
logging.basicConfig(format="join: %(message)s", stream=sys.stdout, level=logging.INFO)
supervisor.PAUSES = (0.2, 0.4)
supervisor.STOP_SECONDS = 1.0
def program(name, text, **more):
    return Program(name, [sys.executable, "-u", "-c", text], **more)
"""
FOR_EVER = "import time\nwhile True: time.sleep(0.1)"


@contextmanager
def supervising(tmp_path, text):
    """A process that supervises; yields it and how to read what it prints."""
    log = tmp_path / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, "-u", "-c", HEAD + text], stdout=output)
    try:
        yield process, log.read_text
    finally:
        process.kill()
        process.wait()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def started(text):
    """Process numbers, in the order of their starts."""
    return [int(line.split()[-1][:-1]) for line in text.splitlines() if "started (process" in line]


def test_a_program_that_ends_is_started_again_and_others_go_on(tmp_path):
    text = (
        f"supervise([program('a', {FOR_EVER!r}), program('b', 'raise SystemExit(3)')], os.environ)"
    )
    with supervising(tmp_path, text) as (_, read):
        wait_for(lambda: read().count("b ended (status 3)") >= 3)
        assert read().count("a started") == 1
        os.kill(started(read())[0], signal.SIGKILL)
        wait_for(lambda: "a ended (SIGKILL)" in read())
        wait_for(lambda: read().count("a started") == 2)


def test_sigterm_stops_all_in_order_also_who_ignores_it(tmp_path):
    deaf = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\n" + FOR_EVER
    )
    told = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('told to stop'))\n"
        "print('ready')\n" + FOR_EVER
    )
    text = f"supervise([program('a', {deaf!r}), program('b', {told!r})], os.environ)"
    with supervising(tmp_path, text) as (process, read):
        wait_for(lambda: "a: deaf" in read() and "b: ready" in read())
        before = time.monotonic()
        process.terminate()
        assert process.wait(30) == 0
        assert time.monotonic() - before < 10
        lines = read().splitlines()
        assert "b: told to stop" in lines
        assert lines[-1] == "join: stopped"
        assert not any(is_alive(pid) for pid in started(read()))


def test_what_a_program_started_ends_with_it(tmp_path):
    parent = (
        f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {FOR_EVER!r}])\n"
        "print('child', child.pid)\nraise SystemExit(1)"
    )
    with supervising(tmp_path, f"supervise([program('a', {parent!r})], os.environ)") as (_, read):
        wait_for(lambda: "a ended" in read())
        [line, *_] = [line for line in read().splitlines() if line.startswith("a: child")]
        wait_for(lambda: not is_alive(int(line.split()[-1])))


def test_what_a_program_prints_is_explained_once(tmp_path):
    says = "print('\\x1b[91mError\\x1b[0m [code: 2004]')\nprint()\nprint('fine')"
    text = f"supervise([program('a', {says!r}, meanings={{'2004': 'not registered'}})], os.environ)"
    with supervising(tmp_path, text) as (_, read):
        wait_for(lambda: read().count("a ended") >= 3)
        lines = read().splitlines()
        assert lines.count("a: Error [code: 2004]") >= 2  # without its colours
        assert lines.count("join: not registered") == 1
        assert "a: " not in lines


def test_a_part_ends_when_its_parent_is_killed(tmp_path):
    part = (
        "import os, sys\nfrom client.parts import become\n"
        f"become([sys.executable, '-c', {FOR_EVER!r}], os.environ, os.getppid())"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {part!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    wait_for(lambda: b"while True" in Path(f"/proc/{pid}/cmdline").read_bytes()
             and b"become" not in Path(f"/proc/{pid}/cmdline").read_bytes())  # fmt: skip
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(pid))


def test_a_part_whose_parent_died_before_does_not_start():
    text = "import os\nfrom client.parts import become\nbecome(['/bin/echo', 'ran'], os.environ, 1)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
