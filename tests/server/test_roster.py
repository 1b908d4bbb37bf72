import json

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from server.grid import FIRST_NODE_ID, InProcessGrid
from server.roster import Roster


class Nodes(InProcessGrid):
    """Nodes that answer a query with a name, or with an error where the name is an exception."""

    def __init__(self, names):
        super().__init__(lambda message, context: message, [{} for _ in names])
        self.names = dict(zip(super().get_node_ids(), names, strict=True))
        self.online = list(self.names)
        self.asked = []

    def get_node_ids(self):
        return self.online

    def deliver(self, message):
        node = message.metadata.dst_node_id
        self.asked.append(node)
        name = self.names[node]
        if name is None:
            return None
        if isinstance(name, Exception):
            return Message(Error(2, str(name)), reply_to=message)
        return Message(RecordDict({"info": ConfigRecord({"site": name})}), reply_to=message)


A, B, C = FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2


def test_each_node_is_asked_once():
    nodes, roster = Nodes(["st-mary", "charite"]), Roster("study")
    assert roster.present(nodes) == {"st-mary": A, "charite": B}
    assert roster.present(nodes) == {"st-mary": A, "charite": B}
    assert nodes.asked == [A, B]


def test_of_two_nodes_with_one_name_the_later_is_refused_by_name():
    nodes, roster = Nodes(["st-mary", "st-mary"]), Roster("study")
    assert roster.present(nodes) == {"st-mary": A}
    assert roster.refused == {B: "another node already answers as site 'st-mary'"}


def test_a_restarted_site_takes_over_when_its_old_node_is_gone():
    nodes, roster = Nodes(["st-mary", "st-mary"]), Roster("study")
    roster.present(nodes)
    nodes.online = [B]
    roster.begin_round({})
    assert roster.present(nodes) == {"st-mary": B}
    assert roster.refused == {}


@pytest.mark.parametrize("name", ["", "../etc", "a b", "x" * 65, "a\n", 7])
def test_a_node_without_a_usable_name_takes_no_part(name):
    roster = Roster("study")
    assert roster.present(Nodes([name, "good"])) == {"good": B}
    assert roster.refused == {A: "gave no usable site name"}


def test_silent_and_failing_nodes_are_asked_again_in_the_next_round():
    nodes, roster = Nodes([None, ValueError("no site file"), "good"]), Roster("study")
    assert roster.present(nodes) == {"good": C}
    assert roster.refused == {A: "did not say who it is", B: "no site file"}
    nodes.names[A] = "st-mary"
    assert roster.present(nodes) == {"good": C}
    roster.begin_round({})
    assert roster.present(nodes) == {"good": C, "st-mary": A}


def register(directory, site, node, digest="0" * 16):
    (directory / f"{site}-{digest}.json").write_text(json.dumps({"node-id": str(node)}))


def test_a_registered_key_tells_the_name_and_nobody_is_asked(tmp_path):
    nodes = Nodes(["st-mary", "charite"])
    register(tmp_path, "st-mary", A)
    register(tmp_path, "north-west.2", B)
    roster = Roster("study", tmp_path)
    assert roster.present(nodes) == {"st-mary": A, "north-west.2": B}  # whatever B calls itself
    assert nodes.asked == []


def test_a_node_without_a_registered_key_takes_no_part_until_it_has_one(tmp_path):
    nodes, roster = Nodes(["st-mary", "charite"]), Roster("study", tmp_path)
    register(tmp_path, "st-mary", A)
    (tmp_path / "charite-00.json").write_text("")  # as the shell makes it before a command ends
    assert roster.present(nodes) == {"st-mary": A}
    assert "names no site for its key" in roster.refused[B]
    register(tmp_path, "charite", B)
    roster.begin_round({})
    assert roster.present(nodes) == {"st-mary": A, "charite": B}


def test_a_site_with_a_new_key_keeps_its_name(tmp_path):
    nodes, roster = Nodes(["st-mary", "st-mary"]), Roster("study", tmp_path)
    register(tmp_path, "st-mary", A)
    register(tmp_path, "st-mary", B, digest="1" * 16)
    nodes.online = [B]
    assert roster.present(nodes) == {"st-mary": B}
