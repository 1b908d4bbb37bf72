"""What site privacy costs, said before a study begins."""

import importlib.util
import math

import numpy as np
import pytest

from core.initial import initial_state
from core.privacy.accounting import epsilon, study_events
from core.wire import GlobalState
from server.history import Checkpoint, open_run
from server.privacy_cost import cost_words, count_weights, noise_words, planned_epsilon
from server.release import commit


@pytest.fixture
def recipe(make_site_recipe):
    return make_site_recipe({"rounds": 3}, noise_multiplier=2.0, delta=1e-3)


@pytest.fixture
def run(tmp_path, recipe):
    """A run directory whose network has 7 numbers."""
    run = open_run(tmp_path / "run", recipe)
    run.load(lambda: state(7))
    return run


def state(weights):
    arrays = {"w": np.zeros(weights, np.float32)}
    return GlobalState(student=arrays, teacher=arrays)


def test_epsilon_and_whom_to_trust_are_told_before_the_first_round(run, recipe):
    first, second = cost_words(run, recipe)
    spent = epsilon(study_events(recipe), 1e-3)
    assert f"epsilon {spent:.3g} at delta 0.001 after 3 rounds" in first
    assert "this server sees every update in clear and has to be trusted" in first
    assert second.startswith(f"noise on the mean update: {2 * math.sqrt(7) / 3:.3g} clips long")


def test_the_noise_of_a_whole_network_is_said_to_drown_what_few_sites_learn():
    # The table of a fifty-site study with 5.5 million weights: 3.4 sqrt(5.5e6) / 50 = 159 clips.
    words = noise_words(3.4, 5_500_000, 50)
    assert "159 clips long (3.4 x sqrt(5,500,000 weights) / 50 sites)" in words
    assert "it drowns what the sites learn" in words
    assert "privacy.mode = 'record'" in words


def test_few_weights_at_many_sites_are_not_said_to_drown():
    words = noise_words(4.2, 2048, 1000)
    assert "0.19 clips long" in words
    assert "drowns" not in words


def test_nothing_is_told_of_a_study_without_site_privacy(tmp_path, make_recipe):
    recipe = make_recipe()
    assert cost_words(open_run(tmp_path / "plain", recipe), recipe) == []


def test_weights_are_counted_in_the_initial_state_or_the_network_that_would_be_drawn(
    tmp_path, run, recipe
):
    assert count_weights(run, recipe) == 7
    fresh = open_run(tmp_path / "fresh", recipe)
    expected = sum(array.size for array in initial_state(recipe).student.values())
    assert count_weights(fresh, recipe) == expected
    assert not fresh.checkpoint_path(0).exists()


def test_without_torch_and_weights_the_noise_is_left_out(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fresh = open_run(tmp_path / "fresh", recipe)
    assert count_weights(fresh, recipe) is None
    assert len(cost_words(fresh, recipe)) == 1


def test_what_is_told_holds_what_is_spent_and_what_is_to_come(run, recipe):
    whole = epsilon(study_events(recipe), 1e-3)
    assert planned_epsilon(run, recipe) == whole
    commit(run, recipe, Checkpoint(1, state(7), {}), {"round": 1, "metrics": {}})
    assert planned_epsilon(run, recipe) == whole


def test_rounds_that_were_done_twice_are_told(run, recipe):
    commit(run, recipe, Checkpoint(1, state(7), {}), {"round": 1, "metrics": {}})
    run.checkpoint_path(1).unlink()
    assert run.heal() == []
    assert planned_epsilon(run, recipe) > epsilon(study_events(recipe), 1e-3)
