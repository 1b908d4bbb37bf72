"""Run a study on the coordinator's service: submit it, follow it, submit it again if it dies.

RUN/lock is held by a ServerApp as long as it lives; RUN/run.json tells which run it is, and whether
somebody stopped it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from core.checkpoint import read_json, write_json
from core.config import Recipe
from core.errors import UserError
from core.lock import held
from server.control import Control, app_bundle, control
from server.history import describe_round, open_run, read_history, read_recipe
from server.privacy_cost import say_cost
from server.progress import shown_progress

LOG = logging.getLogger("fedmermed.server")
POLL_SECONDS = 0.5
ASK_SECONDS = 5.0
"""How often the SuperLink is asked whether a run without a ServerApp still stands."""
GRACE_SECONDS = 3.0
"""A ServerApp that ends leaves its lock some time before its last word is read."""
PATIENCE_SECONDS = 180.0
"""After which a run that no ServerApp has taken is told about."""
MAX_TRIES = 5
"""Runs in a row that bring no round."""


def run_on_service(
    directory: Path, recipe_file: Path, *, out: Path | None = None, sites: int = 0
) -> Path:
    """Start a study, or go on with it, and show its rounds until its end.

    Args:
        directory: The coordinator's directory, whose service runs.
        recipe_file: The study's recipe.
        out: Run directory; without it DIR/runs/<recipe name>. The part 'apps' must see it too.
        sites: The first round waits for so many, if they come in the recipe's time.

    Returns:
        The run directory.

    Raises:
        UserError: bad input, a round missed its quorum, or the ServerApp dies again and again.
    """
    from server.summary import summarise

    recipe = read_recipe(recipe_file)
    run_dir = (out or directory / "runs" / recipe.name).absolute()
    run = open_run(run_dir, recipe)
    console = Console()
    console.print(f"app fingerprint {app_bundle()[1]}", highlight=False, soft_wrap=True)
    console.print(f"run directory   {run_dir}", highlight=False, markup=False, soft_wrap=True)
    done = len(read_history(run_dir))
    if done < recipe.federation.rounds:
        say_cost(console, run, recipe)
        with (
            control(directory) as calls,
            shown_progress(console, recipe, max(sites, recipe.federation.min_sites), done),
        ):
            follow(calls, run_dir, sites)
    summarise(run_dir, recipe, {}, engine="service", console=console)
    return run_dir


def stop_on_service(directory: Path, recipe_file: Path, *, out: Path | None = None) -> bool:
    """End a study's run, if it stands; the next `run_on_service` resumes it."""
    name = read_recipe(recipe_file).name
    run_dir = (out or directory / "runs" / name).absolute()
    with control(directory) as calls:
        run_id = _submitted(run_dir)
        if run_id is None or calls.run_ended(run_id):
            return False
        write_json(run_dir / "run.json", {"run_id": run_id, "stopped": True})
        calls.stop_run(run_id)
    return True


def follow(
    calls: Control, run_dir: Path, sites: int, *, tend: Callable[[], None] = lambda: None
) -> None:
    """Have a study run to its end, whoever dies on the way.

    Args:
        calls: The control service.
        run_dir: The run directory, opened.
        sites: What the first round waits for.
        tend: Called twice a second.

    Raises:
        UserError: the study failed, or brings no round `MAX_TRIES` times.
    """
    recipe = read_recipe(run_dir / "recipe.json")
    rounds, steps = recipe.federation.rounds, recipe.model.phantom_steps
    if steps and not (run_dir / "round-0000.safetensors").exists():
        LOG.info(
            "round 1 waits for %d steps of pretraining on phantoms; 'fedmermed-server status %s' "
            "has how far they are", steps, run_dir,
        )  # fmt: skip
    watch = _Watch(run_dir, told=len(read_history(run_dir)))
    while True:
        tend()
        for line in read_history(run_dir)[watch.told :]:
            watch.told, watch.tries = line["round"], 0
            LOG.info("%s", describe_round(line, rounds), extra={"line": line})
        if held(run_dir / "lock"):
            watch.seen()
        elif watch.told >= rounds:
            return
        elif (failure := _failure(run_dir)) and failure["final"]:
            raise UserError(failure["reason"])
        elif watch.gone(calls):
            watch.submit(calls, sites)
        time.sleep(POLL_SECONDS)


