"""Record privacy at a site: a round is paid for before it leaves, once, and never beyond."""

import os
import shutil

import numpy as np
import pytest

import core.private_round
from client.policy import PolicyRefusal
from client.rounds import Request, answer
from client.site import load_site
from client.spending import FILE
from core.initial import initial_state
from core.privacy.accounting import epsilon, round_events, study_events
from core.privacy.ledger import Ledger
from core.wire import Prototypes, SiteUpdate

STUDY = "ab" * 16
DECLARED = "declared_images.ct = 100\n"


@pytest.fixture
def site_file(make_sites):
    return make_sites({"st-mary": ["ct"]}, policy=DECLARED)[0]


@pytest.fixture
def quick(monkeypatch):
    """In place of training: weights that no other try draws, as noise would make them."""
    trained = []

    def private_round(recipe, received, shards, private, *, first_step, declared, **_):
        trained.append(first_step)
        student = {
            n: np.frombuffer(os.urandom(a.size), np.uint8).reshape(a.shape).astype(np.float32)
            for n, a in received.student.items()
        }
        number = first_step // recipe.federation.local_steps + 1
        update = SiteUpdate(
            round_number=number, student=student, teacher=dict(student),
            prototypes=Prototypes({}, {}), num_examples=dict(declared), metrics={},
        )  # fmt: skip
        return update, {}

    monkeypatch.setattr(core.private_round, "private_round", private_round)
    return trained


def ask(site_file, recipe, number=1, study=STUDY):
    arrays = initial_state(recipe).to_arrays()
    step = (number - 1) * recipe.federation.local_steps
    return answer(load_site(site_file), Request(study, number, step, recipe, arrays))


def ledger(site_file):
    return Ledger(site_file.parent / "state" / FILE)


def test_a_round_is_paid_once_however_often_it_is_asked_for(site_file, make_record_recipe, quick):
    recipe = make_record_recipe()
    first, trained = ask(site_file, recipe)
    again, retrained = ask(site_file, recipe)
    assert (trained, retrained, len(quick)) == (True, False, 1)
    assert first.student["head.layers.0.bias"].tobytes() == (
        again.student["head.layers.0.bias"].tobytes()
    )
    assert len(ledger(site_file).charged(STUDY, 1)) == 1
    due = epsilon(round_events(recipe, 1), recipe.privacy.delta)
    assert ledger(site_file).epsilon(recipe.privacy.delta) == due
    assert first.metrics == {"epsilon": due}


def test_the_last_rounds_epsilon_is_the_studys(site_file, make_record_recipe, quick):
    recipe = make_record_recipe(prototype_releases=1)
    ask(site_file, recipe, 1)
    update, _ = ask(site_file, recipe, 2)
    due = epsilon(study_events(recipe), recipe.privacy.delta)
    assert update.metrics == {"epsilon": pytest.approx(due, rel=1e-9)}


def test_a_round_beyond_the_ceiling_is_refused_before_an_image_is_read(
    site_file, make_record_recipe, quick
):
    recipe = make_record_recipe()
    one = epsilon(round_events(recipe, 1), 1e-5)
    both = epsilon(study_events(recipe), 1e-5)
    with open(site_file, "a") as file:
        file.write(f"max_epsilon = {(one + both) / 2}\n")
    ask(site_file, recipe, 1)
    shutil.rmtree(site_file.parent / "data" / "ct")  # so that reading would fail otherwise
    with pytest.raises(PolicyRefusal, match=rf"epsilon of {both:.2f} with round 2; its policy"):
        ask(site_file, recipe, 2)
    assert len(quick) == 1


def test_the_ceiling_is_over_all_studies(site_file, make_record_recipe, quick):
    recipe = make_record_recipe()
    both = epsilon(study_events(recipe), 1e-5)
    with open(site_file, "a") as file:
        file.write(f"max_epsilon = {both * 0.99}\n")
    ask(site_file, recipe, 1)
    with pytest.raises(PolicyRefusal, match="over all studies"):
        ask(site_file, recipe, 1, study="cd" * 16)
    # A study's own epsilon is its own.
    assert ledger(site_file).epsilon(1e-5, study="cd" * 16) == 0


def test_a_lower_ceiling_holds_a_stored_reply_back(site_file, make_record_recipe, quick):
    recipe = make_record_recipe()
    ask(site_file, recipe)
    with open(site_file, "a") as file:
        file.write("max_epsilon = 0.01\n")
    with pytest.raises(PolicyRefusal, match=r"allows 0\.01 over all studies"):
        ask(site_file, recipe)


def test_a_reply_trained_without_privacy_is_no_answer_with_it(
    site_file, make_record_recipe, make_recipe, quick
):
    ask(site_file, make_recipe())
    with pytest.raises(PolicyRefusal, match="trained before without record privacy"):
        ask(site_file, make_record_recipe())


def test_a_damaged_ledger_stops_the_site(site_file, make_record_recipe, quick):
    recipe = make_record_recipe()
    ask(site_file, recipe, 1)
    ask(site_file, recipe, 2)
    file = site_file.parent / "state" / FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0][:20] + b"x" + lines[0][21:] + b"".join(lines[1:]))
    with pytest.raises(Exception, match="ledger"):
        ask(site_file, recipe, 2)


def test_a_lost_state_costs_again_as_its_reply_may_have_left(site_file, make_record_recipe, quick):
    recipe = make_record_recipe()
    ask(site_file, recipe)
    shutil.rmtree(site_file.parent / "state" / "studies")
    ask(site_file, recipe)
    assert len(ledger(site_file).charged(STUDY, 1)) == 2
    twice = (*round_events(recipe, 1), *round_events(recipe, 1))
    assert ledger(site_file).epsilon(1e-5) == epsilon(twice, 1e-5)


def test_killed_at_any_operation_on_the_disk_a_round_costs_once(
    site_file, make_record_recipe, quick, kill_points
):
    recipe, state = make_record_recipe(), site_file.parent / "state"
    due = epsilon(round_events(recipe, 1), 1e-5)
    for killed in kill_points(lambda: ask(site_file, recipe)):
        update, _ = ask(site_file, recipe)  # as the coordinator does
        assert ledger(site_file).epsilon(1e-5) == due
        assert update.metrics == {"epsilon": due}
        if killed:
            shutil.rmtree(state)


def test_without_record_privacy_there_is_no_ledger(make_sites, recipe):
    (file,) = make_sites({"st-mary": ["ct"]})
    update, _ = ask(file, recipe)
    assert "epsilon" not in update.metrics
    assert not (file.parent / "state" / FILE).exists()
