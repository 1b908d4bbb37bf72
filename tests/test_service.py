"""The coordinator's commands as they are typed: provision, serve, admit, init, run."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from core.lock import held
from server.history import open_run, read_history
from server.processes import _connect, free_port
from server.provision import provision
from server.supervisor import _descendants

SECONDS = 300
FAILS_DELIVERING = """
import os, pathlib, signal, sys, threading, time

NAME = "flwr.superlink.servicer.fleet.fleet_handlers"
ERROR, DEATH = (pathlib.Path(__file__).with_name(name) for name in ("error", "death"))


def patch():
    while not hasattr(sys.modules.get(NAME), "pull_messages"):
        time.sleep(0.01)
    handlers = sys.modules[NAME]
    pull = handlers.pull_messages

    def fails(**arguments):
        answer = pull(**arguments)
        if answer.messages_list and not ERROR.exists():
            ERROR.touch()
            raise RuntimeError
        if answer.messages_list and not DEATH.exists():
            DEATH.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    handlers.pull_messages = fails


if "server.superlink" in sys.orig_argv:
    threading.Thread(target=patch, daemon=True).start()
"""
"""A sitecustomize.py: the SuperLink has written down that a message is with its site and then
answers 500; the next time it dies. Neither message arrives."""


def server(*words):
    return [sys.executable, "-m", "server", *map(str, words)]


@contextmanager
def started(log, words, **environment):
    """A command whose output goes to `log`; it is stopped as a supervisor would stop it."""
    outer = os.environ | environment
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=outer)
    try:
        yield process
    finally:
        family = _descendants({process.pid})
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = {pid for pid in family if Path(f"/proc/{pid}").exists()}
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(ready, log):
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def done(words):
    result = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def listening(port):
    """Local addresses at which a TCP port listens, in /proc's hexadecimal."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.append(address.partition(":")[0])
    return found


@pytest.fixture
def study(tmp_path, make_sites, make_recipe):
    """A provisioned directory, its ports, one site with its kit, and a recipe of three rounds."""
    public, own = free_port(), free_port()
    place = tmp_path / "study"
    list(provision(place, address=f"localhost:{public}", sites=["st-mary"]))
    [site] = make_sites({"st-mary": ["ct"]})
    _connect(site, f"localhost:{public}", place, "st-mary")
    recipe = tmp_path / "recipe.json"
    made = make_recipe(rounds=3, min_sites=1, local_steps=3, wait_for_sites_seconds=240.0)
    recipe.write_text(json.dumps(made.model_dump(mode="json")))
    return place, public, own, site, recipe


def test_a_study_survives_the_death_of_the_superlink_and_then_of_the_server_app(study, tmp_path):
    place, public, own, site, recipe = study
    run, log, bad = tmp_path / "run", tmp_path / "serve.log", tmp_path / "bad"
    bad.mkdir()
    (bad / "sitecustomize.py").write_text(FAILS_DELIVERING)
    assert done(server("init", recipe, run)).strip() == str(run / "round-0000.safetensors")
    serve = server("serve", place, "--listen", f"127.0.0.1:{public}", "--port", own)
    with started(log, serve, PYTHONPATH=str(bad)) as service:
        assert done(server("admit", place)).splitlines() == ["site st-mary: admitted"]
        words = [sys.executable, "-m", "client", "join", str(site), "--port", str(free_port())]
        with (
            started(tmp_path / "join.log", words),
            started(follower := tmp_path / "run.log", server("run", place, recipe, "--out", run)),
        ):
            # What a hospital, or a stranger, can reach.
            assert listening(own) == ["0100007F"]
            for path in ("control/list-runs", "control/start-run", "runtime/acquire-task"):
                url = f"https://localhost:{public}/v1/{path}"
                answer = httpx.post(url, verify=_trust(place), content=b"", trust_env=False)
                assert answer.status_code == 403
                assert answer.text == "only Flower's fleet service is served here\n"

            wait_for((bad / "death").exists, log)  # in mid-round
            wait_for(lambda: len(read_history(run)) == 1, follower)

            wait_for(lambda: "round 2 of 3: 1 sites train" in _apps(place), follower)
            os.kill(_server_app(service), signal.SIGKILL)
            wait_for(lambda: len(read_history(run)) == 3, follower)
            wait_for(lambda: (run / "summary.json").exists(), follower)
        told = follower.read_text()
        assert "the ServerApp has ended after round 1; starting another" in told
        assert "round 3 of 3: 1 of 1 sites admitted" in told
        # A study that is done is only shown.
        assert "CT" in done(server("run", place, recipe, "--out", run))
    assert "'superlink' ended by signal 9; started again" in log.read_text()
    outcomes = [line["sites"]["st-mary"]["outcome"] for line in read_history(run)]
    assert outcomes == ["admitted"] * 3
    assert listening(own) == listening(public) == []


