"""For whom a round waits, and for how long: sites that join late, go, and come back."""

import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from core.wire import GlobalState
from server.attendance import QuorumError
from server.grid import InProcessGrid
from server.history import open_run, read_history
from server.study import run_study


def site(message, context):
    """Answers with what it was sent, scaled by its own number."""
    if message.metadata.message_type == "query":
        info = ConfigRecord({"site": context.node_config["site"]})
        return Message(RecordDict({"info": info}), reply_to=message)
    sent, scale = message.content["arrays"], np.float32(message.metadata.dst_node_id / 900)
    arrays = {name: Array(array.numpy() * scale) for name, array in sent.items()}
    metrics = MetricRecord({"num_examples/ct": 10, "round": message.content["config"]["round"]})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)


class Nodes(InProcessGrid):
    """Sites of which some are connected; `plan` changes that, round by round."""

    def __init__(self, names, plan):
        super().__init__(site, [{"site": name} for name in names])
        self.plan = plan
        self.number = dict(zip(names, super().get_node_ids(), strict=True))
        self.gone = {}

    def get_node_ids(self):
        now = time.monotonic()
        return [n for name, n in self.number.items() if self.gone.get(name, 0.0) <= now]

    def deliver(self, message):
        if message.metadata.message_type == "train":
            self.plan(self, message.content["config"]["round"])
        return super().deliver(message)


def run(tmp_path, recipe, grid):
    directory = open_run(tmp_path, recipe)
    network = {"w": np.ones((2, 2), np.float32)}
    directory.load(lambda: GlobalState(student=network, teacher=network))
    run_study(grid, recipe, tmp_path)
    return read_history(tmp_path)


def outcomes(lines, name):
    return [line["sites"].get(name, {}).get("outcome") for line in lines]


def away(name, seconds, *, after):
    def plan(grid, round_number):
        if round_number == after:
            grid.gone[name] = time.monotonic() + seconds

    return plan


def test_a_site_that_went_in_the_round_before_is_waited_for(tmp_path, make_recipe):
    grid = Nodes(["a", "b", "c"], away("c", 0.6, after=1))
    lines = run(tmp_path, make_recipe(rounds=3, grace_seconds=30.0), grid)
    assert outcomes(lines, "c") == ["admitted"] * 3
    assert lines[1]["seconds"]["wait_for_sites"] >= 0.3


def test_a_site_that_stays_away_is_absent_and_waited_for_once(tmp_path, make_recipe):
    grid = Nodes(["a", "b", "c"], away("c", 3600.0, after=1))
    lines = run(tmp_path, make_recipe(rounds=3, grace_seconds=0.4), grid)
    assert outcomes(lines, "c") == ["admitted", "absent", "absent"]
    waits = [line["seconds"]["wait_for_sites"] for line in lines]
    assert waits[1] >= 0.4
    assert waits[2] < 0.4


def test_a_site_that_joins_late_takes_part_from_the_next_round(tmp_path, make_recipe):
    grid = Nodes(["a", "b", "c"], lambda grid, number: grid.gone.update({"c": 0.0}))
    grid.gone["c"] = float("inf")
    lines = run(tmp_path, make_recipe(rounds=3), grid)
    assert outcomes(lines, "c") == [None, "admitted", "admitted"]


def test_a_server_that_starts_anew_still_knows_whom_to_wait_for(tmp_path, make_recipe):
    def stop(grid, number):
        if number == 2:
            raise KeyboardInterrupt

    recipe = make_recipe(rounds=2, grace_seconds=30.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, Nodes(["a", "b", "c"], stop))
    grid = Nodes(["a", "b", "c"], lambda grid, number: None)
    grid.gone["c"] = time.monotonic() + 0.6
    assert outcomes(run(tmp_path, recipe, grid), "c") == ["admitted"] * 2


def test_an_absent_site_stays_in_the_record_of_a_server_that_starts_anew(tmp_path, make_recipe):
    recipe = make_recipe(rounds=2, grace_seconds=0.0)

    def stop(grid, number):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, Nodes(["a", "b", "c"], stop))
    lines = run(tmp_path, recipe, Nodes(["a", "b"], lambda grid, number: None))
    assert outcomes(lines, "c") == ["admitted", "absent"]


def test_below_the_quorum_the_wait_is_the_longer_one(tmp_path, make_recipe):
    recipe = make_recipe(rounds=2, grace_seconds=0.0, wait_for_sites_seconds=30.0)
    grid = Nodes(["a", "b"], away("b", 0.6, after=1))
    assert outcomes(run(tmp_path, recipe, grid), "b") == ["admitted"] * 2
    recipe = make_recipe(rounds=2, grace_seconds=0.0, wait_for_sites_seconds=0.2)
    with pytest.raises(QuorumError, match="1 site"):
        run(tmp_path / "short", recipe, Nodes(["a", "b"], away("b", 3600.0, after=1)))


def test_a_question_outlives_the_deadline_so_that_a_late_site_is_silent_and_no_error(
    tmp_path, make_recipe
):
    """The SuperLink answers for a message that expired, in words that name no site."""

    class Lives(Nodes):
        lives = ()

        def deliver(self, message):
            if message.metadata.message_type == "train":
                self.lives += (message.metadata.ttl,)
            return super().deliver(message)

    grid = Lives(["a", "b"], lambda grid, number: None)
    run(tmp_path, make_recipe(rounds=1, round_timeout_seconds=7.0), grid)
    assert len(grid.lives) == 2
    assert all(30 < life < 120 for life in grid.lives)
