"""Upper bounds on the epsilon of composed Gaussian mechanisms, with and without sampling.

Nothing here imports torch or scipy until a bound with sampling is asked for: the server has
neither, and needs only the closed form.
"""

import functools
import math
import warnings
from typing import Final

from core.privacy.own_logging import own_logging

Parts = tuple[tuple[float, float, int], ...]
"""(sigma, sampling rate, steps), each pair of the first two once, in order."""

ORDERS: Final[tuple[float, ...]] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(*range(12, 64), 64, 80, 96, 128, 192, 256, 384, 512, 768, 1000),
)
"""Of Renyi divergences; the least bound over all of them holds."""
PRV_ERROR: Final = 0.01
"""By which epsilon may be overstated: the accountant returns its upper bound."""
PRV_POINTS: Final = 1 << 20
"""Of its grid, which take a second or two; where more are needed, the error is up to ten times."""
PRV_DELTA: Final = 1e-9
"""Below, rounding in its Fourier transforms is not small beside delta."""
PRV_EPSILON: Final = 50.0
"""Above, its grid is large and the figure without meaning."""
WEAK: Final = 0.1
"""Noise below which sampling is not counted on, which costs more: its formulas leave range."""


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism, `mu` its sensitivity over its deviation.

    Solves delta = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu), theorem 8 of Balle and Wang,
    for eps; the upper end of the last interval is returned.
    """

    def excess(eps: float) -> float:
        # Beyond 700 the exponential overflows; without its term, delta is overstated.
        second = math.exp(eps) * _phi(-mu / 2 - eps / mu) if eps < 700 else 0.0
        return _phi(mu / 2 - eps / mu) - second

    if excess(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= delta else (middle, high)
    return high


def _phi(x: float) -> float:
    """Distribution function of the standard normal."""
    return math.erfc(-x / math.sqrt(2)) / 2


def renyi_epsilon(parts: Parts, delta: float) -> float:
    """The bound of Renyi accounting, by theorem 21 of Balle et al. 2020, arXiv 1905.09982."""
    return max(
        0.0,
        min(
            cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
            for order, cost in zip(ORDERS, _renyi_costs(parts), strict=True)
        ),
    )


@functools.lru_cache(maxsize=256)
def _renyi_costs(parts: Parts) -> tuple[float, ...]:
    """The Renyi divergence of each order, all parts together."""
    with own_logging():
        from opacus.accountants.analysis.rdp import compute_rdp

    totals = [0.0] * len(ORDERS)
    for sigma, rate, steps in parts:
        if sigma < WEAK:
            costs = [steps * order / sigma / sigma / 2 for order in ORDERS]
        else:
            found = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
            costs = [max(float(cost), 0.0) for cost in found]  # rounding takes some below 0
        totals = [total + cost for total, cost in zip(totals, costs, strict=True)]
    return tuple(totals)


@functools.lru_cache(maxsize=256)
def sampled_epsilon(parts: Parts, delta: float) -> float:
    """The lower of the two bounds, where that on the privacy loss variables can be had."""
    renyi = renyi_epsilon(parts, delta)
    delta_error = delta / 1000
    steps = sum(count for _, _, count in parts)
    half_width = renyi_epsilon(parts, delta_error / 4) + 3  # what Opacus cuts the loss off at
    points = 2 * half_width * math.sqrt(steps * math.log(12 / delta_error) / 2) / PRV_ERROR
    error = PRV_ERROR * max(1.0, points / PRV_POINTS)
    if renyi > PRV_EPSILON or delta < PRV_DELTA or error > 10 * PRV_ERROR:
        return renyi
    with own_logging():
        from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, count) for sigma, rate, count in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(1 - rate) at rate 1; its own Renyi orders
        bound = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    if not math.isfinite(bound):
        raise ArithmeticError(f"Opacus' accountant finds epsilon {bound} for {parts} at {delta}")
    return min(max(bound, 0.0), renyi)
