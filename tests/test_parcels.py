"""Small arrays travel in parcels between a service and launchers: no app notices, none gets in."""

from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, RecordDict

from client.launcher import Task
from core.checkpoint import sha256_file
from core.parcel import PARCEL
from server.engines import run_in_process
from server.grid import InProcessGrid
from server.history import open_run, read_history
from server.parcels import ParcelGrid
from server.study import run_study


class Wire(InProcessGrid):
    """Sites that answer by launchers; keeps the names of the arrays that went either way."""

    def __init__(self, files, change=lambda message, reply: None):
        self.tasks = {str(file): Task(file) for file in files}
        self.names = []
        self.change = change
        super().__init__(self.answer, [{"site": str(file)} for file in files])

    def answer(self, message, context):
        train = message.metadata.message_type == "train"
        if train:
            self.names.append(set(message.content["arrays"]))
            self.change(message, None)
        reply = self.tasks[context.node_config["site"]].answer(message, context)
        if train and reply.has_content():
            self.names.append(set(reply.content["arrays"]))
            self.change(None, reply)
        return reply


@pytest.fixture
def sites(make_sites):
    return make_sites({"a": ["ct"], "b": ["us", "ct"]})


def test_a_study_by_parcels_is_the_same_study_bit_for_bit(tmp_path, recipe, sites):
    plain = open_run(tmp_path / "plain", recipe)
    run_in_process(plain.path, sites)
    for file in sites:
        (file.parent / "state").rename(file.parent / "state-of-the-first-run")
    wire = Wire(sites)
    run_study(ParcelGrid(wire), recipe, tmp_path / "parcels")
    assert wire.names == [{PARCEL}] * 8  # two sites, two rounds, down and up
    digests = {sha256_file(run.checkpoint_path(2))
               for run in (plain, open_run(tmp_path / "parcels", recipe))}  # fmt: skip
    assert len(digests) == 1
    facts = [
        [line["sites"][site][fact] for line in read_history(tmp_path / run) for site in "ab"]
        for run in ("plain", "parcels")
        for fact in ("digest", "update_norm")
    ]
    assert facts[:2] == facts[2:]


def one_byte_longer(message):
    data = message.content["arrays"][PARCEL].numpy()
    message.content["arrays"][PARCEL] = Array(np.append(data, np.uint8(0)))


def test_a_damaged_parcel_from_a_site_is_rejected_by_its_name(tmp_path, make_recipe, sites):
    recipe = make_recipe(min_sites=1, rounds=1)
    spoilt = []

    def spoil_the_first(message, reply):
        if reply is not None and not spoilt:
            spoilt.append(one_byte_longer(reply))

    run_study(ParcelGrid(Wire(sites, spoil_the_first)), recipe, tmp_path / "run")
    [line] = read_history(tmp_path / "run")
    assert line["sites"]["a"]["outcome"] == "rejected"
    assert "site 'a', round 1" in line["sites"]["a"]["reason"]
    assert line["sites"]["b"]["outcome"] == "admitted"


def test_a_damaged_parcel_from_the_server_is_refused_and_nothing_is_trained(
    tmp_path, make_recipe, sites
):
    def spoil(message, reply):
        if message is not None:
            one_byte_longer(message)

    with suppress(Exception):  # no quorum
        run_study(ParcelGrid(Wire(sites, spoil)), make_recipe(rounds=1), tmp_path / "run")
    for file in sites:
        audit = (file.parent / "state" / "audit.jsonl").read_text()
        assert "an array that is not on the list" in audit
        assert "trained" not in audit


def test_messages_without_arrays_and_errors_pass(sites):
    grid = ParcelGrid(Wire(sites))
    [node, _] = grid.get_node_ids()
    asked = [
        Message(RecordDict({"config": ConfigRecord({"study": "ab" * 16})}), node, "query"),
        Message(RecordDict({}), node, "train.odd"),
    ]
    told, refused = grid.send_and_receive(asked)
    assert told.content["info"]["site"] == "a"
    assert refused.has_error()
