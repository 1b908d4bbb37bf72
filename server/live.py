"""What happens now: RUN/live.json, which the server writes and whoever looks at the run reads.

RUN/live.json
  round, rounds   the round that runs, of how many
  phase, since    one of PHASES, and when it began
  deadline        when the phase ends at the latest; null where it has no end
  beat_seconds    so often the file is written in this phase, whatever happens; null: not promised
  steps           of pretraining on phantoms, before round 1: done, of how many; else null
  first_step      of these that `since` counts from; null until it is done
  written         when it was written last
  sites           site -> state (one of STATES), since, reason
Times are Unix seconds. A server that was killed leaves its last word: whether it lives is told by
RUN/lock, which the system frees with the process.

**Guarantees**:
    - A kill at any instant leaves a whole file, the one before or the new one.
    - It holds nothing of a site but its name, its state and what its reply said, in one printable
      line: a reason cannot carry a terminal's escapes.
    - It is written at each change of phase, and otherwise at most twice a second.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from core.admission import printable
from core.checkpoint import write_atomically
from server.roster import SITE_NAME

LOG = logging.getLogger("fedmermed.server")
FILE: Final = "live.json"
WRITE_SECONDS: Final = 0.5
PHASES: Final = (
    "starting", "pretraining", "waiting for sites", "training", "screening", "aggregating",
    "finished", "failed", "stopped",
)  # fmt: skip
ENDED: Final = frozenset({"finished", "failed", "stopped"})
STATES: Final = (
    "connected", "asked", "asked again", "lost", "admitted", "rejected", "error", "silent",
    "absent", "quarantined",
)  # fmt: skip
"""lost: asked, and not connected since. From 'admitted' on: what its round came to."""


class Live:
    """Keeps RUN/live.json while a server works on the run directory, which it holds.

    Args:
        run: The run directory.
        rounds: Rounds of the study.
    """

    def __init__(self, run: Path, rounds: int) -> None:
        self._file = run / FILE
        self._rounds = rounds
        self._round = 0
        self._phase: dict[str, Any] = {"phase": "starting", "since": time.time()}
        self._sites: dict[str, dict[str, Any]] = {}
        self._changed = True
        self._written = -WRITE_SECONDS

    def begin_round(self, number: int) -> None:
        """A round begins; what sites did in the one before is in the history."""
        self._round, self._sites = number, {}

    def phase(
        self, phase: str, *, seconds: float | None = None, beat_seconds: float | None = None
    ) -> None:
        """A phase begins.

        Args:
            phase: One of PHASES.
            seconds: It lasts no longer.
            beat_seconds: So often `beat` will be called.
        """
        assert phase in PHASES
        now = time.time()
        deadline = None if seconds is None else now + seconds
        self._phase = {
            "phase": phase, "since": now, "deadline": deadline, "beat_seconds": beat_seconds,
        }  # fmt: skip
        self._write()

    def pretraining(self, done: int, steps: int) -> None:
        """So many steps on phantoms are done; the first call, with none, begins the phase.

        It begins anew with the first step that is done here: until then phantoms are drawn, which
        tells no rate, and steps of an earlier server cost this one nothing.
        """
        if done == 0 or self._phase.get("first_step") is None:
            first = done or None
            self._phase = {"phase": "pretraining", "since": time.time(), "first_step": first}
        self._phase["steps"], self._changed = (done, steps), True
        self.beat()

    def site(self, name: str, state: str, reason: str = "") -> None:
        """A site's state, written with the next beat."""
        assert state in STATES
        before, reason = self._sites.get(name, {}), printable(reason)
        if (before.get("state"), before.get("reason")) == (state, reason):
            return
        since = before["since"] if before.get("state") == state else time.time()
        self._sites[name] = {"state": state, "since": since, "reason": reason}
        self._changed = True

    def outcomes(self, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        """What became of sites in this round, as the history will have it."""
        for name, outcome in outcomes.items():
            self.site(name, outcome["outcome"], outcome.get("reason", ""))

    def beat(self) -> None:
        """The server is at work; writes what has changed, or that nothing has."""
        quiet = time.monotonic() - self._written
        beat = self._phase.get("beat_seconds")
        if quiet >= WRITE_SECONDS and (self._changed or (beat is not None and quiet >= beat)):
            self._write()

    def _write(self) -> None:
        facts = {
            "round": self._round,
            "rounds": self._rounds,
            **self._phase,
            "written": time.time(),
            "sites": self._sites,
        }
        # Not synced: it is of no use after a power cut, and a round must not wait for a disk.
        try:
            write_atomically(self._file, json.dumps(facts).encode() + b"\n", sync=False)
        except OSError as error:  # no reason for a study to end
            LOG.warning("'%s' cannot be written: %s", self._file, error)
        self._changed, self._written = False, time.monotonic()


def read_live(run: Path) -> dict[str, Any] | None:
    """What the server wrote last, of the names above and those alone; None without a whole file."""
    try:
        facts = json.loads((run / FILE).read_bytes())
        sites = {
            name: {
                "state": _one_of(STATES, site["state"]),
                "since": _time(site["since"]),
                "reason": printable(str(site["reason"])),
            }
            for name, site in facts["sites"].items()
            if SITE_NAME.fullmatch(name)
        }
        found = {
            "round": int(facts["round"]),
            "rounds": int(facts["rounds"]),
            "phase": _one_of(PHASES, facts["phase"]),
            "since": _time(facts["since"]),
            "written": _time(facts["written"]),
        }
        for name in ("deadline", "beat_seconds"):
            found[name] = None if facts.get(name) is None else _time(facts[name])
        found["steps"] = found["first_step"] = None
        if facts.get("steps") is not None:
            found["steps"] = _steps(*facts["steps"])
            if facts.get("first_step") is not None:
                found["first_step"], _ = _steps(facts["first_step"], facts["steps"][0])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        return None
    return {**found, "sites": sites}


def _time(value: Any) -> float:
    if not 0 <= float(value) < 1e11:
        raise ValueError(f"{value} is no time")
    return float(value)


def _steps(done: Any, steps: Any) -> tuple[int, int]:
    if not 0 <= int(done) <= int(steps):
        raise ValueError(f"{done} of {steps} steps")
    return int(done), int(steps)


def _one_of(words: tuple[str, ...], word: Any) -> str:
    if word not in words:
        raise ValueError(f"'{word}' is none of {words}")
    return str(word)
