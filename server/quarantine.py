"""Quarantine: sites that are not asked any more, until the coordinator releases them.

RUN/quarantine.json
  held      site -> reason, and after which round it was put there; by_hand tells who did
  released  site -> after which round the coordinator released it last

A site is held when it was rejected, or reported for the length of its update, in `quarantine_after`
of its rounds in a row. Rounds in which it gave no update to judge (silent, absent, error) count
neither way, and rounds before its release do not count. The direction of its updates alone holds
nobody: at the end of a study, when updates are short, an honest site with a modality of its own may
point against all others (benchmarks/README.md); the report names it, and the coordinator decides.

Who is held follows from history.jsonl and the file alone: a server that is killed at any time comes
to the same sites when it resumes.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.checkpoint import read_json, write_json
from core.errors import UserError
from server.history import Line, read_history
from server.roster import SITE_NAME

Held = dict[str, dict[str, Any]]
FILE = "quarantine.json"


def quarantined(run: Path, lines: Sequence[Line], after: int) -> dict[str, str]:
    """Who is not asked in the next round, and why; what follows from the history is written down.

    Args:
        run: The run directory.
        lines: The history of the rounds done.
        after: So many bad rounds in a row; 0: the history holds nobody.
    """
    with _changed(run) as (held, released):
        for site in [s for s, entry in held.items() if _undone(entry, lines)]:
            del held[site]
        for site, reasons in _bad_rounds(lines, released).items():
            if after and len(reasons) >= after and site not in held:
                reason = f"{len(reasons)} bad rounds in a row, the last: {reasons[-1]}"
                held[site] = {"reason": reason, "after_round": len(lines), "by_hand": False}
        return {site: str(entry["reason"]) for site, entry in sorted(held.items())}


def manage(run: Path, site: str | None, *, release: bool) -> list[str]:
    """List, add by hand, or release; a running study takes it up at its next round.

    Args:
        run: The run directory.
        site: Whom to add or release; None lists.
        release: Release instead of adding.

    Returns:
        Lines to show.

    Raises:
        UserError: no such run or site, or the site is not held.
    """
    if not (run / "recipe.json").exists():
        raise UserError(f"'{run}' is not a run directory; give the directory of a study")
    lines = read_history(run)
    with _changed(run) as (held, released):
        if site is None:
            shown = [f"{name}: {entry['reason']}" for name, entry in sorted(held.items())]
            return shown or ["no site is in quarantine"]
        if release:
            if site not in held:
                names = ", ".join(sorted(held)) or "none"
                raise UserError(f"site '{site}' is not in quarantine (held: {names})")
            del held[site]
            released[site] = len(lines)
            return [f"site '{site}' is asked again from the next round on"]
        known = {name for line in lines for name in line["sites"]}
        if site not in known:
            if not SITE_NAME.fullmatch(site):
                raise UserError(f"'{site}' cannot be a site's name; check its spelling")
            note = [f"note: no site of that name is in the history ({len(lines)} rounds done)"]
        else:
            note = []
        reason = f"put there by the coordinator after round {len(lines)}"
        held[site] = {"reason": reason, "after_round": len(lines), "by_hand": True}
        return [*note, f"site '{site}' is not asked from the next round on"]


def _undone(entry: dict[str, Any], lines: Sequence[Line]) -> bool:
    """Whether it rests on a round that is no longer done."""
    return not entry["by_hand"] and entry["after_round"] > len(lines)


def _bad_rounds(lines: Sequence[Line], released: dict[str, int]) -> dict[str, list[str]]:
    """Site -> why, of each of its last rounds that were bad, in order; a good one ends the row."""
    found: dict[str, list[str]] = {}
    for line in lines:
        found_long = [o for o in line.get("outliers", ()) if o["figure"] == "norm_ratio"]
        outliers = {o["site"]: str(o["words"]) for o in found_long}
        for site, outcome in line["sites"].items():
            if line["round"] <= released.get(site, 0):
                continue
            if outcome["outcome"] == "rejected":
                found.setdefault(site, []).append(outcome["reason"])
            elif site in outliers:
                found.setdefault(site, []).append(f"round {line['round']}: {outliers[site]}")
            elif outcome["outcome"] == "admitted":
                found.pop(site, None)
    return found


@contextmanager
def _changed(run: Path) -> Iterator[tuple[Held, dict[str, int]]]:
    """The file's contents, written back if they were changed; server and command take turns."""
    path = run / FILE
    directory = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        before = read_json(path) if path.exists() else {"held": {}, "released": {}}
        held, released = dict(before["held"]), dict(before["released"])
        yield held, released
        if (changed := {"held": held, "released": released}) != before:
            write_json(path, changed)
    finally:
        os.close(directory)
