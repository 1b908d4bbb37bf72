"""What a coordinator should look at now, each in words and with what to do."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.collapse import alarm
from core.config import Recipe
from core.modalities import TITLES
from server.tally import Tally

QUIET_SECONDS: Final = 60.0
"""A server that promised to be heard of more often is stuck."""
ROUNDS_ON_DISK: Final = 3
"""The disk is nearly full where no so many more rounds fit."""
LEVELS: Final = ("stop", "act", "look")
"""The study stands or goes wrong; somebody must act for it to be whole; worth a look."""


@dataclass(frozen=True)
class Alarm:
    """One thing to look at."""

    level: str
    kind: str
    """server, collapse, quorum, quarantine, absent, rejected, error, budget, modality, outlier,
    refused, disk, history"""
    site: str
    """Empty where it is not of one site."""
    words: str
    what_to_do: str


@dataclass(frozen=True)
class Facts:
    """What alarms are raised from."""

    state: str
    words: str
    live: dict[str, Any] | None
    """What the server says of itself, while it runs."""
    now: float
    run: Path
    recipe: Recipe
    tally: Tally
    sites: Mapping[str, tuple[str, str]]
    """site -> its state (server.live.STATES) and reason"""
    holds: Mapping[str, str]
    """Site in quarantine -> why."""
    figures: Mapping[str, Mapping[str, float]]
    """modality -> metric -> last mean over sites"""


def alarms(facts: Facts) -> list[Alarm]:
    """All alarms of a study, the gravest first."""
    found = [
        *_server(facts), *_collapse(facts), *_quorum(facts), *_quarantine(facts), *_sites(facts),
        *_modalities(facts), *_outliers(facts), *_disk(facts),
    ]  # fmt: skip
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def _server(facts: Facts) -> Iterator[Alarm]:
    again = "run the study again: it resumes after the last round that is done"
    if facts.state == "failed":
        yield Alarm("stop", "server", "", f"the study failed: {facts.words}", again)
    if facts.state == "not heard of":
        yield Alarm("stop", "server", "", facts.words, again)
    live = facts.live
    if live and live["beat_seconds"] is not None:
        quiet = facts.now - live["written"]
        if quiet > max(QUIET_SECONDS, 10 * live["beat_seconds"]):
            yield Alarm(
                "act", "server", "",
                f"the server lives and has said nothing for {quiet:.0f} s",
                "is the SuperLink up and the disk fast enough? see logs in the coordinator's "
                "directory",
            )  # fmt: skip
    if facts.tally.damaged:
        line = facts.tally.rounds + 1
        yield Alarm(
            "act", "history", "", f"line {line} of history.jsonl is damaged",
            "run the study again: it goes on from the round before",
        )  # fmt: skip


def _collapse(facts: Facts) -> Iterator[Alarm]:
    told = False
    for words in facts.tally.alarms:
        what, _, advice = words.partition("; ")
        site = what.partition("'")[2].partition("'")[0]
        told = True
        yield Alarm("stop", "collapse", site if site in facts.tally.sites else "", what, advice)
    if not told:  # the mean may show what no single site does
        for modality, figures in facts.figures.items():
            if found := alarm({f"{n}/{modality}": v for n, v in figures.items()}, modality):
                what, _, advice = found.partition("; ")
                yield Alarm("stop", "collapse", "", what, advice)


def _quorum(facts: Facts) -> Iterator[Alarm]:
    needed, live = facts.recipe.federation.min_sites, facts.live
    if live and live["phase"] == "waiting for sites":
        here = sum(site["state"] == "connected" for site in live["sites"].values())
        if here < needed:
            yield Alarm(
                "act", "quorum", "",
                f"{here} of at least {needed} sites are connected; without them the study fails "
                f"{_in(live['deadline'], facts.now)}",
                "call the sites that are missing",
            )  # fmt: skip
        return
    outcomes = [site.outcome for site in facts.tally.sites.values()]
    admitted = outcomes.count("admitted")
    if admitted == needed < len(outcomes) and facts.state != "finished":
        yield Alarm(
            "look", "quorum", "",
            f"round {facts.tally.rounds} had {admitted} updates and needs {needed}: one site less "
            "ends the study",
            "bring missing sites back",
        )  # fmt: skip


def _quarantine(facts: Facts) -> Iterator[Alarm]:
    for site, reason in facts.holds.items():
        yield Alarm(
            "act", "quarantine", site, f"site '{site}' is in quarantine: {reason}",
            "find out why with the site, then: fedmermed-server quarantine "
            f"{facts.run} {site} --release",
        )  # fmt: skip


def _sites(facts: Facts) -> Iterator[Alarm]:
    if facts.state == "finished":
        return
    for name in sorted(set(facts.sites) - set(facts.holds)):
        past, (state, reason) = facts.tally.sites.get(name), facts.sites[name]
        if facts.live is None and state in ("lost", "asked again"):
            continue  # nobody asks it any more
        if state in ("lost", "absent", "silent"):
            words = {
                "lost": "was asked and is not connected any more",
                "absent": "is not connected",
                "silent": "did not answer before the deadline",
            }[state]
            last = f"; its last update was in round {past.last_admitted}" if past else ""
            yield Alarm(
                "act", "absent", name, f"site '{name}' {words}{last}",
                "ask the site for `fedmermed-site status` and the log of `fedmermed-site join`",
            )  # fmt: skip
        elif state == "asked again":
            yield Alarm(
                "look", "absent", name, f"site '{name}' failed and is asked again: {reason}",
                "nothing, unless it goes on",
            )  # fmt: skip
        elif state == "error" and "epsilon" in reason:
            yield Alarm(
                "act", "budget", name, f"site '{name}' spends no more privacy: {reason}",
                "agree with the site on its max_epsilon, or end the study with the rounds it has",
            )  # fmt: skip
        elif state in ("rejected", "error"):
            words = reason if state == "rejected" else f"site '{name}' gave no update: {reason}"
            yield Alarm("act", state, name, words, "see Messages in docs/operations.md")


def _modalities(facts: Facts) -> Iterator[Alarm]:
    for modality, last in facts.tally.untrained().items():
        names = [n for n, site in facts.tally.sites.items() if site.images.get(modality)]
        back = f"bring back {' or '.join(sorted(names))}, or " if names else ""
        yield Alarm(
            "look", "modality", "",
            f"no site has trained on {TITLES[modality]} since round {last}; the model may lose "
            "what it knew of it",
            f"{back}measure the model on its images with fedmermed-eval before you use it",
        )  # fmt: skip


def _outliers(facts: Facts) -> Iterator[Alarm]:
    for site, words in facts.tally.outliers:
        yield Alarm(
            "look", "outlier", site, f"round {facts.tally.rounds}: {words}",
            "if it goes on, ask the site what it changed; a modality of its own can explain a "
            "direction",
        )  # fmt: skip
    for words in facts.tally.refused:
        yield Alarm(
            "look", "refused", "", f"a node takes no part: {words}", "run fedmermed-server admit"
        )


def _disk(facts: Facts) -> Iterator[Alarm]:
    try:
        free = shutil.disk_usage(facts.run).free
        newest = facts.run / f"round-{facts.tally.rounds:04d}.safetensors"
        size = newest.stat().st_size
    except OSError:
        return
    # A round writes its checkpoint, and as long as it runs, an update of each site.
    needed = size * (ROUNDS_ON_DISK + max(len(facts.tally.sites), 1))
    if free < needed and facts.state != "finished":
        yield Alarm(
            "act", "disk", "",
            f"the disk of the run directory has {free / 1e9:.1f} GB left and the next "
            f"{ROUNDS_ON_DISK} rounds take up to {needed / 1e9:.1f} GB",
            "free some, or set federation.keep_every in the next study",
        )  # fmt: skip


def _in(deadline: float | None, now: float) -> str:
    if deadline is None:
        return "later"
    return f"in {max(deadline - now, 0) / 60:.0f} min"
