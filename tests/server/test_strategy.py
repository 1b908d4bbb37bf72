"""What a round needs of memory and of time; what it decides is tested on whole federations."""

import os
import signal
import tracemalloc
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from core.checkpoint import sha256_file
from core.errors import UserError
from core.wire import GlobalState
from server.grid import InProcessGrid
from server.history import open_run, read_history
from server.live import read_live
from server.study import run_study

TENSORS, TENSOR = 40, (8, 1024)
STATE_BYTES = 2 * TENSORS * 8 * 1024 * 4
"""Of student and teacher; each tensor is small beside them."""


def site(message, context):
    """Answers with what it was sent, scaled by its own number."""
    number = context.node_config["number"]  # from 1: who changes nothing has no length
    if message.metadata.message_type == "query":
        info = ConfigRecord({"site": f"site-{number:02d}"})
        return Message(RecordDict({"info": info}), reply_to=message)
    sent, scale = message.content["arrays"], np.float32(1 + number / 1000)
    arrays = {name: Array(array.numpy() * scale) for name, array in sent.items()}
    metrics = MetricRecord(
        {"round": message.content["config"]["round"], "num_examples/ct": 10 + number}
    )
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)


class Sites(InProcessGrid):
    """Looks, before each pull, at how many of the replies it handed over are still there."""

    def __init__(self, count):
        super().__init__(site, [{"number": number} for number in range(1, count + 1)])
        self.handed_over = []
        self.most_alive = 0

    def pull_messages(self, message_ids):
        alive = sum(reference() is not None for reference in self.handed_over)
        self.most_alive = max(self.most_alive, alive)
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.message_type == "query":
                continue
            self.handed_over.append(weakref.ref(reply))
            for record in reply.content.array_records.values():
                self.handed_over += [weakref.ref(array) for array in record.values()]
        return replies


class Remote(Grid):
    """The same sites behind the part of Flower's interface that every grid has."""

    pull_interval = 0.01

    def __init__(self, count):
        self.sites = Sites(count)

    def __getattr__(self, name):
        return getattr(self.sites, name)

    run = property(lambda self: self.sites.run)
    set_run = create_message = None

    def get_node_ids(self):
        return self.sites.get_node_ids()

    def push_messages(self, messages):
        return self.sites.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.sites.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        if messages[0].metadata.message_type != "query":
            raise AssertionError("this would gather all replies before the first is seen")
        return self.sites.send_and_receive(messages, timeout=timeout)


@pytest.fixture
def make_run(tmp_path, make_recipe):
    """Run directories with an initial state of many small tensors."""

    def make(name, recipe):
        rng = np.random.default_rng(0)
        network = {f"w{i}": rng.normal(size=TENSOR).astype(np.float32) for i in range(TENSORS)}
        run = open_run(tmp_path / name, recipe)
        run.load(lambda: GlobalState(student=network, teacher=network))
        return run

    return make


@pytest.mark.parametrize("private", [False, True])
def test_prototypes_are_kept_to_be_seen_and_sent_back_with_record_privacy_alone(
    private, make_run, make_recipe, make_record_recipe
):
    recipe = make_record_recipe(prototype_releases=2) if private else make_recipe()
    received = []

    def answer(message, context):
        reply = site(message, context)
        if message.metadata.message_type == "train":
            arrays, metrics = reply.content["arrays"], reply.content["metrics"]
            received.append({n for n in message.content["arrays"] if n.startswith("prototype")})
            for name in [n for n in arrays if n.startswith("prototype")]:
                del arrays[name]
            for modality in ("ct", "us") if context.node_config["number"] == 1 else ("ct",):
                arrays[f"prototypes/{modality}"] = Array(np.eye(16, dtype=np.float32)[:1])
                arrays[f"prototype_counts/{modality}"] = Array(np.float32([6]))
            metrics["num_examples/us"] = 20
            if private:
                metrics["epsilon"] = 0.5
        return reply

    run = make_run("run", recipe)
    run_study(InProcessGrid(answer, [{"number": 1}, {"number": 2}]), recipe, run.path)
    merged = run.load(lambda: None).state.prototypes
    assert {m: c.tolist() for m, c in merged.counts.items()} == (
        {"ct": [12.0]} if private else {"ct": [12.0], "us": [6.0]}
    )
    back = {"prototypes/ct", "prototype_counts/ct"} if private else set()
    assert received == [set(), set(), back, back]


