"""One round's messages and replies, over a grid whose sites fail in the ways of Flower's."""

import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from core.wire import NOT_NOW
from server import exchange, live
from server.exchange import MOST_FAILURES, Exchange
from server.grid import InProcessGrid
from server.live import Live, read_live


class Remote(Grid):
    """Sites behind what every grid has; `script` tells what each answers, question by question.

    An entry is a node's answer: None (silent), a number (an error of this code) or 'ok'. After its
    last entry a node is silent.
    """

    pull_interval = 0.01
    run_dir: Path
    run = property(lambda self: self.inner.run)
    set_run = create_message = None

    def __init__(self, script):
        self.script = {node: list(answers) for node, answers in script.items()}
        self.inner = InProcessGrid(self.site, [{}] * len(script))
        self.offline = set()
        self.asked = []

    def site(self, message, context):
        node = message.metadata.dst_node_id
        self.asked.append(node)
        answer = self.script[node].pop(0) if self.script[node] else None
        if answer is None:
            return None
        if answer == "ok":
            info = ConfigRecord({"node": node})
            return Message(RecordDict({"info": info}), reply_to=message)
        return Message(Error(answer, f"code {answer}"), reply_to=message)

    def get_node_ids(self):
        return [node for node in self.script if node not in self.offline]

    def push_messages(self, messages):
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("this would gather all replies before the first is seen")


def ask(sites, seconds):
    return [
        Message(RecordDict({"config": ConfigRecord({})}), node, "query", ttl=seconds)
        for node in sites.values()
    ]


def open_exchange(grid, seconds=20.0):
    def find():
        return {f"site-{node}": node for node in grid.get_node_ids()}

    return Exchange(grid, ask, find, seconds, Live(grid.run_dir, 1)), find()


def said(replies):
    """What came, in order: a node's content or an error's code."""
    return [r.error.code if r.has_error() else r.content["info"]["node"] for r in replies]


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    monkeypatch.setattr(Remote, "run_dir", tmp_path, raising=False)
    monkeypatch.setattr(exchange, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(exchange, "CLOSED_SECONDS", (0.1, 0.2))


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_site_is_asked_again_after_a_failure_that_may_pass(code):
    grid = Remote({1000: [code, code, "ok"], 1001: ["ok"]})
    sent, sites = open_exchange(grid)
    assert sorted(said(sent.replies(sites))) == [1000, 1001]
    facts = sent.sites["site-1000"].facts()
    assert (facts["asked"], facts["failures"]) == (3, 2 * [f"code {code}"])
    assert set(sent.sites["site-1001"].facts()) == {"seconds"}


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7])
def test_a_refusal_or_a_broken_app_is_not_asked_again(code):
    grid = Remote({1000: [code, "ok"]})
    sent, sites = open_exchange(grid)
    assert said(sent.replies(sites)) == [code]
    assert grid.asked == [1000]


def test_a_site_that_fails_every_time_is_given_up():
    grid = Remote({1000: [8] * 50, 1001: ["ok"]})
    sent, sites = open_exchange(grid)
    assert sorted(said(sent.replies(sites))) == [8, 1001]
    assert grid.asked.count(1000) == MOST_FAILURES


def test_a_site_that_is_gone_is_asked_once_it_is_back_under_its_new_number():
    grid = Remote({1000: [5], 1001: ["ok"]})
    sent, _ = open_exchange(grid)
    began = time.monotonic()
    where = {"site": 1000}
    sent._find = lambda: where if time.monotonic() - began > 0.3 else {}

    replies = sent.replies({"site": 1000})
    where["site"] = 1001
    assert said(replies) == [1001]
    assert time.monotonic() - began > 0.3


def test_a_site_that_never_comes_back_is_given_up_at_the_deadline_with_its_last_failure():
    grid = Remote({1000: [5], 1001: ["ok"]})
    sent, sites = open_exchange(grid, seconds=0.4)
    grid.offline.add(1000)
    assert said(sent.replies(sites)) == [1001, 5]
    assert grid.asked == [1000, 1001]


def test_a_site_outside_its_hours_is_asked_again_with_growing_pauses_and_any_number_of_times():
    times = MOST_FAILURES + 2
    grid = Remote({1000: [NOT_NOW] * times + ["ok"]})
    sent, sites = open_exchange(grid)
    began = time.monotonic()
    assert said(sent.replies(sites)) == [1000]
    assert time.monotonic() - began >= 0.1 + (times - 1) * 0.2
    assert sent.sites["site-1000"].facts()["asked"] == times + 1


def test_in_one_process_a_site_outside_its_hours_is_not_waited_for():
    grid = Remote({1000: [NOT_NOW, "ok"]})
    _, sites = open_exchange(grid)
    one = Exchange(grid.inner, ask, lambda: sites, 20.0, Live(grid.run_dir, 1))
    assert said(one.replies(sites)) == [NOT_NOW]


