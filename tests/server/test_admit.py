import json
import shutil

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.cli.supernode.register import try_load_public_key

from core.errors import UserError
from server.admit import _key, admit
from server.control import Node
from server.provision import Provisioned, provision


class Known:
    """What a SuperLink knows of keys, by Flower's rules: a key is taken once."""

    def __init__(self):
        self.by_key = {}
        self.calls = []

    def nodes(self):
        return list(self.by_key.values())

    def register(self, public_key, name):
        assert public_key not in self.by_key
        node_id = 100 + len(self.by_key)
        self.by_key[public_key] = Node(node_id, public_key, True)
        self.calls.append(f"register {name}")
        return node_id

    def unregister(self, node_id):
        [node] = [node for node in self.by_key.values() if node.node_id == node_id]
        assert node.admitted
        self.by_key[node.public_key] = Node(node_id, node.public_key, False)
        self.calls.append(f"unregister {node_id}")


@pytest.fixture
def place(tmp_path):
    list(provision(tmp_path / "study", address="fl.example.org:443", sites=["a", "b"]))
    return tmp_path / "study"


def test_a_key_is_read_as_flowers_own_command_reads_it(place):
    file = place / "sites" / "a.pub"
    assert _key(file) == try_load_public_key(file)
    key = load_ssh_public_key(file.read_bytes())
    assert _key(file) == key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_each_site_is_admitted_once(place):
    link = Known()
    assert list(admit(link, place)) == ["site a: admitted", "site b: admitted"]
    assert list(admit(link, place)) == ["site a: admitted already", "site b: admitted already"]
    assert link.calls == ["register a", "register b"]
    assert json.loads(Provisioned(place, "").node("a").read_text()) == {"node-id": 100}
    assert not [line for line in provision(place) if "admit" in line]


def test_a_retired_key_is_refused_before_the_new_one_is_admitted(place):
    link = Known()
    list(admit(link, place))
    list(provision(place, rotate="a"))
    list(provision(place, revoke="b"))
    lines = list(admit(link, place))
    assert link.calls[2:4] in (["unregister 100", "unregister 101"],
                               ["unregister 101", "unregister 100"])  # fmt: skip
    assert link.calls[4:] == ["register a"]
    assert lines[-1] == "site a: admitted"
    assert sum("retired key refused" in line for line in lines) == 2
    assert list(admit(link, place)) == ["site a: admitted already"]


def test_stopped_anywhere_and_run_again_it_completes(place):
    whole = Known()
    list(admit(whole, place))
    list(provision(place, rotate="a"))
    for lines in range(4):
        link = Known()
        link.by_key = dict(whole.by_key)
        going = admit(link, place)
        for _ in range(lines):
            next(going, None)
        going.close()
        shutil.rmtree(place / "registered")  # what was not written before the end
        list(admit(link, place))
        admitted = {node.public_key for node in link.nodes() if node.admitted}
        assert admitted == {_key(place / "sites" / f"{name}.pub") for name in "ab"}
        assert Provisioned(place, "").node("a").exists()


def test_a_key_that_was_refused_before_needs_a_new_one(place):
    link = Known()
    list(admit(link, place))
    link.unregister(100)
    going = admit(link, place)
    assert next(going) == "site b: admitted already"  # the others are not held up
    with pytest.raises(UserError, match=r"site 'a': its key was refused before.* --rotate a"):
        list(going)


def test_a_strangers_key_that_is_admitted_is_named(place, tmp_path):
    link = Known()
    list(provision(tmp_path / "other", address="x.example.org:443", sites=["x"]))
    link.register(_key(tmp_path / "other" / "sites" / "x.pub"), "x")
    lines = list(admit(link, place))
    assert any("node 100: admitted, but its key is in neither" in line for line in lines)
    assert any(line.endswith("supernode unregister 100") for line in lines)


def test_a_damaged_public_key_is_named(place):
    (place / "sites" / "b.pub").write_text("not a key")
    with pytest.raises(UserError, match=r"public key '.*b.pub' cannot be read"):
        list(admit(Known(), place))
