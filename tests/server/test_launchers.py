"""The two of Flower's programs that we start with other settings."""

import subprocess
import sys

import pytest

PROBE_SUPERLINK = """
from server.superlink import raise_busy_timeout
raise_busy_timeout()
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from sqlalchemy import create_engine, event, text
from flwr.supercore import sql_mixin
engine = create_engine("sqlite://")
event.listen(engine, "connect", sql_mixin._set_sqlite_pragmas)
with engine.connect() as connection:
    print(connection.execute(text("PRAGMA busy_timeout")).scalar())
"""


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_superlinks_database_connections_wait_two_minutes_for_a_lock():
    done = python(PROBE_SUPERLINK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "120000"


@pytest.mark.parametrize(
    ("before", "module", "words"),
    [
        ("import flwr.supercore.constant as c; del c.SQLITE_PRAGMAS", "superlink", "busy_timeout"),
        ("import flwr.supercore.sql_mixin", "superlink", "set up before its patience was raised"),
        (
            "import flwr.supercore.superexec.run_superexec as m; del m.AutoExecPlugin",
            "superexec",
            "chooses its tasks in another way",
        ),
    ],
)
def test_a_flower_that_keeps_them_elsewhere_is_not_started(before, module, words):
    done = python(f"{before}\nfrom server.{module} import main\nmain()")
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert words in done.stderr


def test_only_server_apps_are_asked_for_and_what_they_print_is_kept():
    program = """
from server.superexec import restrict_to_server_apps
restrict_to_server_apps()
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
plugin = run_superexec.AutoExecPlugin("127.0.0.1:1", False, "ca", executor=SubprocessExecutor())
print(sorted(plugin.supported_task_types))
print(plugin._build_execution_spec("token", "flwr-serverapp", 1).suppress_output)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "[<TaskType.SERVER_APP: 'flwr-serverapp'>]", "False"
    ]  # fmt: skip
