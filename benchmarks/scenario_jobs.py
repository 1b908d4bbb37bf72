"""One job of the study: a scenario, an arm, a seed; a process of its own, and what it leaves.

OUT/data, OUT/start      the hospitals' shards, and the weights before round 1 of each seed
OUT/jobs/NAME.json       what to do
OUT/weights/NAME.safetensors   the backbones that it ended with; NAME-half: at half time
OUT/measured/NAME.json   what came of it, written last; OUT/measured/NAME.safetensors the draws
A result counts only for the job it was made for: another recipe or other values make it anew.

benchmarks/scenario_run.py does a job; its process is killed without loss to the others.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import competitors
import real_images
import scenario_tables
from federation_loop import changed

from core.checkpoint import load_arrays, read_json, write_json
from core.config import load_recipe
from core.evaluation.intervals import Resampled

START: Final = Path(__file__).resolve().with_name("scenario_start.py")
RUN: Final = Path(__file__).resolve().with_name("scenario_run.py")


class Study:
    """Data, recipe and directory that all jobs share."""

    def __init__(
        self, data: Path, out: Path, recipe_file: Path | None = None, device: str = "cpu"
    ) -> None:
        self.data, self.out, self.device = data, out, device
        self.recipe_file = recipe_file or real_images.RECIPE
        self.recipe = load_recipe(self.recipe_file)
        text = self.recipe.to_json()
        self.recipe_sha256 = hashlib.sha256(text.encode()).hexdigest()
        usual = self.recipe_file == real_images.RECIPE and device == "cpu"
        self.results = scenario_tables.RESULTS if usual else out / "scenarios.json"
        self.tried = competitors.CHOSEN if usual else out / "competitors.json"

    def phantom_steps(self, arm: str) -> int:
        """How long the start of an arm learned from phantoms."""
        return competitors.STARTS.get(arm, self.recipe.model.phantom_steps)

    def options(self, arm: str) -> dict[str, Any]:
        """Of an arm's backbone."""
        options, factor = dict(self.recipe.model.options), competitors.WIDTHS.get(arm, 1)
        if factor != 1:
            for key in ("embed_dim", "num_heads"):
                options[key] = round(factor * options[key])
        return options

    def start_file(self, seed: int, arm: str = "ours") -> Path:
        """Where the weights that a seed's phantoms give lie."""
        longer = f"{self.phantom_steps(arm)}-" if arm in competitors.STARTS else ""
        if competitors.WIDTHS.get(arm, 1) != 1:
            longer += f"{self.options(arm)['embed_dim']}wide-"
        return self.out / "start" / f"{longer}{seed}.safetensors"

    def start(self, seed: int, arm: str) -> str:
        """The file with which a seed begins; empty if it begins with random weights."""
        if self.phantom_steps(arm):
            return str(self.start_file(seed, arm))
        return self.recipe.model.init_file

    def start_command(self, seed: int, arm: str) -> list[str]:
        """Makes it."""
        words = [str(self.recipe_file), str(self.phantom_steps(arm)), self.device, str(seed)]
        words += [json.dumps(self.options(arm)), str(self.start_file(seed, arm))]
        return [sys.executable, str(START), *words]


@dataclass(frozen=True)
class Job:
    """What a process is told."""

    scenario: str
    arm: str
    seed: int
    values: dict[str, Any]
    tuned: bool
    recipe: str
    """JSON: seed, rounds and start are in it."""
    device: str = "cpu"
    tuning: bool = False
    """Measure both networks on val, and nothing on test."""

    @property
    def name(self) -> str:
        """Of its files."""
        steps = json.loads(self.recipe)["federation"]
        name = f"{self.scenario}-{self.arm}-{steps['rounds'] * steps['local_steps']}-{self.seed}"
        if self.tuning:
            values = "-".join(f"{key}{value:g}" for key, value in sorted(self.values.items()))
            name = f"tune-{name}-{values}"
        return name


