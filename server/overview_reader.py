"""Reads a run directory into an Overview, again and again while the study runs.

**Guarantees**:
    - Of a site it tells the fields of SiteView and nothing else: its name, and what its replies,
      which its own policy let leave, said of themselves.
    - Every text in it is one printable line; no site and no file can steer a terminal by it.
    - Reading changes nothing in the run directory, and no damaged file but the recipe raises.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from core.admission import printable
from core.checkpoint import read_json
from core.collapse import alarm
from core.config import Recipe
from core.errors import UserError
from core.lock import held
from core.modalities import MODALITIES
from core.wire import COUNTS, EPSILON
from server.alarms import Facts, alarms
from server.history import read_recipe
from server.live import ENDED, read_live
from server.overview import Figure, ModalityView, Overview, PrivacyView, SiteView
from server.quarantine import FILE as QUARANTINE
from server.roster import SITE_NAME
from server.tally import Points, SiteTally, Tally

RECENT: Final = 5
"""Rounds that a trend and a time of arrival rest on."""
PLAN: Final = "privacy.json"
"""What the study will have cost at its end, written by server.study."""
STEADY: Final = 0.01
"""AUROC that changed by no more has not changed."""


class OverviewReader:
    """Looks at a run directory again and again; each time only what is new of the history is read.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "recipe.json").is_file():
            raise UserError(f"'{run}' is not a run directory; give the directory of a study")
        self._run = run
        self._recipe: Recipe = read_recipe(run / "recipe.json")
        self._tally = Tally(run)
        self._prototypes: tuple[int, dict[str, tuple[int, int]]] = (-1, {})

    @property
    def recipe(self) -> Recipe:
        """What the study asks for."""
        return self._recipe

    @property
    def tally(self) -> Tally:
        """The history as it was when `read` was called last."""
        return self._tally

    def read(self) -> Overview:
        """What the run directory tells now."""
        run, now = self._run, time.time()
        serving = held(run / "lock")  # before the files: a server that ends writes them first
        self._tally.read()
        live, failure = read_live(run), _facts(run / "failure.json")
        tally, federation = self._tally, self._recipe.federation
        study = _facts(run / "study.json")
        holds = _held_sites(run)
        state, words = _state(tally.rounds, federation.rounds, serving, live, failure, run)
        running = state in ("running", "waiting for sites", "starting") and live is not None
        # What the server says of a round that is not done is news after its end too.
        news = live["sites"] if live and (running or live["round"] > tally.rounds) else {}
        sites = _sites(tally, news, holds)
        modalities = self._modalities(sites)
        typical = median(tally.seconds[-RECENT:]) if tally.seconds else None
        left = None
        if typical is not None and running and live is not None:
            begun = now - live["since"] if live["round"] > tally.rounds else 0.0
            left = max(typical * (federation.rounds - tally.rounds) - min(begun, typical), 0.0)
        steps = live["steps"] if running and live else None
        steps_left, first = None, live["first_step"] if live else None
        if steps and first is not None and steps[0] > first and live:
            a_step = (live["written"] - live["since"]) / (steps[0] - first)
            steps_left = a_step * (steps[1] - steps[0])
        facts = Facts(
            state=state, words=words, live=live if running else None, now=now, run=run,
            recipe=self._recipe, tally=tally, holds=holds,
            sites={name: (site.state, site.reason) for name, site in sites.items()},
            figures={m: {n: f.last for n, f in v.figures.items()} for m, v in modalities.items()},
        )  # fmt: skip
        return Overview(
            name=printable(self._recipe.name),
            study=printable(str(study.get("study", ""))),
            began=printable(str(study.get("began", ""))),
            state=state,
            state_words=words,
            phase=live["phase"] if running and live else "",
            since=live["since"] if live else None,
            deadline=live["deadline"] if running and live else None,
            steps=steps,
            steps_left=steps_left,
            written=live["written"] if live else None,
            round=max(tally.rounds, live["round"] if live else 0),
            rounds_done=tally.rounds,
            rounds=federation.rounds,
            round_seconds=typical,
            seconds_left=left,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            min_sites=federation.min_sites,
            privacy=_privacy(self._recipe, tally, run),
            sites=sites,
            modalities=modalities,
            alarms=tuple(alarms(facts)),
            now=now,
        )

    def _modalities(self, sites: dict[str, SiteView]) -> dict[str, ModalityView]:
        if self._prototypes[0] != self._tally.rounds:
            self._prototypes = (self._tally.rounds, _prototypes(self._run, self._tally.rounds))
        views = {}
        for modality in MODALITIES:
            images = [n for site in sites.values() if (n := site.images.get(modality))]
            series = self._tally.series.get(modality, {})
            if images or series:
                count, patients = self._prototypes[1].get(modality, (0, 0))
                figures = {metric: _figure(points) for metric, points in series.items()}
                views[modality] = ModalityView(
                    self._verdict(modality, figures),
                    sum(images),
                    len(images),
                    figures,
                    count,
                    patients,
                )
        return views

    def _verdict(self, modality: str, figures: dict[str, Figure]) -> str:
        if modality in self._tally.untrained():
            return "untrained"
        means = {f"{metric}/{modality}": figure.last for metric, figure in figures.items()}
        told = any(f"{modality}: collapse" in words for words in self._tally.alarms)
        if told or alarm(means, modality):
            return "collapse"
        if self._recipe.privacy.mode == "record":
            return "private"
        auroc = figures.get("knn_auroc")
        if auroc is None or auroc.change is None:
            return "unlabelled" if auroc is None else "too early"
        if abs(auroc.change) <= STEADY:
            return "steady"
        return "better" if auroc.change > 0 else "worse"


