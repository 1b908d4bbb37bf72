"""Attendance: for whom a round waits before it begins, and how many updates make it count."""

import time
from collections.abc import Mapping, Sequence
from typing import Final

from flwr.serverapp import Grid

from core.config import FederationConfig
from core.errors import UserError
from server.history import Line
from server.live import Live
from server.roster import Roster

POLL_SECONDS: Final = 1.0


class QuorumError(UserError):
    """A round had fewer sites or admitted updates than the recipe's minimum."""


def last_sites(lines: Sequence[Line]) -> dict[str, Line]:
    """Site -> its outcome in the last round that is done."""
    return lines[-1]["sites"] if lines else {}


def wait_for_sites(
    federation: FederationConfig,
    roster: Roster,
    grid: Grid,
    round_number: int,
    last: Mapping[str, Line],
    expected: int,
    live: Live,
) -> dict[str, int]:
    """Wait for the quorum, and for sites that were here a moment ago.

    A site that took part in the round before is given `grace_seconds` to come back; whoever is not
    connected then is absent from this round.

    Args:
        federation: Quorum and patience.
        roster: Who is who; its round has begun.
        grid: Reaches the sites.
        round_number: The round, for messages.
        last: Site -> its outcome in the round before.
        expected: As many sites are waited for as long as for the quorum, if they are more.
        live: Is told who is here.

    Returns:
        The sites to ask, site -> node, in name order.

    Raises:
        QuorumError: fewer than `min_sites` came in time.
    """
    away, began = ("absent", "quarantined"), time.monotonic()
    awaited = {site for site, outcome in last.items() if outcome["outcome"] not in away}
    awaited -= set(roster.quarantined)
    live.phase(
        "waiting for sites",
        seconds=federation.wait_for_sites_seconds,
        beat_seconds=POLL_SECONDS,
    )
    while True:
        sites = roster.present(grid)
        _tell(live, roster, last, sites)
        waited = time.monotonic() - began
        known = len(sites) + len(roster.refused) + len(roster.quarantined)
        enough = len(sites) >= federation.min_sites
        patience = federation.wait_for_sites_seconds
        if enough and known >= expected:
            patience = federation.grace_seconds if awaited - set(sites) else 0.0
        if waited >= patience or (0 < expected <= known and not enough):
            break
        time.sleep(min(POLL_SECONDS, patience - waited))
    if not enough:
        why = "".join(f"; {reason}" for reason in sorted(set(roster.refused.values())))
        why += "".join(f"; site '{site}' is in quarantine" for site in roster.quarantined)
        raise QuorumError(
            f"round {round_number}: {len(sites)} site(s) connected after {waited:.0f} s, "
            f"{federation.min_sites} needed{why}; start the missing sites and run again: "
            "the study resumes"
        )
    return dict(sorted(sites.items()))


def _tell(live: Live, roster: Roster, last: Mapping[str, Line], sites: Mapping[str, int]) -> None:
    """Say who is connected now, of those who are known."""
    for site, reason in roster.quarantined.items():
        live.site(site, "quarantined", reason)
    for site in {*last, *roster.names.values(), *sites} - set(roster.quarantined):
        live.site(site, "connected" if site in sites else "absent")
    live.beat()


def require_quorum(
    federation: FederationConfig, round_number: int, outcomes: Mapping[str, Line]
) -> None:
    """Hold that enough updates were admitted.

    Raises:
        QuorumError: they were not; the message has every other site's reason.
    """
    admitted = [site for site, outcome in outcomes.items() if outcome["outcome"] == "admitted"]
    if len(admitted) >= federation.min_sites:
        return
    failed = [
        outcome["reason"]
        if outcome["outcome"] == "rejected"  # such a reason names the site
        else f"site '{site}' {outcome['outcome']}: {outcome['reason']}"
        for site, outcome in outcomes.items()
        if outcome["outcome"] != "admitted"
    ]
    raise QuorumError(
        f"round {round_number}: {len(admitted)} of {len(outcomes)} sites admitted, "
        f"{federation.min_sites} needed ({'; '.join(failed)}); mend the sites and "
        f"run again: the study resumes after round {round_number - 1}"
    )
