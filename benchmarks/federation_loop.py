"""A federation in one process, round by round, by the product's own functions.

What a site does is core.site_round (or what an arm puts in its place); what the coordinator does is
its own admission, quarantine, screening and aggregation. Left out are messages, processes and
files, which change no number in transport float32: tests/benchmarks compares the last weights with
those of `fedmermed-server simulate`, bit for bit.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.admission import Rejected, admit, update_norm
from core.checkpoint import Arrays, sha256_arrays
from core.config import Recipe, recipe_from_json
from core.initial import initial_state
from core.shards import Shard
from core.site_round import site_round
from core.wire import GlobalState, Prototypes, SiteUpdate, flatten
from server.aggregate import aggregate
from server.attendance import require_quorum
from server.quarantine import quarantined
from server.screening import screen

SiteRound = Callable[..., tuple[SiteUpdate, Arrays]]
"""Called as core.site_round.site_round."""
Merge = Callable[..., tuple[GlobalState, dict[str, Prototypes], dict[str, float]]]
"""Called as server.aggregate.aggregate."""


def same(recipe: Recipe) -> Recipe:
    """The recipe as it is."""
    return recipe


@dataclass(frozen=True)
class Arm:
    """One way of federating: what differs from the product's."""

    recipe: Callable[[Recipe], Recipe] = same
    initial: Callable[[Recipe], GlobalState] = initial_state
    site_round: SiteRound = site_round
    merge: Merge = aggregate
    measured: str = "teacher"
    """Or "student": whose backbone is the result."""


@dataclass
class Federation:
    """Where a federation stands."""

    recipe: Recipe
    state: GlobalState
    contributions: dict[str, Prototypes] = field(default_factory=dict)
    private: dict[str, Arrays] = field(default_factory=dict)
    """Site -> what it keeps on its disk."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """A line a round, as in history.jsonl, as far as the next round depends on it."""
    steps: int = 0
    """Of all sites together."""
    cpu_seconds: float = 0.0
    """Of all rounds."""


def changed(recipe: Recipe, **sections: Mapping[str, Any]) -> Recipe:
    """A recipe with other values in some sections, checked as a file would be."""
    table = recipe.model_dump(mode="json")
    for name, values in sections.items():
        table[name] |= values
    return recipe_from_json(json.dumps(table), "an arm's recipe")


def federate(
    recipe: Recipe,
    sites: Mapping[str, Sequence[Shard]],
    answering: Callable[[int], Sequence[str]],
    arm_of: Callable[[int], Arm],
    on_round: Callable[[int, GlobalState], None] = lambda number, state: None,
    *,
    device: str = "cpu",
) -> Federation:
    """Run all rounds of a recipe.

    Args:
        recipe: The study; an arm changes it round by round.
        sites: Name -> shards.
        answering: Round, from 1 -> who takes part in it, at least one site.
        arm_of: Round -> how it is done; that of round 1 makes the first state.
        on_round: Called with each round's number and the state after it.
        device: Of all sites.

    Raises:
        QuorumError: fewer updates than `min_sites` were admitted in a round.
    """
    first = arm_of(1)
    federation = Federation(recipe, first.initial(first.recipe(recipe)))
    for number in range(1, recipe.federation.rounds + 1):
        began = time.process_time()
        _round(federation, sites, answering(number), arm_of(number), number, device)
        federation.cpu_seconds += time.process_time() - began
        on_round(number, federation.state)
    return federation


def _round(
    federation: Federation,
    sites: Mapping[str, Sequence[Shard]],
    answering: Sequence[str],
    arm: Arm,
    number: int,
    device: str,
) -> None:
    recipe = arm.recipe(federation.recipe)
    steps, state = recipe.federation.local_steps, federation.state
    with tempfile.TemporaryDirectory() as directory:  # quarantine.json follows from the lines
        held = quarantined(Path(directory), federation.lines, recipe.federation.quarantine_after)
    updates: dict[str, SiteUpdate] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    for site in sorted(set(answering) - set(held)):
        update, federation.private[site] = arm.site_round(
            recipe, state, sites[site], federation.private.get(site, {}),
            site=site, first_step=(number - 1) * steps, device=device,
        )  # fmt: skip
        federation.steps += steps
        outcomes[site] = _outcome(recipe, state, update, site, number)
        if outcomes[site]["outcome"] == "admitted":
            updates[site] = update
    screened = screen(recipe, state, federation.lines, updates, outcomes)
    require_quorum(recipe.federation, number, outcomes)
    known = {s: p for s, p in federation.contributions.items() if s not in held}
    federation.state, federation.contributions, _ = arm.merge(
        recipe, state, known, screened.updates, round_number=number
    )
    line = {"round": number, "sites": outcomes, "outliers": screened.outliers, "held": held}
    federation.lines.append(line)


def _outcome(
    recipe: Recipe, state: GlobalState, update: SiteUpdate, site: str, number: int
) -> dict[str, Any]:
    """What the coordinator notes of a reply, as server.replies does."""
    try:
        admit(
            update.to_arrays(), update.to_metrics(), site=site, round_number=number,
            reference=state, recipe=recipe,
        )  # fmt: skip
    except Rejected as rejected:
        return {"outcome": "rejected", "reason": str(rejected)}
    facts = {
        "outcome": "admitted",
        "metrics": update.metrics,
        "digest": sha256_arrays(flatten(update.student, {}, Prototypes({}, {}))),
        "update_norm": update_norm(update.student, state.student),
    }
    if update.teacher:
        facts["teacher_norm"] = update_norm(update.teacher, state.teacher)
    return facts
