"""What the networks of benchmarks/scenarios.py are worth on all labelled images, fold by fold.

The test split's 403 images of chest X-ray, ultrasound and OCT tell few arms apart. So a probe is
fitted five times, on three fifths of a modality's patients, its strength chosen on a fourth, and
scores the fifth that is left: every labelled image is scored once, by a probe that saw no image of
its patient (Stone, J. R. Stat. Soc. B 1974). An image's score is its rank within its fold, since
five probes have five thresholds. Folds are the same for all arms and seeds; CT, which all arms
solve, is left out.

Networks have seen the images of the train split, though no label; hand-made features, random
weights and starts have not. `unseen` is the same of the images of val and test alone, which no
network saw.

Run: python benchmarks/scenario_folds.py --data DIR [--out DIR] [--scenarios ...] [--arms ...]
     [--seeds 0 1 2] [--steps N] [--jobs 2] [--plots DIR]
after scenarios.py with the same words, which leaves OUT/weights. It resumes after a kill and adds
to benchmarks/scenarios.json.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import competitors
import numpy as np
import real_images
from numpy.typing import NDArray
from scenario_compare import Draws, differences
from scenario_jobs import Job, Study, job_file
from scenario_measure import of_network, resampled
from scenario_plot import draw_arms
from scenario_run import SOLVED
from scenario_sites import CHANGING, SCENARIOS
from scenarios import FORGETFUL, ROOT, listed, plan, what_became
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedGroupKFold

from core.checkpoint import load_arrays, read_json, save_arrays, write_json
from core.config import recipe_from_json
from core.errors import UserError
from core.evaluate import Features, Task, fit_probe, labelled_tasks
from core.evaluation.intervals import Resampled
from core.evaluation.protocol import FeatureSource
from core.sites import open_sites

FOLDS: Final = 5
PROBES: Final[Mapping[str, str]] = {"": "network", "_standard": "standard"}
"""What follows the name of a moment, and which of scenario_measure's probes it is."""
MOMENTS: Final = tuple(f"{part}{probe}" for part in ("folds", "unseen") for probe in PROBES)
AGAINST: Final = ("ours", "init", "hand_made", "without_start")
"""Arms that each is held against."""
SEEDS: Final = (0, 1, 2)
Indices = NDArray[np.int64]


def measure_folds(sources: Mapping[str, FeatureSource], task: Task) -> dict[str, Resampled]:
    """One of MOMENTS -> AUROC of the scores of all folds.

    Args:
        sources: one of PROBES -> where its features come from.
        task: a labelled modality, with FOLDS patients of each class at least.
    """
    indices = np.sort(np.concatenate([task.train, task.val, task.test]))
    fold, unseen = folds_of(task, indices), ~np.isin(indices, task.train)
    found = {}
    truth = np.eye(len(task.shard.classes[task.name]), dtype=np.int64)[task.labels(indices)]
    for probe, source in sources.items():
        scores = _scores(task, indices, fold, source.extract(task, indices))
        found[f"folds{probe}"] = resampled(task, indices, scores, truth, "all images")
        found[f"unseen{probe}"] = resampled(
            task, indices[unseen], scores[unseen], truth[unseen], "unseen images"
        )
    return found


def folds_of(task: Task, indices: Indices) -> Indices:
    """The fold of each image: no patient is in two, each has about as many of a class."""
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    labels, patients = task.labels(indices), task.shard.patient[indices]
    fold = np.zeros(len(indices), np.int64)
    for number, (_, held) in enumerate(splitter.split(indices, labels, patients)):
        fold[held] = number
    return fold


def _scores(task: Task, indices: Indices, fold: Indices, features: Features) -> NDArray[np.float64]:
    labels = task.labels(indices)
    scores = np.zeros((len(indices), len(task.shard.classes[task.name])))
    for number in range(FOLDS):
        held, choosing = fold == number, fold == (number + 1) % FOLDS
        learning = ~held & ~choosing
        scale, probe = fit_probe(
            features[learning], labels[learning], features[choosing], labels[choosing]
        )
        given = probe.predict_proba(scale.transform(features[held]))
        scores[np.ix_(held, probe.classes_)] = rankdata(given, axis=0) / held.sum()
    return scores


