"""What stands between a bundle that is sent and a site."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supernode.runtime import run_clientapp as flower

from client import launcher
from client.app import CLIENT_APP_ERROR, FAILED
from client.guard import FLOWER, replace_in
from client.launcher import READY, Task, check_own_code
from client.parts import python_path
from core.errors import UserError
from server.grid import FIRST_NODE_ID, InProcessGrid


def test_the_installed_flower_has_all_that_is_replaced(tmp_path):
    copy = SimpleNamespace(**vars(flower))
    replacements = Task(tmp_path).replacements()
    replace_in(copy, flower.run_clientapp, replacements)
    assert {name: getattr(copy, name) for name in replacements} == replacements
    copy = SimpleNamespace(**vars(superexec))
    replace_in(copy, superexec.run_superexec, {"get_executor": print})
    assert copy.get_executor is print


def test_a_flower_whose_insides_changed_is_refused(tmp_path, monkeypatch):
    replacements = Task(tmp_path).replacements()
    for name in replacements:
        without = {key: value for key, value in vars(flower).items() if key != name}
        lacking = SimpleNamespace(**without | {"__name__": "copy"})
        with pytest.raises(UserError, match=rf"has no '{name}' in 'copy' that can be replaced"):
            replace_in(lacking, flower.run_clientapp, replacements)
        assert getattr(lacking, "push_message", None) in (None, flower.push_message)  # untouched
    other = SimpleNamespace(**vars(flower) | {"__name__": "copy"})
    with pytest.raises(UserError, match="that can be replaced"):
        replace_in(other, flower.pull_task_input, replacements)  # it calls none of them
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.42.0")
    with pytest.raises(UserError, match=r"Flower 1.42.0 is installed, .* run: pip"):
        replace_in(other, flower.run_clientapp, replacements)
    assert FLOWER == "1.41.0"


def push(task, message):
    """What goes out when Flower pushes this reply."""
    sent = []
    task._push = lambda connection, message, context: sent.append(message)
    task.push_message(None, message, None)
    return sent


@pytest.fixture
def asked():
    """A query, as Flower hands it to an app."""
    InProcessGrid(print, [{}])  # gives this process the identity that a message needs
    config = ConfigRecord({"study": "ab" * 16})
    return Message(RecordDict({"config": config}), FIRST_NODE_ID, "query")


def answered(task, asked):
    """Have the site's app answer; the SuperNode was told of another site file."""
    return task.answer(asked, Context(1, FIRST_NODE_ID, {"site": "nowhere"}, RecordDict(), {}))


def test_our_apps_reply_leaves_for_the_site_that_the_trainer_serves(make_sites, asked):
    (file,) = make_sites({"st-mary": ["ct"]})
    task = Task(file)
    task.receive_bundle(b"a bundle", skip_prompt=True)
    reply = answered(task, asked)
    assert reply.content["info"]["site"] == "st-mary"
    assert push(task, reply) == [reply]
    counted = hashlib.sha256(b"a bundle").hexdigest()  # whatever the coordinator calls it
    assert counted in (file.parent / "state" / "audit.jsonl").read_text()


def test_an_error_that_flower_words_leaves_without_its_words(make_sites, asked):
    (file,) = make_sites({"st-mary": ["ct"]})
    task = Task(file)
    answered(task, asked)
    theirs = Message(Error(2, "<class 'OSError'>:<'/srv/patients/doe.dcm'>"), reply_to=asked)
    [sent] = push(task, theirs)
    assert (sent.error.code, sent.error.reason) == (CLIENT_APP_ERROR, FAILED)


def test_content_that_our_app_did_not_make_does_not_leave(make_sites, asked):
    (file,) = make_sites({"st-mary": ["ct"]})
    task = Task(file)
    answered(task, asked)
    forged = Message(RecordDict({"x": ConfigRecord({})}), FIRST_NODE_ID, "query")
    with pytest.raises(ValueError, match="cannot carry an error"):
        push(task, forged)


def test_no_dependency_of_a_bundle_is_installed(tmp_path):
    with pytest.raises(UserError, match="dependencies are not installed"):
        Task(tmp_path).install_nothing("app")


def test_code_from_where_bundles_are_unpacked_is_refused(monkeypatch, tmp_path):
    check_own_code()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "apps" / "lab.evil.1.0.abcd")])
    with pytest.raises(UserError, match=r"lab.evil.1.0.abcd'; expected one installation, outside"):
        check_own_code()


def test_packages_of_two_installations_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher.core, "__file__", str(tmp_path / "core" / "__init__.py"))
    with pytest.raises(UserError, match="expected one installation"):
        check_own_code()


FORKS = """\
import json, os, signal, sys, threading
from client import launcher

def run(order):
    assert sys.stdin.read() == ""  # the orders are not its own to read
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    torch = sys.modules["torch"]
    with open(order.token, "w") as file:
        json.dump([os.getpid(), os.getppid(), float((torch.ones(64, 64) @ torch.ones(64, 1)).sum())
            ], file)
    os._exit(0)

read = []
sys.addaudithook(lambda event, given: read.append(given[0]) if event == "open" else None)
launcher.run = run
import_ahead = launcher.import_ahead

def asks_no_gpu():
    import torch
    for name in ("is_available", "device_count", "current_device", "_lazy_init"):
        setattr(torch.cuda, name, lambda *_: sys.exit("a GPU was asked for"))
    import_ahead()
    assert "timm" in sys.modules and "opacus" in sys.modules
    assert threading.active_count() == 1  # another's locks would stay locked where it is not

launcher.import_ahead = asks_no_gpu
sys.argv[1:] = ["--site", "SITE/site.toml"]
launcher.main()
assert not [path for path in read if "SITE" in str(path)]
print("ended")
"""


def test_each_task_has_a_process_of_its_own_that_has_imported_what_it_needs(tmp_path):
    words = [sys.executable, "-P", "-c", FORKS]
    environment = {**os.environ, "PYTHONPATH": python_path(os.environ)}
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        words, stdin=theirs, stdout=subprocess.PIPE, text=True, env=environment
    )
    theirs.close()
    ours.settimeout(120)
    assert ours.recv(10) == READY
    order = {"runtime_api_address": "", "insecure": True, "root_certificates": None}
    for name in "ab":
        line = order | {"token": str(tmp_path / name), "parent_pid": None}
        ours.sendall(json.dumps(line).encode() + b"\n")
    ours.close()  # by which it ends
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "ended\n")
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    one, other = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert len({process.pid, one[0], other[0]}) == 3
    assert one[2] == other[2] == 64 * 64


def test_what_cannot_be_imported_ahead_is_told_and_is_no_end(monkeypatch, caplog):
    monkeypatch.setattr(launcher, "AHEAD", ("no.such.package",))
    launcher.import_ahead()
    assert "no.such.package cannot be imported: No module named 'no'" in caplog.text


def test_packages_of_our_names_in_the_current_folder_are_not_imported(tmp_path):
    for package in ("client", "core", "flwr"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('planted')")
    environment = {**os.environ, "PYTHONPATH": python_path({"PYTHONPATH": os.pathsep + "."})}
    for module, words in (("client.launcher", ["--help"]), ("client.trainer", ["x", "--help"])):
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