@pytest.mark.parametrize("grid", [Sites, Remote])
def test_a_reply_is_gone_before_the_next_is_pulled(grid, make_run, make_recipe):
    recipe, sites = make_recipe(), grid(7)
    run_study(sites, recipe, make_run("run", recipe).path)
    assert len(sites.handed_over) > 2 * 7 * 2 * TENSORS
    assert sites.most_alive == 0


@pytest.mark.parametrize("grid", [Sites, Remote])
def test_peak_memory_does_not_grow_with_the_number_of_sites(grid, make_run, make_recipe):
    def peak(count):
        recipe = make_recipe()
        run = make_run(f"run-{count}", recipe)
        tracemalloc.start()
        try:
            run_study(grid(count), recipe, run.path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2), peak(12)
    assert many - few < 0.25 * STATE_BYTES  # ten more replies in memory would be 10


def test_the_polled_grid_gives_the_bits_of_the_in_process_one(make_run, make_recipe):
    recipe = make_recipe()
    one, other = make_run("one", recipe), make_run("other", recipe)
    run_study(Sites(3), recipe, one.path)
    run_study(Remote(3), recipe, other.path)
    assert sha256_file(one.checkpoint_path(2)) == sha256_file(other.checkpoint_path(2))


class Dying(Sites):
    """The server is killed when it asks for the third update of a round."""

    def deliver(self, message):
        third = message.metadata.dst_node_id == list(self.get_node_ids())[2]
        if third and message.metadata.message_type == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().deliver(message)


def test_a_server_killed_in_the_middle_of_a_round_leaves_nothing_and_resumes(make_run, make_recipe):
    recipe = make_recipe()
    calm, killed = make_run("calm", recipe), make_run("killed", recipe)
    before = {file.name for file in killed.path.iterdir()}
    child = os.fork()
    if child == 0:
        try:
            run_study(Dying(3), recipe, killed.path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert {file.name for file in killed.path.iterdir()} == before | {"lock", "live.json"}
    for run in (calm, killed):
        run_study(Sites(3), recipe, run.path)
        assert len(read_history(run.path)) == 2
    assert sha256_file(calm.checkpoint_path(2)) == sha256_file(killed.checkpoint_path(2))


class Told(Sites):
    """Notes what RUN/live.json tells whenever a site is asked to train."""

    def __init__(self, count, run, act=lambda: None):
        super().__init__(count)
        self.run_dir, self.act, self.told = run, act, []

    def deliver(self, message):
        if message.metadata.message_type == "train":
            self.told.append(read_live(self.run_dir))
            self.act()
        return super().deliver(message)


def test_a_study_tells_what_it_does_and_at_its_end_that_it_has_finished(make_run, make_recipe):
    recipe = make_recipe(rounds=2)
    run = make_run("run", recipe).path
    grid = Told(3, run)
    run_study(grid, recipe, run)
    assert [told["round"] for told in grid.told] == [1, 1, 1, 2, 2, 2]
    assert {told["phase"] for told in grid.told} == {"training"}
    assert all(told["deadline"] > told["written"] for told in grid.told)
    end = read_live(run)
    assert (end["phase"], end["round"], end["deadline"]) == ("finished", 2, None)
    assert {site["state"] for site in end["sites"].values()} == {"admitted"}


def test_a_study_that_fails_tells_so_and_which_sites_did_not_answer(make_run, make_recipe):
    recipe = make_recipe(rounds=2, min_sites=3)
    run = make_run("run", recipe).path
    grid = Sites(3)
    grid.deliver = lambda message: (
        None
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1000
        else Sites.deliver(grid, message)
    )
    with pytest.raises(UserError, match="2 of 3 sites admitted"):
        run_study(grid, recipe, run)
    end = read_live(run)
    assert end["phase"] == "failed"
    assert sorted(site["state"] for site in end["sites"].values()) == [
        "admitted", "admitted", "silent",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_study_that_is_stopped_tells_so(stop, make_run, make_recipe):
    recipe = make_recipe(rounds=2)
    run = make_run("run", recipe).path

    def act():
        raise stop

    with pytest.raises(stop):
        run_study(Told(3, run, act), recipe, run)
    assert read_live(run)["phase"] == "stopped"
