"""What noise buys: epsilon of any sequence of releases, and what one round of a recipe costs.

Adjacency is adding or removing one unit (a patient in mode 'record', a site in mode 'site').
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from core.errors import UserError
from core.privacy.bounds import PRV_ERROR, Parts, gaussian_epsilon, renyi_epsilon, sampled_epsilon

if TYPE_CHECKING:
    from core.config import Recipe

Kind = Literal["gradients", "prototypes", "site"]

COUNT_NOISE: Final = 2.0
"""Deviation of the noise on the counts of prototypes, in units of that on their sums."""


@dataclass(frozen=True)
class Event:
    """Equal Gaussian mechanisms of sensitivity 1, each on a Poisson sample of the units."""

    kind: Kind
    sigma: float
    """Deviation of the noise over the sensitivity."""
    sampling_rate: float
    """The chance of each unit to take part; 1 is no sampling."""
    steps: int

    def __post_init__(self) -> None:
        if not (
            self.kind in ("gradients", "prototypes", "site")
            and 0 < self.sigma < math.inf
            and 0 < self.sampling_rate <= 1
            and type(self.steps) is int
            and self.steps >= 1
        ):
            raise ValueError(
                f"{self} is no event: expected a known kind, sigma above 0, a sampling rate above "
                "0 and at most 1, and at least one step"
            )


def sigma_eff(sigma_sums: float, sigma_counts: float) -> float:
    """The one multiplier of two Gaussian releases on the same units, each of sensitivity 1."""
    return float((sigma_sums**-2 + sigma_counts**-2) ** -0.5)


def releases_prototypes(recipe: "Recipe", round_number: int) -> bool:
    """Whether prototypes leave in a round (1, 2, ...): a function of the recipe alone.

    Mode 'record': in `privacy.prototype_releases` rounds, evenly spread, of which the last is one.
    Else: in every round, unless the recipe has no prototypes.
    """
    rounds = recipe.federation.rounds
    if not 1 <= round_number <= rounds:
        raise ValueError(f"round {round_number} is not one of the recipe's {rounds}")
    if recipe.privacy.mode != "record":
        return recipe.federation.prototypes_per_modality > 0
    releases = recipe.privacy.prototype_releases
    return round_number * releases // rounds > (round_number - 1) * releases // rounds


def round_events(recipe: "Recipe", round_number: int) -> tuple[Event, ...]:
    """What a round (1, 2, ...) costs, a function of the recipe alone; nothing in mode 'none'.

    In mode 'site' the noise on the units' prototypes is drawn at the server, as that on updates.
    """
    privacy = recipe.privacy
    sigma = privacy.noise_multiplier
    if privacy.mode == "none":
        return ()
    if privacy.mode == "record":
        steps = recipe.federation.local_steps
        events = [Event("gradients", sigma, privacy.sampling_rate, steps)]
    else:
        events = [Event("site", sigma, 1.0, 1)]
    if releases_prototypes(recipe, round_number):
        noise = privacy.prototype_noise
        events.append(Event("prototypes", sigma_eff(noise, COUNT_NOISE * noise), 1.0, 1))
    return tuple(events)


def study_events(recipe: "Recipe", first: int = 1, last: int | None = None) -> tuple[Event, ...]:
    """What some rounds of a study cost together: from `first` to `last`, both included.

    Args:
        recipe: The study's.
        first: 1, 2, ...
        last: The recipe's last round if it is not given.
    """
    steps: dict[tuple[Kind, float, float], int] = {}
    for number in range(first, (recipe.federation.rounds if last is None else last) + 1):
        for event in round_events(recipe, number):
            key = event.kind, event.sigma, event.sampling_rate
            steps[key] = steps.get(key, 0) + event.steps
    return tuple(Event(*key, steps[key]) for key in sorted(steps))


def epsilon(
    events: Iterable[Event], delta: float, accountant: Literal["prv", "rdp"] = "prv"
) -> float:
    """An upper bound on the epsilon of all events together, at `delta`.

    **Guarantees**:
        - Order and grouping of the events change no bit of the result.
        - Without sampling the bound is exact but for rounding: the composition is one Gaussian
          mechanism, whose curve is known (Balle and Wang, ICML 2018, arXiv 1805.06530).
        - With sampling it is the upper bound of Opacus' accountant of privacy loss variables (Gopi
          et al., NeurIPS 2021, arXiv 2106.02848), 0.01 above its estimate in general and 0.1 at
          most; or that of Renyi accounting where this is smaller, or where the former is not
          reliable (delta below 1e-9, epsilon above 50). Either is valid.

    Args:
        events: In any order; none at all cost 0.
        delta: Between 0 and 1.
        accountant: prv: as above; rdp: Renyi accounting alone, a looser cross-check.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; expected a value between 0 and 1")
    parts = merge(events)
    if not parts:
        return 0.0
    if accountant == "rdp":
        return renyi_epsilon(parts, delta)
    if all(rate == 1 for _, rate, _ in parts):
        mu = math.hypot(*(math.sqrt(steps) / sigma for sigma, _, steps in parts))
        return gaussian_epsilon(mu, delta)
    return sampled_epsilon(parts, delta)


def merge(events: Iterable[Event]) -> Parts:
    """Events by noise and sampling rate: composition does not mind order or kind.

    Opacus takes 200 s for a history of 100 entries that says the same as one of two.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = event.sigma, event.sampling_rate
        steps[key] = steps.get(key, 0) + event.steps
    return tuple((*key, steps[key]) for key in sorted(steps))


def noise_for(
    target: float, delta: float, sampling_rate: float, steps: int, others: Sequence[Event] = ()
) -> float:
    """The least noise multiplier, to a thousandth, with which training keeps an epsilon.

    Args:
        target: The epsilon that training and `others` may cost together.
        delta: As in `epsilon`.
        sampling_rate: Of each step.
        steps: How many.
        others: What else is released, such as prototypes.

    Raises:
        UserError: no noise is enough.
    """

    def fits(sigma: float) -> bool:
        return epsilon([Event("gradients", sigma, sampling_rate, steps), *others], delta) <= target

    spent = epsilon(others, delta)
    low, high = 0, 1000  # in thousandths
    while spent >= target or not fits(high / 1000):
        low, high = high, 2 * high
        if spent >= target or high > 1e7:
            raise UserError(
                f"no noise keeps epsilon at {target:g}: what is released beside the training costs "
                f"{spent:.3g}, and bounds are {PRV_ERROR:g} wide; raise epsilon or release less"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle / 1000) else (middle, high)
    return high / 1000
