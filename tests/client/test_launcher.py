"""What stands between a bundle that is sent and a site: launcher and trainer."""

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supernode.runtime import run_clientapp as flower

from client import launcher, trainer
from client.app import CLIENT_APP_ERROR, FAILED
from client.launcher import FLOWER, Task, check_own_code, replace_in
from client.parts import python_path
from core.errors import UserError
from server.grid import FIRST_NODE_ID, InProcessGrid


def spec(kind=TaskType.CLIENT_APP):
    return ExecutionSpec(
        task_type=kind, runtime_api_address="127.0.0.1:1", token="the token", insecure=True,
        root_certificates_path=None, runtime_dependency_install=True, parent_pid=os.getpid(),
        suppress_output=False, task_id=1,
    )  # fmt: skip


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


def test_the_trainer_takes_tasks_of_client_apps_alone(tmp_path):
    launches = trainer.Launches(tmp_path / "site.toml")
    assert launches.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    for kind in set(TaskType) - {TaskType.CLIENT_APP}:
        assert launches.launch(spec(kind)).status == "failed"


def test_a_task_starts_our_launcher_and_its_token_is_no_argument(tmp_path, monkeypatch):
    out = tmp_path / "out"
    program = tmp_path / "python"  # says how it was called
    program.write_text(f'#!/bin/sh\n(echo "$@"; echo "$PYTHONPATH"; cat) > {out}.new\n'
                       f"mv {out}.new {out}\n")  # fmt: skip
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    launches = trainer.Launches(tmp_path / "site.toml")
    assert launches.launch(spec()).status == "accepted"
    launches._running[0].wait(30)
    words, path, token = out.read_text().splitlines()
    assert words.startswith(f"-P -m client.launcher --site {tmp_path}/site.toml ")
    assert "the token" not in words
    assert "--allow" not in words  # no installation of what a bundle asks for
    assert token == "the token"
    assert path == python_path(os.environ)
    launches.reconcile()
    assert launches._running == []


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
