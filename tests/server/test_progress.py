"""What a study that runs in this process says of itself."""

import io
import logging
import time

import pytest
from rich.console import Console

from server.progress import shown_progress
from server.study import initial_state

LOG = logging.getLogger("fedmermed.server")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set forward."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(console):
    return console.file.getvalue().splitlines()


def pretrained(step, steps=100):
    LOG.info("pretraining, step %d", step, extra={"pretrained": (step, steps)})


def trained(site, round_number, step):
    LOG.info("", extra={"step": (site, round_number, step, 2.0)})


def test_rounds_are_timed_from_the_end_of_pretraining_and_it_by_itself(make_recipe, clock):
    console = Console(file=io.StringIO(), width=200)
    with shown_progress(console, make_recipe(rounds=10, local_steps=1), sites=2, done=0):
        clock[0] += 900  # it draws
        pretrained(40)
        clock[0] += 60
        pretrained(50)
        clock[0] += 300
        pretrained(100)
        for site in "ab":
            clock[0] += 30
            trained(site, 1, 1)
    assert lines(console) == [
        "pretraining, step 40",
        "pretraining, step 50, about 5 min left",
        "pretraining, step 100",
        "round 1/10 a step 1/1 loss 2.000, about 10 min left",
        "round 1/10 b step 1/1 loss 2.000, about 9 min left",
    ]


def test_rounds_of_another_process_are_timed_by_what_the_first_took(make_recipe, clock):
    console = Console(file=io.StringIO(), width=200)
    with shown_progress(console, make_recipe(rounds=21, local_steps=1), sites=1, done=0):
        clock[0] += 1200  # it pretrained meanwhile
        seconds = {"wait_for_sites": 900.0, "exchange": 25.0, "aggregate": 5.0}
        site = {"outcome": "admitted", "num_examples": {}}
        line = {"round": 1, "sites": {"a": site}, "metrics": {}, "seconds": seconds}
        LOG.info("", extra={"line": line})
    assert lines(console)[0].endswith(", about 10 min left")


def test_later_rounds_are_timed_without_the_first_which_fills_memories(make_recipe, clock):
    console = Console(file=io.StringIO(), width=200)
    line = {"sites": {}, "metrics": {}, "seconds": {}}
    with shown_progress(console, make_recipe(rounds=21, local_steps=1), sites=1, done=0):
        for number, seconds in ((1, 600), (2, 60), (3, 120)):
            clock[0] += seconds
            trained("a", number, 1)
            LOG.info("", extra={"line": {"round": number, **line}})
    left = [text.rpartition(", about ")[2] for text in lines(console)[1::2]]
    assert left == ["200 min left", "19 min left", "27 min left"]


def test_on_a_terminal_pretraining_has_a_bar_of_its_own(make_recipe):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with shown_progress(console, make_recipe(), sites=2, done=0):
        pretrained(50)
    assert "pretraining on phantoms" in console.file.getvalue()
    assert "50/100" in console.file.getvalue()
    assert "pretraining, step 50" not in console.file.getvalue()


def test_pretraining_says_that_it_begins_before_it_draws(make_recipe, caplog):
    recipe = make_recipe()
    with caplog.at_level(logging.INFO, logger="fedmermed.server"):
        initial_state(recipe)
        assert caplog.messages == []
        model = recipe.model.model_copy(update={"phantom_steps": 1})
        steps = []
        begun = recipe.model_copy(update={"model": model})
        initial_state(begun, lambda *counts: steps.append((*counts, len(caplog.messages))))
    assert steps == [(0, 1, 1), (1, 1, 1)]  # the first word before the first step
    assert caplog.messages[0] == "pretraining on phantoms: drawing them, then 1 steps"
    assert caplog.records[-1].pretrained == (1, 1)
