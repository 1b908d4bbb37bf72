"""A site's ledger: what was charged is never forgotten, and never charged beyond the ceiling."""

import json
import os
import random
from pathlib import Path

import pytest

from core.config import Recipe, recipe_from_json
from core.privacy.accounting import Event, epsilon, study_events
from core.privacy.ledger import Charge, Ledger, OverBudget

DELTA = 1e-5
STEPS = (Event("gradients", 1.1, 0.02, 20),)
RELEASE = (*STEPS, Event("prototypes", 8.9, 1.0, 1))


def digest(number: int) -> str:
    return f"{number:064x}"


def charge(
    ledger: Ledger,
    number: int,
    *,
    study: str = "a",
    reply: int | None = None,
    events: tuple[Event, ...] = RELEASE,
    ceiling: float | None = None,
) -> None:
    name = digest(number if reply is None else reply)
    ledger.charge(study, number, name, events, delta=DELTA, ceiling=ceiling)


def gaussian(sigma: float) -> tuple[Event, ...]:
    """A round whose epsilon takes no time to find."""
    return (Event("prototypes", sigma, 1.0, 1),)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger.jsonl")


@pytest.fixture
def three(ledger: Ledger) -> Ledger:
    """Three rounds of study a."""
    for number in (1, 2, 3):
        charge(ledger, number)
    return ledger


def test_a_ledger_that_is_not_there_is_empty_and_looking_makes_none(ledger: Ledger) -> None:
    assert ledger.charges() == []
    assert ledger.epsilon(DELTA) == 0
    assert not ledger.path.parent.exists()


def test_charges_come_back_as_they_were_made(ledger: Ledger) -> None:
    charge(ledger, 1, events=STEPS)
    charge(ledger, 1, study="b", reply=9)
    assert ledger.charges() == [
        Charge(study="a", round=1, reply=digest(1), events=STEPS),
        Charge(study="b", round=1, reply=digest(9), events=RELEASE),
    ]
    assert ledger.events() == [*STEPS, *RELEASE]
    assert ledger.events("b") == list(RELEASE)
    assert ledger.charged("b", 1) == [digest(9)]
    assert ledger.charged("b", 2) == []


def test_a_person_can_read_it(three: Ledger) -> None:
    line = json.loads(three.path.read_text().splitlines()[0])
    assert list(line) == ["study", "round", "reply", "events", "sha256"]
    assert line["events"][0] == {
        "kind": "gradients",
        "sigma": 1.1,
        "sampling_rate": 0.02,
        "steps": 20,
    }


def test_any_interleaving_of_studies_costs_what_all_cost_at_once(tmp_path: Path) -> None:
    todo = [(study, number) for study in "abc" for number in range(1, 6)]
    events = {"a": STEPS, "b": RELEASE, "c": gaussian(7.0)}
    at_once = epsilon([e for study, _ in todo for e in events[study]], DELTA)
    for seed in range(5):
        ledger = Ledger(tmp_path / str(seed) / "ledger.jsonl")
        for study, number in random.Random(seed).sample(todo, len(todo)):
            charge(ledger, number, study=study, events=events[study])
        assert ledger.epsilon(DELTA) == at_once
        assert ledger.epsilon(DELTA, "b") == epsilon(RELEASE * 5, DELTA)


def test_the_same_reply_counts_once_and_another_of_the_same_round_again(three: Ledger) -> None:
    before = three.path.read_bytes()
    charge(three, 2)
    assert three.path.read_bytes() == before
    charge(three, 2, reply=7)
    charge(three, 2, study="b")
    assert three.charged("a", 2) == [digest(2), digest(7)]
    assert len(three.charges()) == 5


def test_one_reply_cannot_be_charged_at_two_prices(three: Ledger) -> None:
    with pytest.raises(ValueError, match="was charged as"):
        charge(three, 2, events=STEPS)
    assert len(three.charges()) == 3


def test_a_charge_beyond_the_ceiling_is_refused_and_not_written_down(ledger: Ledger) -> None:
    charge(ledger, 1, ceiling=0.5, events=gaussian(8))  # epsilon .43
    before = ledger.path.read_bytes()
    with pytest.raises(
        OverBudget, match=r"^round 2 of study a would bring .* to 0\.9[0-9]+ at"
    ) as e:
        charge(ledger, 2, ceiling=0.9, events=gaussian(4.5))
    assert "/" not in str(e.value)
    assert ledger.path.read_bytes() == before
    charge(ledger, 2, ceiling=1.2, events=gaussian(4.5))
    charge(
        ledger, 2, ceiling=0.1, events=gaussian(4.5)
    )  # spent already: asked for again, it leaves


def test_other_studies_count_towards_the_ceiling(ledger: Ledger) -> None:
    for study in "abcd":
        charge(ledger, 1, study=study, events=gaussian(8), ceiling=1.0)
    after, allowed = ledger.affords(gaussian(8), DELTA, 1.0)
    assert after == epsilon(gaussian(8) * 5, DELTA) > 1.0
    assert not allowed
    with pytest.raises(OverBudget):
        charge(ledger, 1, study="e", events=gaussian(8), ceiling=1.0)
    assert ledger.affords(gaussian(8), DELTA, after) == (after, True)


def record(rounds: int) -> Recipe:
    table = {
        "loss": {"koleo_weight": 0.0},
        "evaluation": {"every_rounds": 0},
        "federation": {"rounds": rounds, "local_steps": 1},
        "privacy": {
            "mode": "record",
            "sampling_rate": 1.0,
            "noise_multiplier": 5.0,
            "prototype_releases": 3,
        },
    }
    return recipe_from_json(json.dumps(table), "test")


@pytest.mark.parametrize("ceiling", [0.1, 1.2, 2.0, 3.0, 100.0])
@pytest.mark.parametrize("start", [1, 4, 9, 10])
def test_rounds_left_are_those_that_can_be_charged(
    start: int, ceiling: float, ledger: Ledger
) -> None:
    recipe = record(9)
    charge(ledger, 1, study="other", events=gaussian(9))
    for number in range(1, start):
        charge(ledger, number, events=study_events(recipe, number, number))
    left = ledger.rounds_left(recipe, start, DELTA, ceiling)
    charged = 0
    for number in range(start, 10):
        try:
            charge(ledger, number, events=study_events(recipe, number, number), ceiling=ceiling)
        except OverBudget:
            break
        charged += 1
    assert left == charged


def test_processes_at_once_lose_nothing_and_stay_below_the_ceiling(ledger: Ledger) -> None:
    ceiling = epsilon(gaussian(8) * 10, DELTA)
    children = []
    for study in "abcd":
        child = os.fork()
        if child == 0:
            refused = 0
            for number in range(1, 6):
                try:
                    charge(ledger, number, study=study, events=gaussian(8), ceiling=ceiling)
                except OverBudget:
                    refused += 1
            os._exit(refused)
        children.append(child)
    refused = sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert refused == 10
    assert len(ledger.charges()) == 10
    assert ledger.epsilon(DELTA) == ceiling
