"""An attack on our own private training: does it leak more than the noise it claims allows?

Private training that is wrong in one line still trains and still prints an epsilon. So canaries,
which are patients whose gradient is as easy to see as can be (core.privacy.canaries), are put in or
left out by the toss of a coin each, and one run of the installed code has to hide the tosses. How
many are guessed right bounds epsilon from below (Steinke, Nasr, Jagielski, NeurIPS 2023,
arXiv 2305.08846); how far the two groups lie apart measures the noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from core.privacy.bounds import gaussian_epsilon

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

DELTA: Final = 1e-5
"""At which epsilons are compared; not a recipe's, because the attack is weak at a large one."""
GUESSED: Final = (0.9, 0.3, 0.1)
"""Shares of the canaries that are guessed, the surest ones, fixed before any is looked at."""
BOUND_ERROR: Final = 0.05
"""Chance that a bound is above the true epsilon, all guesses and views of the run together."""
GAP_ERROR: Final = 0.001
"""The same of the gap, which is normal only about."""
AS_SENT: Final = "the weights as they leave"
REPLAYED: Final = "the weights less a second run's from the same seeds"
LARGEST: Final = 50.0
"""Epsilons are looked for up to here."""


@dataclass(frozen=True)
class Verdict:
    """What a run claims and what the attack found."""

    canaries: int
    claimed_epsilon: float
    """At DELTA, of the run's noise, all canaries in every step."""
    found_epsilon: float
    """Epsilon is at least this, with probability 1 - BOUND_ERROR."""
    ceiling: float
    """`found_epsilon` if every guess were right: a larger leak looks no different."""
    claimed_gap: float
    """Distance between the scores of those in and those left out, in deviations of the noise."""
    found_gap: float
    least_gap: float
    """The gap is at least this, with probability 1 - GAP_ERROR."""
    exposed_by: str
    """The view of the run in which the gap was largest."""

    @property
    def bound_flagged(self) -> bool:
        """Whether the guesses disprove the claim."""
        return self.found_epsilon > self.claimed_epsilon

    @property
    def gap_flagged(self) -> bool:
        """Whether there is less noise, or more of a patient, than claimed."""
        return self.least_gap > self.claimed_gap

    @property
    def flagged(self) -> bool:
        """Whether the run leaks more than it claims."""
        return self.bound_flagged or self.gap_flagged

    @property
    def conclusive(self) -> bool:
        """Whether guesses could have disproved the claim at all."""
        return self.ceiling > self.claimed_epsilon


def judge(member: Flags, views: Mapping[str, Floats], claimed_gap: float) -> Verdict:
    """Attack one run.

    **Guarantees**, for private training of which `claimed_gap` is true and canaries that were put
    in by fair, independent tosses:
        - It is flagged by its guesses with probability BOUND_ERROR at most.

    Args:
        member: [m] which canaries were in.
        views: Name -> a score for each canary [m], higher where it seems to have been in: what an
            attacker may make of the run, in several ways.
        claimed_gap: Square root of the number of steps, over the noise multiplier.
    """
    count = len(member)
    error = BOUND_ERROR / (len(views) * len(GUESSED))
    found, ceiling = 0.0, 0.0
    for scores in views.values():
        for share in GUESSED:
            guessed = round(share * count / 2)  # of either kind
            right = _right_guesses(member, scores, guessed)
            found = max(found, epsilon_bound(count, 2 * guessed, right, error))
            ceiling = max(ceiling, epsilon_bound(count, 2 * guessed, 2 * guessed, error))
    gaps = {name: gap(member, scores, GAP_ERROR / len(views)) for name, scores in views.items()}
    exposed = max(gaps, key=lambda name: gaps[name][1])
    return Verdict(
        canaries=count,
        claimed_epsilon=gaussian_epsilon(claimed_gap, DELTA),
        found_epsilon=found,
        ceiling=ceiling,
        claimed_gap=claimed_gap,
        found_gap=gaps[exposed][0],
        least_gap=gaps[exposed][1],
        exposed_by=exposed,
    )


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability with which an (epsilon, delta)-private run lets so many guesses be right.

    Theorem 5.2 of Steinke et al.: the number is at most binomial with success rate
    e^eps / (1 + e^eps), but for what delta adds.

    Args:
        canaries: Put in or left out.
        guesses: How many of these were guessed.
        right: How many guesses were right, 0 to `guesses`.
        epsilon: At least 0.
        delta: Small beside 1 / canaries.
    """
    if right <= 0:
        return 1.0
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, rate))
    fewer = np.arange(1, right + 1)
    mass = np.cumsum(stats.binom.pmf(right - fewer, guesses, rate))  # right - i to right - 1
    return min(1.0, tail + 2 * canaries * delta * float((mass / fewer).max()))


def epsilon_bound(canaries: int, guesses: int, right: int, error: float) -> float:
    """The largest epsilon, at DELTA, that so many right guesses disprove; 0 if none."""
    low, high = 0.0, LARGEST
    if p_value(canaries, guesses, right, low, DELTA) > error:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, DELTA) <= error
        low, high = (middle, high) if refuted else (low, middle)
    return low


def gap(member: Flags, scores: Floats, error: float) -> tuple[float, float]:
    """How far the scores of those in lie above the others', in deviations; and at least how far.

    Args:
        member: [m] which were in; some are, some are not.
        scores: [m], normal about two means.
        error: Chance that the second value is above the truth.

    Returns:
        Infinity twice for scores without any noise.
    """
    inside, outside = scores[member], scores[~member]
    distance = float(inside.mean() - outside.mean())
    variance = (
        inside.var(ddof=1) * (len(inside) - 1) + outside.var(ddof=1) * (len(outside) - 1)
    ) / (len(scores) - 2)
    # Rounding alone is no noise.
    if math.sqrt(variance) <= 1e-6 * abs(distance):
        return math.inf, math.inf
    size = distance / math.sqrt(variance)
    deviation = math.sqrt(1 / len(inside) + 1 / len(outside) + size**2 / (2 * len(scores)))
    return size, size - float(stats.norm.isf(error)) * deviation


def _right_guesses(member: Flags, scores: Floats, each: int) -> int:
    """Right guesses when the `each` highest are said to be in and the `each` lowest to be out."""
    order = np.argsort(scores, kind="stable")
    return int(member[order[len(order) - each :]].sum() + (~member[order[:each]]).sum())
