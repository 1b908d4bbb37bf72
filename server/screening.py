"""Screening: what a round's updates look like beside each other, before they are averaged.

When all replies are in, copies are rejected, every update gets its figures in the history, and
those that stand out are reported by site. Figures of a site:
  update_norm  length of what it changed in the student
  norm_ratio   that, in units of the lower median of the round's sites
  cosine       between its change and the weighted mean of the others' changes, each cut to the
               median length, so that a long one does not turn the mean against all others

Cost: the students on disk are read twice more, array by array, and twice again in a round in which
some pull against the others; memory for few arrays.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Final

import numpy as np

from core.checkpoint import Arrays
from core.config import Recipe
from core.wire import GlobalState, SiteUpdate
from server.aggregate import balanced_weights
from server.history import Line
from server.robust import bound_updates

LOG = logging.getLogger("fedmermed.server")
COSINE_LIMIT: Final = -0.15
"""A site below it pulls against all others. Honest sites do so now and then (figures are in
benchmarks/README.md): one that does so round after round is worth a look, which is no proof."""
AGREEMENT: Final = 0.1
"""Cosine that the others must have among themselves, the middle one of them, for a site to be odd
beside them. Without it honest sites that pull apart, as with few steps a round, would be reported
in most rounds; a flipped sign cannot be told there."""
ROUNDS_AGAINST: Final = 3
"""Rounds in a row after which a site below the limit is reported."""
FEWEST_TO_COMPARE: Final = 3
"""Of two updates nobody can tell which is the odd one."""


@dataclass(frozen=True)
class Screened:
    """A round's updates, ready to be averaged."""

    updates: dict[str, SiteUpdate]
    """Site -> its update, cut to the bound where it was longer."""
    outliers: list[Line]
    """site, figure, value, limit, words; in site order."""


def screen(
    recipe: Recipe,
    state: GlobalState,
    lines: Sequence[Line],
    updates: Mapping[str, SiteUpdate],
    outcomes: dict[str, Line],
) -> Screened:
    """Reject copies, note the figures, report outliers, and cut what the recipe says.

    Args:
        recipe: The study.
        state: What the sites were sent.
        lines: The history of the rounds before.
        updates: Site -> its admitted update.
        outcomes: Site -> its outcome; rejections and figures are written into it.

    **Guarantees**:
        - A student that any site sent in an earlier round, bit for bit, is rejected; so are all
          sites that send the same one in this round, since nobody can tell who copied. A site that
          changed nothing is no copy. With site privacy copies are not looked for: each counts for
          one site, cut like any other.
        - Without an outlier, updates are handed on as they are.
        - The result does not depend on the order in which the sites answered.
    """
    private = recipe.privacy.mode == "site"  # where no site may decide whether another counts
    for site, reason in ({} if private else _copies(lines, updates, outcomes)).items():
        words = f"site '{site}', round {len(lines) + 1}: {reason}; update rejected"
        outcomes[site] = {"outcome": "rejected", "reason": words}
        LOG.warning("%s", words)
    left = {site: updates[site] for site in sorted(updates) if _admitted(outcomes[site])}
    if not left:
        return Screened({}, [])
    median = median_low([outcomes[site]["update_norm"] for site in left])
    for site, cosine in cosines(left, outcomes, state.student, median).items():
        outcomes[site]["norm_ratio"] = _ratio(outcomes[site]["update_norm"], median)
        outcomes[site]["cosine"] = cosine
    outliers: list[Line] = []
    if len(left) >= FEWEST_TO_COMPARE:
        against = _against(left, lines, outcomes, state.student, median)
        for site in left:
            outliers += _outliers(site, outcomes[site], recipe, median, against=site in against)
    for outlier in outliers:
        LOG.warning("round %d: %s", len(lines) + 1, outlier["words"])
    if recipe.federation.robust == "norm_bound":
        left, factors = bound_updates(left, outcomes, state, recipe.federation.norm_bound)
        for site, factor in factors.items():
            outcomes[site]["scaled_by"] = factor
            LOG.warning(
                "round %d: site '%s': its update is cut to %.3g of its length",
                len(lines) + 1, site, factor,
            )  # fmt: skip
    return Screened(left, outliers)


