import math

import numpy as np
import pytest

from core.privacy.audit import BOUND_ERROR, DELTA, epsilon_bound, gap, judge, p_value
from core.privacy.bounds import gaussian_epsilon


def test_p_value_without_delta_is_the_binomial_tail():
    assert p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(0.5**2)
    assert p_value(2, 2, 2, math.log(3), 0.0) == pytest.approx(0.75**2)
    assert p_value(2, 2, 1, math.log(3), 0.0) == pytest.approx(1 - 0.25**2)
    assert p_value(2, 2, 0, 1.0, 0.0) == 1


def test_p_value_adds_what_delta_may_do():
    # One right guess in two has mass .5, one or none .75: the larger of .5 / 1 and .75 / 2.
    assert p_value(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 2 * 2 * 0.01 * 0.5)


@pytest.mark.parametrize(("guesses", "ceiling"), [(1000, 5.8), (300, 4.6), (100, 3.5)])
def test_even_right_guesses_alone_show_no_more_than_the_ceiling(guesses, ceiling):
    found = epsilon_bound(1000, guesses, guesses, 0.05)
    assert found == pytest.approx(ceiling, abs=0.05)
    assert p_value(1000, guesses, guesses, found, DELTA) == pytest.approx(0.05, rel=1e-2)


def test_guesses_no_better_than_a_coin_show_nothing():
    assert epsilon_bound(1000, 1000, 510, 0.05) == 0


def test_bound_holds_for_a_mechanism_of_known_epsilon():
    # Randomised response: each toss is told truly with probability e / (1 + e), so epsilon is 1.
    draws = np.random.default_rng(0)
    right = draws.binomial(300, math.e / (1 + math.e), size=2000)
    numbers, times = np.unique(right, return_counts=True)
    above = times @ [epsilon_bound(300, 300, n, BOUND_ERROR) > 1 for n in numbers.tolist()] / 2000
    assert 0.005 < above <= BOUND_ERROR  # close to its error, or it would be blunt


def test_gap_is_the_distance_in_deviations():
    draws = np.random.default_rng(0)
    member = draws.random(20_000) < 0.5
    size, least = gap(member, draws.normal(size=20_000) * 3 + 6 * member, 0.001)
    assert size == pytest.approx(2, abs=0.05)
    # 3.09 deviations of sqrt(4 / 20,000 + 2^2 / 40,000) below it.
    assert size - least == pytest.approx(3.09 * math.sqrt(3e-4), rel=0.02)


def test_scores_without_noise_lie_infinitely_far_apart():
    member = np.arange(10) % 2 == 0
    assert gap(member, member * 2.0, 0.001) == (math.inf, math.inf)


def test_verdict_takes_the_view_that_tells_most():
    draws = np.random.default_rng(0)
    member = draws.random(1000) < 0.5
    blind, open_ = draws.normal(size=1000), member + 0.1 * draws.normal(size=1000)
    verdict = judge(member, {"blind": blind, "open": open_}, claimed_gap=0.5)
    assert (verdict.exposed_by, verdict.flagged) == ("open", True)
    assert verdict.bound_flagged
    assert verdict.gap_flagged
    assert verdict.found_epsilon == pytest.approx(verdict.ceiling)
    assert verdict.claimed_epsilon == gaussian_epsilon(0.5, DELTA)


def test_a_claim_above_the_ceiling_is_called_beyond_the_guesses():
    draws = np.random.default_rng(0)
    member = draws.random(200) < 0.5
    views = {"sent": draws.normal(size=200)}
    assert judge(member, views, claimed_gap=0.5).conclusive
    assert not judge(member, views, claimed_gap=3.0).conclusive