def _figure(points: Points) -> Figure:
    number, last = points[-1]
    before = points[-1 - RECENT :][0][1]
    return Figure(last, number, last - before if len(points) > 1 else None)


def _state(
    done: int,
    rounds: int,
    serving: bool,
    live: dict[str, Any] | None,
    failure: dict[str, Any],
    run: Path,
) -> tuple[str, str]:
    """The study's state, and why."""
    phase = live["phase"] if live else ""
    if serving:
        if phase in ENDED or not live:  # what the server before it wrote
            return "starting", ""
        return ("waiting for sites" if phase == "waiting for sites" else "running"), ""
    if done >= rounds:
        return "finished", ""
    if failure:
        return "failed", printable(str(failure.get("reason", "")))
    if phase == "stopped" or _facts(run / "run.json").get("stopped"):
        return "stopped", "somebody stopped it"
    if live and phase not in ENDED:
        return "not heard of", "its server ended without a word: killed, or the machine went down"
    return ("stopped", "no server works on it") if done else ("not started", "")


def _sites(
    tally: Tally, now: dict[str, dict[str, Any]], holds: dict[str, str]
) -> dict[str, SiteView]:
    views = {}
    for name in sorted({*tally.sites, *now, *holds}):
        past, present = tally.sites.get(name, SiteTally()), now.get(name)
        if present:
            state, since, reason = present["state"], present["since"], present["reason"]
        else:
            state, since, reason = past.outcome or "unknown", None, past.reason
        views[name] = SiteView(
            state=state, since=since, reason=reason, last_admitted=past.last_admitted,
            rounds=dict(past.rounds), rejected_reason=past.rejected_reason, seconds=past.seconds,
            bytes_up=past.bytes_up, images=dict(past.images), quarantine=holds.get(name, ""),
            epsilon=past.epsilon,
        )  # fmt: skip
    return views


def _privacy(recipe: Recipe, tally: Tally, run: Path) -> PrivacyView:
    told = [site.epsilon for site in tally.sites.values() if site.epsilon is not None]
    spent = tally.epsilon if recipe.privacy.mode == "site" else max(told, default=None)
    planned = _facts(run / PLAN).get(EPSILON)
    return PrivacyView(
        recipe.privacy.mode,
        recipe.privacy.delta,
        spent,
        float(planned) if isinstance(planned, int | float) else None,
    )


def _held_sites(run: Path) -> dict[str, str]:
    found = _facts(run / QUARANTINE).get("held")
    entries = found.items() if isinstance(found, dict) else ()
    return {
        name: printable(str(entry.get("reason", "")))
        for name, entry in entries
        if SITE_NAME.fullmatch(name) and isinstance(entry, dict)
    }


def _prototypes(run: Path, number: int) -> dict[str, tuple[int, int]]:
    """Modality -> prototypes in the global state after a round, and the patients they stand for."""
    try:
        with safe_open(run / f"round-{number:04d}.safetensors", framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(COUNTS)]  # noqa: SIM118
            counts = {name.removeprefix(COUNTS): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return {}
    return {m: (len(c), round(float(c.sum()))) for m, c in counts.items() if m in MODALITIES}


def _facts(file: Path) -> dict[str, Any]:
    """A small JSON file's table; empty where there is none that can be read."""
    try:
        found = read_json(file)
    except (UserError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