def execute(job: Job, out: Path) -> None:
    """Measure the networks of a job and keep what was found."""
    hospitals = open_sites(out / "data")
    tasks = labelled_tasks([shard for held in hospitals.values() for shard in held])
    rows: dict[str, dict[str, Resampled]] = {}
    for before in ("half_", "") if job.scenario in CHANGING else ("",):
        for held, sources in sources_of(job, out, "-half" if before else "").items():
            for task in tasks:
                if task.name not in SOLVED and (not held or task.name in held.split(",")):
                    for moment, auroc in measure_folds(sources, task).items():
                        if not before or moment.startswith("folds"):
                            rows.setdefault(f"{before}{moment}", {})[task.name] = auroc
    draws, found = {}, {"job": dataclasses.asdict(job)}
    for moment, row in rows.items():
        found[moment] = {m: {"auroc": r.value, "freedom": r.freedom} for m, r in row.items()}
        draws |= {f"{moment}/{m}": r.draws.astype(np.float32) for m, r in row.items()}
    (out / "folds").mkdir(exist_ok=True)
    save_arrays(out / "folds" / f"{job.name}.safetensors", draws)
    write_json(out / "folds" / f"{job.name}.json", found)


def sources_of(job: Job, out: Path, when: str = "") -> dict[str, dict[str, FeatureSource]]:
    """Modalities, empty for all -> one of PROBES -> features of the network that is for them.

    At the end, or "-half".

    Raises:
        UserError: the job left no weights, or another one of its name did.
    """
    if source := competitors.WITHOUT_NETWORK.get(job.arm):
        return {"": dict.fromkeys(PROBES, source)}
    file = out / "weights" / f"{job.name}{when}.safetensors"
    arrays, metadata = load_arrays(file) if file.exists() else ({}, {"job": "{}"})
    if json.loads(metadata["job"]) != dataclasses.asdict(job):
        raise UserError(
            f"'{file}' is not there, or of another recipe or other values than {job.name} has now: "
            f"remove '{out / 'measured' / job.name}.json' and run scenarios.py"
        )
    by_held: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        held, _, own = name.partition("/")
        by_held.setdefault(held, {})[own] = array
    recipe, found = recipe_from_json(job.recipe, "the job"), {}
    for held, weights in by_held.items():
        network, others = of_network(recipe, weights, job.device)
        sources = {"network": network, **others}
        found[held] = {key: sources[name] for key, name in PROBES.items()}
    return found


def results_of(study: Study, job: Job) -> dict[str, Any]:
    """Moment -> what was found of a job; empty if it was not measured."""
    file = study.out / "folds" / f"{job.name}.json"
    if not file.exists() or (found := read_json(file)).pop("job") != dataclasses.asdict(job):
        return {}
    return found


def draws_of(study: Study, jobs: Sequence[Job], moment: str) -> Draws:
    """Seed, if it was measured -> modality -> AUROC with its draws."""
    draws: dict[int, dict[str, Resampled]] = {}
    for job in jobs:
        if rows := results_of(study, job).get(moment):
            arrays, _ = load_arrays(study.out / "folds" / f"{job.name}.safetensors")
            draws[job.seed] = {
                m: Resampled(row["auroc"], arrays[f"{moment}/{m}"].astype(float), row["freedom"])
                for m, row in rows.items()
            }
    return draws


def measured(study: Study, job: Job) -> list[Job]:
    """The jobs that differ from one in their seed alone and were measured, whoever asked."""
    steps, seeds = int(job.name.split("-")[-2]), sorted({*SEEDS, job.seed})
    jobs = plan(study, [job.scenario], [job.arm], seeds, [steps])
    return [job for job in jobs if results_of(study, job)]