def _apps(place):
    file = place / "logs" / "apps.log"
    return file.read_text(errors="replace") if file.exists() else ""


def _server_app(service):
    for pid in _descendants({service.pid}):
        with suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise AssertionError("no ServerApp")


def _trust(place):
    import ssl

    return ssl.create_default_context(cafile=place / "ca.crt")


def test_a_service_that_was_killed_leaves_nothing_that_blocks_the_next(study, tmp_path):
    place, public, own, *_ = study
    serve = server("serve", place, "--listen", f"127.0.0.1:{public}", "--port", own)
    log = tmp_path / "serve.log"
    with started(log, serve) as service:
        wait_for(lambda: listening(own) and listening(public), log)
        family = _descendants({service.pid})
        assert len(family) >= 3
        service.kill()
        wait_for(lambda: not any(_lives(pid) for pid in family), log)
        wait_for(lambda: not listening(own) and not listening(public), log)
    with started(log, serve) as service:
        wait_for(lambda: listening(own) and listening(public), log)
        assert done(server("admit", place)).splitlines() == ["site st-mary: admitted"]
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    assert listening(own) == listening(public) == []


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_study_is_held_as_long_as_its_server_app_lives(tmp_path, recipe):
    run = open_run(tmp_path / "run", recipe)
    assert not held(run.path / "lock")
    with run.locked():
        assert held(run.path / "lock")
    assert not held(run.path / "lock")


def test_looking_whether_a_run_is_held_does_not_keep_a_server_app_out(tmp_path, recipe):
    run = open_run(tmp_path / "run", recipe)
    stop = threading.Event()

    def look():
        while not stop.is_set():
            held(run.path / "lock")

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(50):
            with run.locked():
                pass
    finally:
        stop.set()
        watcher.join()


def test_the_service_refuses_what_it_cannot_use(tmp_path, study):
    place, *_, recipe = study
    list(provision(tmp_path / "fresh", address="localhost:9443", sites=["a"]))
    for words, said in (
        (["serve", tmp_path / "nowhere"], "has no ca.crt; run 'fedmermed-server provision' first"),
        (["serve", place, "--listen", "everywhere"], "'everywhere' is not HOST:PORT"),
        (["admit", tmp_path / "nowhere"], "does not tell where the SuperLink is"),
        (["run", tmp_path / "nowhere", recipe], "does not tell where the SuperLink is"),
        (["admit", tmp_path / "fresh"], "start 'fedmermed-server serve"),
    ):
        result = subprocess.run(server(*words), capture_output=True, text=True)
        assert result.returncode == 2
        assert said in result.stderr


def test_a_port_that_is_taken_ends_the_gateway_with_status_other_than_zero(study):
    place, public, *_ = study
    with socket.create_server(("127.0.0.1", public)):
        words = server("serve", place, "--part", "gateway", "--listen", f"127.0.0.1:{public}")
        result = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode != 0
    assert "address already in use" in result.stderr