@dataclass
class _Watch:
    """What is known of the ServerApp of a run directory."""

    run_dir: Path
    told: int
    tries: int = 0
    """Runs submitted since the last round."""
    run_id: int | None = None
    lived: bool = False
    """Whether the run's ServerApp was seen."""
    since: float = field(default_factory=time.monotonic)
    """When it was seen last, or the run was submitted."""
    asked: float = 0.0
    complained: bool = False

    def __post_init__(self) -> None:
        if _stopped(self.run_dir):  # before we came
            (self.run_dir / "run.json").unlink()
        self.run_id = _submitted(self.run_dir)

    def seen(self) -> None:
        """Its ServerApp lives."""
        if not self.lived and not self.tries:
            LOG.info("the study is running; following it")
        self.lived, self.since = True, time.monotonic()

    def gone(self, calls: Control) -> bool:
        """Whether nothing will bring the next round."""
        quiet = time.monotonic() - self.since
        if self.lived:  # its lock is free: it died, whatever the SuperLink believes
            return quiet > GRACE_SECONDS
        if self.run_id is None:
            return True
        if time.monotonic() - self.asked < ASK_SECONDS:
            return False
        self.asked = time.monotonic()
        try:
            ended = calls.run_ended(self.run_id)
        except UserError as error:  # the SuperLink will be back
            LOG.warning("%s", error)
            return False
        if not ended and quiet > PATIENCE_SECONDS and not self.complained:
            self.complained = True
            LOG.warning(
                "no ServerApp has taken the run in %.0f s; is the part 'apps' of the service "
                "running, and does it see '%s'?", quiet, self.run_dir,
            )  # fmt: skip
        return bool(ended) and quiet > GRACE_SECONDS

    def submit(self, calls: Control, sites: int) -> None:
        """Have a new ServerApp go on from the last round."""
        if _stopped(self.run_dir):
            raise UserError("the study was stopped; run again, and it resumes")
        if self.tries == MAX_TRIES:
            failure = _failure(self.run_dir)
            raise UserError(
                f"{MAX_TRIES} ServerApps in a row ended without a round"
                + (f", the last by {failure['reason']}" if failure else "")
                + "; see logs/apps.log of the coordinator's directory, then run again: the study "
                "resumes"
            )
        if self.lived:
            LOG.warning("the ServerApp has ended after round %d; starting another", self.told)
        try:
            if self.run_id is not None:
                calls.stop_run(self.run_id)  # what it asked sites for is asked for again
            settings: dict[str, str | int] = {
                "recipe": str(self.run_dir / "recipe.json"),
                "run-dir": str(self.run_dir),
                "sites": sites,
                "registered": str(calls.directory / "registered"),
            }
            self.run_id = calls.start_run(settings)
        except UserError as error:  # the SuperLink will be back
            LOG.warning("%s", error)
            return
        write_json(self.run_dir / "run.json", {"run_id": self.run_id})
        self.tries += 1
        self.lived, self.complained = False, False
        self.since = self.asked = time.monotonic()


def _failure(run_dir: Path) -> Mapping[str, Any] | None:
    file = run_dir / "failure.json"
    return {"final": True, **read_json(file)} if file.exists() else None


def _stopped(run_dir: Path) -> bool:
    file = run_dir / "run.json"
    return file.exists() and bool(read_json(file).get("stopped"))


def _submitted(run_dir: Path) -> int | None:
    file = run_dir / "run.json"
    return int(read_json(file)["run_id"]) if file.exists() else None


def initialise(recipe: Recipe, run_dir: Path) -> Path:
    """Write the weights of round 0, so that whoever runs the study needs no torch.

    Returns:
        The file.

    Raises:
        UserError: torch is not installed, or the directory holds another recipe.
    """
    from server.study import note_plan, open_state

    run = open_run(run_dir, recipe)
    with run.locked():
        open_state(run, recipe)
        note_plan(run_dir, recipe)
    return run.checkpoint_path(0)
