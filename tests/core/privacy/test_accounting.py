"""Epsilon against golden values, closed forms and another accountant; what a round costs."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import Recipe, load_recipe, recipe_from_json
from core.errors import UserError
from core.privacy.accounting import (
    Event,
    epsilon,
    merge,
    noise_for,
    releases_prototypes,
    round_events,
    sigma_eff,
    study_events,
)
from core.privacy.bounds import gaussian_epsilon


def sgd(sigma: float, rate: float, steps: int) -> Event:
    return Event("gradients", sigma, rate, steps)


def gaussian(sigma: float, times: int = 1) -> Event:
    return Event("prototypes", sigma, 1.0, times)


def test_golden_values_of_opacus() -> None:
    # Its own tests: 90 epochs at rate .04, which is 2,250 steps, and 2,249 where it rounds down.
    assert epsilon([sgd(1.5, 0.04, 2250)], 1e-5, "rdp") == pytest.approx(7.32911117143, abs=1e-7)
    assert epsilon([sgd(1.5, 0.04, 2249)], 1e-5) == pytest.approx(6.777395712150674, abs=1e-7)


def test_the_private_recipe_costs_what_it_says() -> None:
    file = Path(__file__).parents[3] / "configs" / "private.toml"
    recipe = load_recipe(file)
    assert "epsilon 8 at delta 1e-5" in file.read_text()
    assert recipe.privacy.delta == 1e-5
    assert 7.9 < epsilon(study_events(recipe), 1e-5) <= 8
    assert "noise_multiplier 1.163 gives 3" in file.read_text()
    louder = [sgd(1.163, recipe.privacy.sampling_rate, recipe.total_steps)]
    assert 2.9 < epsilon(louder, 1e-5) <= 3


SIGMA_50 = sigma_eff(30, 60)


@pytest.mark.parametrize(
    ("events", "rdp", "prv"),
    [
        ([sgd(1, 256 / 20_000, 4000)], 5.983, 5.552),
        ([sgd(1, 256 / 20_000, 4000), gaussian(SIGMA_50, 50)], 6.154, 5.716),
        ([gaussian(SIGMA_50, 50)], 1.210, 1.123),
        ([gaussian(1)], 5.222, 4.887),
    ],
)
def test_figures_found_before(events: list[Event], rdp: float, prv: float) -> None:
    assert epsilon(events, 1e-6, "rdp") == pytest.approx(rdp, abs=6e-4)
    assert epsilon(events, 1e-6) == pytest.approx(prv, abs=6e-4)


@pytest.mark.parametrize(
    ("events", "delta", "other"),
    [  # privacy loss distributions of dp-accounting 0.6 at an interval of 1e-4
        ([sgd(1.5, 0.04, 2250)], 1e-5, 6.768787),
        ([sgd(1, 256 / 20_000, 4000)], 1e-6, 5.541293),
        ([sgd(1, 256 / 20_000, 4000), gaussian(SIGMA_50, 50)], 1e-6, 5.707),
        ([sgd(1, 0.05, 60)], 1e-5, 2.856898),
        ([sgd(0.5, 0.05, 1)], 1e-5, 5.516877),
        ([sgd(8, 0.001, 10)], 1e-5, 0.000685),
    ],
)
def test_the_bound_is_above_another_accountant_and_near(
    events: list[Event], delta: float, other: float
) -> None:
    assert other <= epsilon(events, delta) <= other + 0.02


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 20.0, 30.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.05])
def test_the_closed_form_solves_its_equation(mu: float, delta: float) -> None:
    from scipy.stats import norm

    eps = gaussian_epsilon(mu, delta)
    found = norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))
    if eps == 0:
        assert found <= delta
    else:
        assert found == pytest.approx(delta, rel=1e-5)


def test_weak_noise_is_told_as_a_large_epsilon_and_not_as_an_overflow() -> None:
    # sigma .01: mu = 100. The loss is N(mu^2/2, mu^2): epsilon nears mu^2/2 + 4.265 mu at 1e-5.
    assert gaussian_epsilon(100, 1e-5) == pytest.approx(5000 + 426.5, rel=1e-3)
    for rate in (1e-3, 0.5, 1.0):
        assert 1e3 < epsilon([sgd(0.01, rate, 1000)], 1e-5) < math.inf
        assert epsilon([sgd(1e-200, rate, 1)], 1e-5) == math.inf


def test_composition_without_sampling_is_one_gaussian() -> None:
    # 4 times sigma 4 is sigma 2; with sigma 2 it is sigma sqrt 2.
    together = epsilon([gaussian(4, 4), gaussian(2)], 1e-5)
    assert together == pytest.approx(epsilon([gaussian(2**0.5)], 1e-5), rel=1e-12)


def test_two_releases_on_the_same_units_are_one_with_less_noise() -> None:
    assert sigma_eff(3, 4) == pytest.approx(2.4)
    assert epsilon([gaussian(sigma_eff(3, 4))], 1e-5) == pytest.approx(
        epsilon([gaussian(3), gaussian(4)], 1e-5)
    )


def test_order_and_grouping_change_no_bit() -> None:
    steps = [sgd(1.1, 0.02, 7), sgd(0.9, 0.02, 5), gaussian(9.3), sgd(1.1, 0.02, 3)]
    expected = epsilon(steps, 1e-6)
    for order in itertools.permutations(steps):
        assert epsilon(order, 1e-6) == expected
    single = [Event(e.kind, e.sigma, e.sampling_rate, 1) for e in steps for _ in range(e.steps)]
    assert epsilon(single, 1e-6) == expected
    assert merge(single) == ((0.9, 0.02, 5), (1.1, 0.02, 10), (9.3, 1.0, 1))
    weak = [gaussian(sigma) for sigma in (0.7, 1.9, 3.3, 11.0)]
    assert len({epsilon(order, 1e-6) for order in itertools.permutations(weak)}) == 1


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta() -> None:
    def growing(found: list[float]) -> bool:
        return all(a < b for a, b in itertools.pairwise(found))

    for accountant in ("prv", "rdp"):
        steps = [epsilon([sgd(1, 0.05, n)], 1e-5, accountant) for n in (1, 10, 100, 1000)]
        rates = [epsilon([sgd(1, q, 50)], 1e-5, accountant) for q in (0.005, 0.05, 0.3, 0.9, 1)]
        noise = [epsilon([sgd(s, 0.05, 50)], 1e-5, accountant) for s in (8, 4, 2, 1, 0.5)]
        deltas = [epsilon([sgd(1, 0.05, 50)], d, accountant) for d in (1e-2, 1e-4, 1e-6, 1e-8)]
        assert all(map(growing, (steps, rates, noise, deltas)))


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("steps", [1, 200])
def test_renyi_accounting_is_never_below(rate: float, sigma: float, steps: int) -> None:
    events = [sgd(sigma, rate, steps)]
    assert 0 <= epsilon(events, 1e-5) <= epsilon(events, 1e-5, "rdp")


def test_where_the_grid_would_be_too_large_the_renyi_bound_is_told() -> None:
    for event, delta in [(sgd(0.2, 0.1, 100), 1e-5), (sgd(1, 0.01, 100), 1e-12)]:
        assert epsilon([event], delta) == epsilon([event], delta, "rdp") > 0


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0


@pytest.mark.parametrize(
    "values",
    [
        ("gradients", 0.0, 0.1, 1),
        ("gradients", math.nan, 0.1, 1),
        ("gradients", math.inf, 0.1, 1),
        ("gradients", 1.0, 0.0, 1),
        ("gradients", 1.0, 1.1, 1),
        ("gradients", 1.0, 0.1, 0),
        ("gradients", 1.0, 0.1, 1.0),
        ("other", 1.0, 0.1, 1),
    ],
)
def test_what_cannot_be_accounted_is_no_event(values: tuple) -> None:
    with pytest.raises(ValueError, match="is no event"):
        Event(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        epsilon([gaussian(1)], delta)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "others"),
    [(8.0, 0.05, 1000, ()), (1.0, 0.01, 500, (gaussian(20, 5),)), (2.0, 1.0, 10, (gaussian(9),))],
)
def test_the_noise_found_keeps_the_target_and_hardly_more(
    target: float, rate: float, steps: int, others: tuple[Event, ...]
) -> None:
    sigma = noise_for(target, 1e-5, rate, steps, others)
    assert epsilon([sgd(sigma, rate, steps), *others], 1e-5) <= target
    assert epsilon([sgd(sigma - 0.001, rate, steps), *others], 1e-5) > target


def test_a_target_that_other_releases_exceed_is_refused_with_their_cost() -> None:
    with pytest.raises(UserError, match=r"no noise keeps epsilon at 0\.5: .* costs 4\.38"):
        noise_for(0.5, 1e-5, 0.1, 10, [gaussian(1)])


def record(rounds: int, releases: int = 0, **privacy: object) -> Recipe:
    table = {
        "loss": {"koleo_weight": 0.0},
        "evaluation": {"every_rounds": 0},
        "federation": {"rounds": rounds, "local_steps": 7},
        "privacy": {"mode": "record", "prototype_releases": releases, **privacy},
    }
    return recipe_from_json(json.dumps(table), "test")


def site(**federation: object) -> Recipe:
    table = {
        "federation": {
            "rounds": 4,
            "teacher": "rebuild",
            "robust": "none",
            "quarantine_after": 0,
            **federation,
        },
        "privacy": {"mode": "site", "sites": 3, "noise_multiplier": 2.0, "prototype_noise": 5.0},
    }
    return recipe_from_json(json.dumps(table), "test")


@pytest.mark.parametrize("rounds", [1, 2, 7, 50])
def test_releases_are_as_many_as_asked_evenly_spread_and_the_last_round_is_one(rounds: int) -> None:
    for releases in range(rounds + 1):
        recipe = record(rounds, releases)
        found = [n for n in range(1, rounds + 1) if releases_prototypes(recipe, n)]
        assert len(found) == releases
        gaps = [b - a for a, b in itertools.pairwise([0, *found])]
        if releases:
            assert found[-1] == rounds
            assert max(gaps) - min(gaps) <= 1


def test_a_round_of_record_mode_costs_its_steps_and_its_prototypes() -> None:
    recipe = record(4, 2, noise_multiplier=1.3, sampling_rate=0.02, prototype_noise=6.0)
    steps = Event("gradients", 1.3, 0.02, 7)
    assert round_events(recipe, 1) == (steps,)
    # 6 on sums and 12 on counts: 1 / sqrt(1/36 + 1/144) = 12 / sqrt 5
    first, second = round_events(recipe, 2)
    assert first == steps
    assert second == Event("prototypes", second.sigma, 1.0, 1)
    assert second.sigma == pytest.approx(12 / 5**0.5)
    assert study_events(recipe) == (
        Event("gradients", 1.3, 0.02, 28),
        Event("prototypes", second.sigma, 1.0, 2),
    )
    assert study_events(recipe, 1, 3) == (Event("gradients", 1.3, 0.02, 21), second)
    assert study_events(recipe, 3) == (Event("gradients", 1.3, 0.02, 14), second)


def test_a_round_of_site_mode_costs_one_release_and_prototypes_where_there_are_some() -> None:
    first, second = round_events(site(), 1)
    assert first == Event("site", 2.0, 1.0, 1)
    assert second == Event("prototypes", second.sigma, 1.0, 1)
    assert second.sigma == pytest.approx(10 / 5**0.5)
    assert study_events(site(prototypes_per_modality=0)) == (Event("site", 2.0, 1.0, 4),)


def test_a_study_without_privacy_has_no_events() -> None:
    assert study_events(Recipe()) == ()


@pytest.mark.parametrize("number", [0, 5])
def test_a_round_outside_the_study_is_not_costed(number: int) -> None:
    with pytest.raises(ValueError, match="is not one of the recipe's 4"):
        round_events(record(4), number)


def test_without_sampling_neither_torch_nor_scipy_is_needed() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['scipy'] = sys.modules['opacus'] = None\n"
        "from core.privacy.accounting import Event, epsilon\n"
        "print(epsilon([Event('site', 2.0, 1.0, 4), Event('prototypes', 9.0, 1.0, 4)], 1e-5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == epsilon([gaussian(2, 4), gaussian(9, 4)], 1e-5)