def cosines(
    updates: Mapping[str, SiteUpdate], outcomes: Mapping[str, Line], sent: Arrays, median: float
) -> dict[str, float | None]:
    """Cosine of each site's change with the mean of the others'; None where there is none.

    The others' mean is the mean of all less the site's own part, so that n sites need not be
    compared in pairs: with d_i the changes, v_i their weights times their cut and s = sum of v_i
    d_i, it has the direction of s - v_i d_i.
    """
    weights = balanced_weights({site: update.num_examples for site, update in updates.items()})
    norms = {site: float(outcomes[site]["update_norm"]) for site in weights}
    share = {s: w * min(1.0, median / norms[s]) if norms[s] else 0.0 for s, w in weights.items()}
    dots, square = dict.fromkeys(weights, 0.0), 0.0
    for name, start in sent.items():
        whole = np.zeros(start.shape)
        for site in weights:
            whole += share[site] * (updates[site].student[name].astype(np.float64) - start)
        square += float(np.square(whole).sum())
        for site in weights:
            change = updates[site].student[name].astype(np.float64) - start
            dots[site] += float((change * whole).sum())
    found: dict[str, float | None] = {}
    for site, norm in norms.items():
        own = share[site]
        inner = dots[site] - own * norm**2
        others = square - 2 * own * dots[site] + own**2 * norm**2
        length = np.sqrt(max(others, 0.0)) * norm
        found[site] = float(np.clip(inner / length, -1, 1)) if length > 0 else None
    return found


def _admitted(outcome: Line) -> bool:
    return bool(outcome["outcome"] == "admitted")


def _ratio(norm: float, median: float) -> float | None:
    """None where one site moved and the median site did not."""
    if median:
        return norm / median
    return None if norm else 0.0


def _copies(
    lines: Sequence[Line], updates: Mapping[str, SiteUpdate], outcomes: Mapping[str, Line]
) -> dict[str, str]:
    """Site -> whose student it sent again."""
    before: dict[str, str] = {}
    for line in lines:
        for site, outcome in line["sites"].items():
            if "digest" in outcome:
                words = f"it sent the student that site '{site}' sent in round {line['round']}"
                before.setdefault(outcome["digest"], words)
    senders: dict[str, list[str]] = {}
    for site in sorted(updates):
        if outcomes[site]["update_norm"]:  # the state as it was sent is no copy of a site's
            senders.setdefault(outcomes[site]["digest"], []).append(site)
    found: dict[str, str] = {}
    for digest, sites in senders.items():
        for site in sites:
            others = " and ".join(f"'{other}'" for other in sites if other != site)
            if digest in before:
                found[site] = before[digest]
            elif others:
                found[site] = f"it sent the same student as site {others}"
    return found


def _against(
    updates: Mapping[str, SiteUpdate],
    lines: Sequence[Line],
    outcomes: Mapping[str, Line],
    sent: Arrays,
    median: float,
) -> set[str]:
    """Sites, fewer than half, that pulled for some rounds against others that pull together."""
    rounds = [*(line["sites"] for line in lines[1 - ROUNDS_AGAINST :]), outcomes]
    found = set(updates)
    for seen in rounds:
        cosines_seen = {site: seen.get(site, {}).get("cosine") for site in found}
        found = {s for s, c in cosines_seen.items() if c is not None and c < COSINE_LIMIT}
    if not found or len(rounds) < ROUNDS_AGAINST or 2 * len(found) >= len(updates):
        return set()
    others = {site: update for site, update in updates.items() if site not in found}
    among = [c for c in cosines(others, outcomes, sent, median).values() if c is not None]
    return found if among and median_low(among) >= AGREEMENT else set()


def _outliers(
    site: str, outcome: Line, recipe: Recipe, median: float, *, against: bool
) -> list[Line]:
    """What stands out of one site; `against`: it pulls against the others round after round."""
    found: list[tuple[str, Any, float, str]] = []
    norm, bound, cosine = outcome["update_norm"], recipe.federation.norm_bound, outcome["cosine"]
    if norm > bound * median:
        ratio = outcome["norm_ratio"]
        shown = "many" if ratio is None else f"{ratio:.3g}"
        words = f"its update is {shown} times as long as the median site's, more than {bound:g}"
        found.append(("norm_ratio", ratio, bound, words))
    if against:
        words = (
            f"its update points against the other sites' in round after round: cosine "
            f"{cosine:.2f}, less than {COSINE_LIMIT:g}"
        )
        found.append(("cosine", cosine, COSINE_LIMIT, words))
    return [
        {"site": site, "figure": f, "value": v, "limit": limit, "words": f"site '{site}': {words}"}
        for f, v, limit, words in found
    ]