def test_missing_replies_are_given_up_at_the_deadline():
    grid = Remote({1000: [None], 1001: ["ok"]})
    sent, sites = open_exchange(grid, seconds=0.3)
    began = time.monotonic()
    assert said(sent.replies(sites)) == [1001]
    assert 0.3 <= time.monotonic() - began < 5
    assert sent.sites["site-1000"].facts() == {}


def test_replies_are_handed_over_in_the_order_of_their_coming():
    class Late(Remote):
        """A site's reply comes at the so manieth look, that of the first at the first."""

        looks = 0

        def pull_messages(self, message_ids):
            self.looks += 1
            number = 3 - int(message_ids[0].rpartition("-")[2])
            return super().pull_messages(message_ids) if self.looks > 3 * number else []

    grid = Late({1000: ["ok"], 1001: ["ok"], 1002: ["ok"]})
    sent, sites = open_exchange(grid)
    assert said(sent.replies(sites)) == [1002, 1001, 1000]


def test_a_message_that_the_superlink_does_not_take_is_sent_again():
    class Full(Remote):
        pushes = 0

        def push_messages(self, messages):
            self.pushes += 1
            return [] if self.pushes == 1 else super().push_messages(messages)

    grid = Full({1000: ["ok"]})
    sent, sites = open_exchange(grid)
    assert said(sent.replies(sites)) == [1000]
    assert sent.sites["site-1000"].facts()["failures"] == [
        "the message could not be handed to the SuperLink"
    ]


def test_a_site_that_is_lost_and_one_that_is_asked_again_are_told_while_they_are(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(live, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(exchange, "AGAIN_SECONDS", 0.05)
    grid = Remote({1000: [5, "ok"], 1001: ["ok"], 1002: [None]})
    sites = {"a": 1000, "b": 1001, "c": 1002}
    now = Live(tmp_path, 1)
    now.begin_round(1)
    sent = Exchange(grid, ask, lambda: sites, 0.8, now)
    replies = sent.replies(sites)
    assert said([next(replies)]) == [1001]
    now.beat()
    a = read_live(tmp_path)["sites"]["a"]
    assert (a["state"], a["reason"]) == ("asked again", "code 5")
    grid.offline = {1002}
    assert said(replies) == [1000]
    assert read_live(tmp_path)["sites"]["c"]["state"] == "lost"


def pauses(monkeypatch, waiting, size, count=100):
    """What passes between looks of an exchange that gets no reply."""
    grid = Remote({1000 + i: [] for i in range(waiting)})
    grid.pull_interval = 3.0
    sent, sites = open_exchange(grid, seconds=1e6)
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds
        if len(slept) == count:
            raise InterruptedError

    def keep(messages):
        return [f"message-{number}" for number in range(len(messages))]

    grid.push_messages, grid.pull_messages = keep, lambda numbers: []
    monkeypatch.setattr(exchange, "count_bytes", lambda content: size)
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(exchange.time, "sleep", sleep)
    sent._moved, sent._deadline = 0.0, 1e6
    with pytest.raises(InterruptedError):
        list(sent.replies(sites))
    return slept


def test_pauses_are_short_at_first_and_as_flowers_after_half_a_minute(monkeypatch):
    slept = pauses(monkeypatch, waiting=3, size=10_000)
    assert slept[:10] == pytest.approx([0.3] * 10)
    assert slept == sorted(slept)
    assert slept[-1] == 3.0
    assert sum(seconds < 3 for seconds in slept) < 40


def test_pauses_are_long_at_once_while_a_large_state_is_on_its_way(monkeypatch):
    assert pauses(monkeypatch, waiting=3, size=200_000_000, count=5)[0] == 2.0
    assert set(pauses(monkeypatch, waiting=3, size=400_000_000, count=5)) == {3.0}


def test_pauses_are_longer_where_many_sites_are_asked_for(monkeypatch):
    assert pauses(monkeypatch, waiting=50, size=0, count=2)[0] == 1.5


def test_pauses_are_short_again_after_a_reply(monkeypatch):
    grid = Remote({1000: ["ok"], 1001: []})
    sent, sites = open_exchange(grid)
    sent._longest = 3.0
    replies = sent.replies(sites)
    next(replies)
    sent._moved -= 100
    assert sent._pause() == 3.0
    grid.script[1001] = ["ok"]
    sent._send({"site-1001": 1001})
    assert sent._pause() == pytest.approx(0.3, abs=0.05)
    sent._moved -= 100
    next(replies)
    assert sent._pause() == pytest.approx(0.3, abs=0.05)
