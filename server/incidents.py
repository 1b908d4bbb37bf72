"""What went wrong in a study, in words and in time order, from the lines of its history.

The same thing in rounds in a row is one incident: a hospital that is away for a month is one line.
Reasons come from sites; whoever shows them escapes them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from server.history import Line

KINDS: Final = {
    "collapse": "collapse alarm",
    "rejected": "update rejected",
    "outlier": "stood out",
    "quarantined": "in quarantine",
    "error": "error",
    "silent": "late",
    "absent": "absent",
    "asked again": "asked again",
    "refused": "node refused",
}
"""Kinds of incidents as they are shown, the gravest first."""


@dataclass(frozen=True)
class Incident:
    """One thing that happened, in one round or in several in a row.

    Attributes:
        first: Round in which it began.
        last: Last round of the row.
        kind: A key of KINDS.
        site: Whom it concerns; "" if no site is known.
        words: What happened; of several rounds the last one's.
    """

    first: int
    last: int
    kind: str
    site: str
    words: str

    @property
    def rounds(self) -> str:
        """When, in words."""
        if self.first == self.last:
            return f"round {self.first}"
        return f"rounds {self.first} to {self.last}"


def incidents(lines: Sequence[Line]) -> list[Incident]:
    """All incidents of a study, by the round in which they began, then by gravity and site.

    Args:
        lines: The history of its rounds.
    """
    done: list[Incident] = []
    going: dict[tuple[str, str, str], Incident] = {}
    for line in lines:
        now: dict[tuple[str, str, str], Incident] = {}
        for incident in _of_round(line):
            # Figures differ from round to round without making it something else.
            key = incident.kind, incident.site, re.sub(r"-?\d[\d.e+-]*", "#", incident.words)
            before = going.pop(key, now.get(key))
            now[key] = replace(incident, first=before.first) if before else incident
        done += going.values()
        going = now
    order = list(KINDS)
    return sorted(
        [*done, *going.values()], key=lambda i: (i.first, order.index(i.kind), i.site, i.words)
    )


def plain_reason(reason: str, site: str, round_number: int) -> str:
    """A reason without the site, round and outcome that stand beside it."""
    start = f"site '{site}', round {round_number}: "
    return reason.removeprefix(start).removesuffix("; update rejected")


def _of_round(line: Line) -> Iterator[Incident]:
    number = line["round"]
    for words in line["alarms"]:
        found = re.match(r"site '([^']*)': ", words)
        site = found[1] if found else ""
        yield Incident(
            number, number, "collapse", site, words.removeprefix(found[0] if found else "")
        )
    for site, outcome in line["sites"].items():
        kind = outcome["outcome"]
        if kind != "admitted":
            words = plain_reason(outcome.get("reason", ""), site, number)
            yield Incident(number, number, kind if kind in KINDS else "error", site, words)
        for words in dict.fromkeys(outcome.get("failures", ())):
            if words != outcome.get("reason"):
                yield Incident(number, number, "asked again", site, words)
    for outlier in line.get("outliers", ()):
        site = outlier["site"]
        words = outlier["words"].removeprefix(f"site '{site}': ")
        if factor := line["sites"].get(site, {}).get("scaled_by"):
            words += f"; cut to {factor:.2g} of its length"
        yield Incident(number, number, "outlier", site, words)
    for words in line.get("refused_nodes", ()):
        yield Incident(number, number, "refused", "", words)
