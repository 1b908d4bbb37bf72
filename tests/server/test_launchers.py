"""The two of Flower's programs that we start with other settings."""

import json
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
DELIVERY = """
import json, sys
from server.superlink import deliver_until_confirmed, raise_busy_timeout
raise_busy_timeout()
deliver_until_confirmed()
from flwr.app import ConfigRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects, get_object_tree, no_object_id_recompute
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers as fleet

database = sys.argv[1]
objects = ObjectStoreFactory(database)
state = LinkStateFactory(database, NoOpFederationManager(), objects).state()
nodes = [state.create_node("a", "a", bytes([number]), 30.0) for number in range(2)]
run = state.create_run("a/b", "1", "", {}, NOOP_FEDERATION_ID, None, "a", "flwr-serverapp")
task = state.get_run_info(run_ids=[run])[0].primary_task_id
assert all(state.activate_node(node, 30.0) for node in nodes)
assert state.claim_task(task) and state.activate_task(task)
session = state.start_session(run)


def send(node, number, *, reply_to=""):
    ends = (node, SUPERLINK_NODE_ID) if reply_to else (SUPERLINK_NODE_ID, node)
    metadata = Metadata(
        run_id=run, message_id="", src_node_id=ends[0], dst_node_id=ends[1],
        reply_to_message_id=reply_to, group_id="", created_at=now().timestamp(), ttl=90.0,
        message_type="train",
    )
    content = RecordDict({"config": ConfigRecord({"number": number})})
    message = make_message(metadata=metadata, content=content)
    message.metadata.__dict__["_message_id"] = name = message.object_id
    with no_object_id_recompute():
        assert state.store_message_and_object_tree(message, get_object_tree(message), session)[0]
        for key, part in get_all_nested_objects(message).items():
            objects.store().put(key, part.deflate())
    names[name] = number
    return name


def asks(node):
    request = PullMessagesRequest(node=Node(node_id=node))
    answer = fleet.pull_messages(request=request, state=state, store=objects.store())
    return [names[message.metadata.message_id] for message in answer.messages_list]


names, seen = {}, {}
one = send(nodes[0], 1)
seen["lost"] = [asks(nodes[0]), asks(nodes[0])]
seen["another"] = asks(nodes[1])
confirmation = ConfirmMessageReceivedRequest(
    node=Node(node_id=nodes[0]), run_id=run, message_object_id=one
)
fleet.confirm_message_received(request=confirmation, state=state, store=objects.store())
seen["confirmed"] = asks(nodes[0])
send(nodes[0], 0, reply_to=one)  # it can still be answered
two = send(nodes[0], 2)
seen["next"] = asks(nodes[0])
send(nodes[0], 3, reply_to=two)
seen["answered"] = asks(nodes[0])
send(nodes[0], 4)
asks(nodes[0])
state.finish_task(task, "completed", "")
seen["ended"] = asks(nodes[0])
print(json.dumps(seen))
"""


def python(program, *words):
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_node_gets_a_message_until_it_has_confirmed_it_or_the_run_has_ended(tmp_path):
    done = python(DELIVERY, str(tmp_path / "superlink.db"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "another": [], "lost": [[1], [1]], "confirmed": [], "next": [2], "answered": [],
        "ended": [],
    }  # fmt: skip
    assert (done.stdout + done.stderr).count("did not arrive; it is sent again") == 1


def test_a_flower_that_hands_messages_out_in_another_way_is_not_started():
    done = python("""
from server.superlink import deliver_until_confirmed
import flwr.server.superlink.linkstate.sql_linkstate as module
del module.SqlLinkState.get_message_ins
deliver_until_confirmed()
""")
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert "SqlLinkState has no get_message_ins" in done.stderr


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