def make_job(
    study: Study, scenario: str, arm: str, seed: int, steps: int | None, **options: Any
) -> Job:
    """A job with the recipe of its seed and length: at least two rounds.

    Arms with rounds of another length have as many steps as the others.
    """
    values, tuned = competitors.chosen_values(arm, study.recipe_sha256, study.tried)
    federation = study.recipe.federation
    local_steps, total = federation.local_steps, steps or study.recipe.total_steps
    rounds = max(2, total // local_steps)
    local_steps = max(1, total // rounds)
    if arm in competitors.ROUND_LENGTHS:
        wanted = competitors.ROUND_LENGTHS[arm] * local_steps
        rounds, local_steps = split_steps(rounds * local_steps, wanted)
    recipe = changed(
        study.recipe.model_copy(update={"seed": seed}),
        model={
            "phantom_steps": 0,
            "init_file": study.start(seed, arm),
            "options": study.options(arm),
        },
        federation={"rounds": rounds, "local_steps": local_steps, "min_sites": 1},
        evaluation={"every_rounds": 0},
    )
    job = Job(scenario, arm, seed, values, tuned, recipe.to_json(), study.device)
    return dataclasses.replace(job, **options)


def split_steps(total: int, wanted: float) -> tuple[int, int]:
    """Rounds, two at least, and steps of each, of `total`; the steps nearest to `wanted`."""
    divisors = [rounds for rounds in range(2, total + 1) if total % rounds == 0]
    rounds = min(divisors, key=lambda rounds: abs(total // rounds - wanted))
    return rounds, total // rounds


def tuning_job(study: Study, arm: str, values: dict[str, Any], steps: int | None) -> Job:
    """A try: on val, with a seed of its own, in the scenario that the arm is for."""
    scenario = "leaving" if arm in competitors.FORGETTING else "extreme"
    seed = competitors.TUNING_SEED
    return make_job(study, scenario, arm, seed, steps, values=values, tuned=False, tuning=True)


def run_jobs(study: Study, jobs: Sequence[Job], processes: int) -> None:
    """Run what has no result yet: starts first, then the jobs, each on a processor of its own.

    On a GPU a process may use all of them: what it waits for is drawn by several.
    """
    pinned = study.device == "cpu"
    real_images.prepare(study.data, study.out)
    missing = [job for job in jobs if results_of(study, job) is None]
    starts = {
        study.start_file(job.seed, job.arm): study.start_command(job.seed, job.arm)
        for job in missing
        if job.arm not in competitors.WITHOUT_NETWORK and study.phantom_steps(job.arm)
    }
    absent = [command for file, command in starts.items() if not file.exists()]
    real_images.run_all(absent, processes, pinned=pinned)
    commands = [[sys.executable, str(RUN), str(job_file(study, job))] for job in missing]
    real_images.run_all(commands, processes, pinned=pinned)


def job_file(study: Study, job: Job) -> Path:
    """Write down what a process is told, for it to read."""
    file = study.out / "jobs" / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, dataclasses.asdict(job))
    return file


def results_of(study: Study, job: Job) -> dict[str, Any] | None:
    """What came of a job; None if it was not run, or another one of its name was."""
    file = study.out / "measured" / f"{job.name}.json"
    if not file.exists():
        return None
    found: dict[str, Any] = read_json(file)
    return found if found["job"] == dataclasses.asdict(job) else None


def draws_of(study: Study, job: Job, moment: str) -> dict[str, Resampled]:
    """Modality -> AUROC of the test split with its draws; nothing if that was not measured.

    Args:
        study: where results lie.
        job: one that has them.
        moment: "end" or "half", with "_" and its name for another probe than the main one.
    """
    arrays, _ = load_arrays(study.out / "measured" / f"{job.name}.safetensors")
    rows = read_json(study.out / "measured" / f"{job.name}.json").get(moment, {})
    return {
        name: Resampled(row["auroc"], arrays[f"{moment}/{name}"].astype(float), row["freedom"])
        for name, row in rows.items()
    }