def report(study: Study, jobs: Sequence[Job], plots: Path | None = None) -> None:
    """Add what was found to the study's results, figures by seed and differences; draw a picture.

    Differences are to AGAINST in `extreme`, as long as the recipe says; in `extreme` itself, of the
    same length if that was measured.

    Raises:
        UserError: the results are of another recipe.
    """
    kept = read_json(study.results)
    if kept["recipe_sha256"] != study.recipe_sha256:
        raise UserError(
            f"'{study.results}' holds results of another recipe than '{study.recipe_file}': run "
            "scenarios.py with it first"
        )
    groups = {
        (job.scenario, job.name.split("-")[-2], job.arm): measured(study, job)
        for job in jobs
        if results_of(study, job)
    }
    held: dict[tuple[int | None, str, str], Draws] = {
        (steps, moment, other): draws_of(
            study, plan(study, ["extreme"], [other], SEEDS, [steps]), moment
        )
        for steps in {None, *(int(steps) for scenario, steps, _ in groups if scenario == "extreme")}
        for moment in MOMENTS
        for other in AGAINST
    }
    drawn: dict[tuple[str, str], dict[str, Any]] = {}
    for (scenario, steps, arm), own in groups.items():
        rows = kept["results"].setdefault(scenario, {}).setdefault(steps, {}).setdefault(arm, {})
        rows["folds"] = found = {str(job.seed): results_of(study, job) for job in own}
        length = int(steps) if scenario == "extreme" else None
        for moment, other in itertools.product(MOMENTS, AGAINST):
            mine = draws_of(study, own, moment)
            draws = held[length, moment, other] or held[None, moment, other]
            if (scenario, arm) != ("extreme", other) and set(mine) & set(draws):
                found[f"{moment}_less_{other}"] = listed(differences(mine, draws))
        drawn.setdefault((scenario, steps), {})[arm] = found
    for (scenario, steps), arms in drawn.items():
        if scenario in CHANGING:
            (fedavg,) = plan(study, [scenario], [FORGETFUL], SEEDS[:1], [int(steps)])
            own = {arm: groups[scenario, steps, arm] for arm in arms}
            own.setdefault(FORGETFUL, measured(study, fedavg))
            changes = _changes(study, own, CHANGING[scenario])
            for arm, found in arms.items():
                found |= changes[arm]
        title = f"{scenario}, {steps} steps a site, all labelled images"
        if plots:
            file = plots / f"{scenario}_folds.svg"
            draw_arms(file, title, arms, "folds", "folds_less_ours")
    write_json(study.results, kept)


def _changes(
    study: Study, jobs: Mapping[str, Sequence[Job]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Arm -> how modalities changed whose sites left or joined, by both probes."""
    found: dict[str, dict[str, Any]] = {arm: {} for arm in jobs}
    for probe in PROBES:
        half, end = (
            {arm: draws_of(study, own, f"{before}folds{probe}") for arm, own in jobs.items()}
            for before in ("half_", "")
        )
        for arm, rows in what_became(half, end, names).items():
            found[arm] |= {f"{key}{probe}": row for key, row in rows.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "scenarios")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scenarios", nargs="+", default=["extreme"], choices=SCENARIOS)
    arms = list(competitors.ARMS)
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms)
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="of a site")
    parser.add_argument("--plots", type=Path, help="directory for a picture a scenario")
    arguments = parser.parse_args()
    study = Study(arguments.data, arguments.out.resolve())
    jobs = plan(study, arguments.scenarios, arguments.arms, arguments.seeds, arguments.steps)
    commands = [
        [sys.executable, __file__, str(job_file(study, job))]
        for job in jobs
        if not results_of(study, job)
    ]
    real_images.run_all(commands, arguments.jobs)
    report(study, jobs, arguments.plots)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].endswith(".json"):
        file = Path(sys.argv[1])
        execute(Job(**read_json(file)), file.parents[1])
    else:
        main()
