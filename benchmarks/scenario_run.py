"""Does one job of benchmarks/scenarios.py: python benchmarks/scenario_run.py OUT/jobs/NAME.json."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import competitors
import numpy as np
import torch
from federation_loop import Arm, Federation, changed, federate
from scenario_jobs import Job
from scenario_measure import OTHERS, Measured, mean_of, measure, of_network
from scenario_sites import ENDLESS, Scenario, Sites, build

from core.backbone import BACKBONE
from core.checkpoint import Arrays, read_json, save_arrays, write_json
from core.config import Recipe, recipe_from_json
from core.evaluate import Task, labelled_tasks
from core.evaluation.protocol import FeatureSource
from core.phantoms import make_phantoms
from core.randomness import derive_seed
from core.shards import Shard
from core.sites import open_sites
from core.wire import GlobalState

SOLVED: Final = ("ct",)
"""Modalities that random weights already tell apart without an error: they decide no tuning."""
STAND_IN_PATIENTS: Final = 300
"""Phantoms of a lost modality at the coordinator, one image each."""


class Meter:
    """Measures states, and keeps what was found and how long it took."""

    def __init__(self, job: Job, recipe: Recipe, tasks: Sequence[Task]) -> None:
        self.job, self.recipe, self.tasks = job, recipe, tasks
        self.found: dict[str, list[dict[str, Measured]]] = {"half": [], "end": []}
        self.val: dict[str, float] = {}
        """Network -> mean AUROC on val, of a job that tunes."""
        self.cpu_seconds, self.count = 0.0, 0

    def take(self, moment: str, state: GlobalState, network: str, held: Sequence[str]) -> None:
        """Measure one network on the modalities `held`, all if there are none."""
        self.found[moment].append(self._measure(state, network, held))

    def take_val(self, state: GlobalState) -> None:
        """Measure both networks on val, on all modalities but SOLVED, those that left as well."""
        asked = [task.name for task in self.tasks if task.name not in SOLVED]
        for network in competitors.NETWORKS:
            rows = self._measure(state, network, asked)
            self.val[network] = float(np.mean([row.val for row in rows.values()]))

    def _network(
        self, state: GlobalState, network: str
    ) -> tuple[FeatureSource, dict[str, FeatureSource]]:
        return of_network(self.recipe, getattr(state, network), self.job.device)

    def _measure(
        self, state: GlobalState, network: str, held: Sequence[str]
    ) -> dict[str, Measured]:
        began = time.process_time()
        source = competitors.WITHOUT_NETWORK.get(self.job.arm)
        sources = (
            (source, dict.fromkeys(OTHERS, source)) if source else self._network(state, network)
        )
        tasks = [task for task in self.tasks if not held or task.name in held]
        rows = measure(*sources, tasks, test=not self.job.tuning)
        self.cpu_seconds += time.process_time() - began
        self.count += 1
        return rows


def execute(job: Job, hospitals: Mapping[str, Sequence[Shard]], out: Path) -> None:
    """Do a job and write what came of it."""
    torch.set_num_threads(1)
    recipe = recipe_from_json(job.recipe, "the job")
    scenario = build(job.scenario, hospitals, job.seed, recipe.federation.rounds)
    meter = Meter(job, recipe, labelled_tasks([s for held in hospitals.values() for s in held]))
    federations: list[Federation] = []
    halves: Arrays = {}
    weights: Arrays = {}
    for sites in runs_of(job, scenario):
        arms = arms_of(job, scenario)
        held = _held(sites) if job.arm in competitors.LOCAL else []

        def on_round(number: int, state: GlobalState, arms=arms, held=held) -> None:
            if number == scenario.half and scenario.changing and not job.tuning:
                meter.take("half", state, arms(number).measured, held)
                halves.update(backbone_arrays(state, arms(number).measured, held))

        federation = _run(job, _recipe_of(job, recipe, scenario), sites, scenario, arms, on_round)
        federations.append(federation)
        measured = arms(recipe.federation.rounds).measured
        if job.tuning:
            meter.take_val(federation.state)
        else:
            meter.take("end", federation.state, measured, held)
            weights |= backbone_arrays(federation.state, measured, held)
    for moment, arrays in (("-half", halves), ("", weights)):
        if arrays:
            (out / "weights").mkdir(exist_ok=True)
            file = out / "weights" / f"{job.name}{moment}.safetensors"
            save_arrays(file, arrays, {"job": json.dumps(dataclasses.asdict(job))})
    _write(job, out, meter, federations)


def runs_of(job: Job, scenario: Scenario) -> list[Sites]:
    """The federations of an arm: all sites; one a site for LOCAL; one big site for `pooled`."""
    if job.arm in competitors.LOCAL:
        return [{name: shards} for name, shards in scenario.sites.items()]
    if job.arm == "pooled":
        return [{"pooled": [shard for held in scenario.sites.values() for shard in held]}]
    stand_ins: Sites = {}
    if job.arm == "rehearsal":
        stand_ins = {f"phantoms-{m}": [_phantoms(job, m)] for m in scenario.changing}
    return [{**scenario.sites, **stand_ins}]


def arms_of(job: Job, scenario: Scenario) -> Callable[[int], Arm]:
    """Round -> arm: what is against forgetting begins when somebody has left."""
    arm, plain = competitors.make_arm(job.arm, job.values), Arm()
    if share := ENDLESS.get(job.scenario):
        arm, plain = _endless(arm, share), _endless(plain, share)
    waits = job.arm in competitors.FORGETTING
    return lambda number: plain if waits and number <= scenario.half else arm


def _endless(arm: Arm, share: float) -> Arm:
    """An arm whose learning rate stays at its peak, once it has risen as fast as elsewhere."""

    def recipe(recipe: Recipe) -> Recipe:
        optim = (own := arm.recipe(recipe)).optim
        peak = optim.learning_rate * optim.batch_size / 256
        warmup = optim.warmup * 2 * share  # elsewhere they leave at half time
        return changed(own, optim={"final_learning_rate": peak, "warmup": warmup})

    return dataclasses.replace(arm, recipe=recipe)


def who_answers(job: Job, scenario: Scenario, sites: Sites) -> Callable[[int], list[str]]:
    """Round -> names: as the scenario says, stand-ins after half time, one site always."""
    if job.arm in (*competitors.LOCAL, "pooled"):
        return lambda number: list(sites)
    stand_ins = [name for name in sites if name not in scenario.sites]
    return lambda number: [
        *scenario.answering(number),
        *(stand_ins if number > scenario.half else []),
    ]


def _run(
    job: Job,
    recipe: Recipe,
    sites: Sites,
    scenario: Scenario,
    arms: Callable[[int], Arm],
    on_round: Callable[[int, GlobalState], None],
) -> Federation:
    if job.arm in competitors.UNTRAINED:
        arm = arms(1)
        federation = Federation(recipe, arm.initial(arm.recipe(recipe)))
        on_round(scenario.half, federation.state)
        return federation
    answering = who_answers(job, scenario, sites)
    return federate(recipe, sites, answering, arms, on_round, device=job.device)


def _recipe_of(job: Job, recipe: Recipe, scenario: Scenario) -> Recipe:
    """Pooled, a step has the images of all sites that answer in it; the rate is for 256 images."""
    if job.arm != "pooled":
        return recipe
    rounds = range(1, recipe.federation.rounds + 1)
    count = max(1, round(float(np.mean([len(scenario.answering(n)) for n in rounds]))))
    optim = recipe.optim
    size, rate = optim.batch_size * count, optim.learning_rate / count
    return changed(recipe, optim={"batch_size": size, "learning_rate": rate})


def _phantoms(job: Job, modality: str) -> Shard:
    return make_phantoms(
        modality,
        patients=STAND_IN_PATIENTS,
        images_per_patient=1,
        px=recipe_from_json(job.recipe, "the job").views.global_px,
        seed=derive_seed(job.seed, "rehearsal") % 2**31,
    )


def _held(sites: Sites) -> list[str]:
    return [name for shards in sites.values() for shard in shards for name in shard.classes]


def backbone_arrays(state: GlobalState, network: str, held: Sequence[str]) -> Arrays:
    """The weights that are measured, with the modalities `held` (all, if none) before each name."""
    return {
        f"{','.join(held)}/{name}": array
        for name, array in getattr(state, network).items()
        if name.startswith(BACKBONE)
    }


def weights_of(state: GlobalState) -> int:
    """Of the backbone that is measured."""
    return sum(a.size for name, a in state.teacher.items() if name.startswith(BACKBONE))


def _write(job: Job, out: Path, meter: Meter, federations: Sequence[Federation]) -> None:
    lines = [line for federation in federations for line in federation.lines]
    outcomes = [outcome for line in lines for outcome in line["sites"].values()]
    result: dict[str, Any] = {
        "job": dataclasses.asdict(job),
        "val": meter.val,
        "site_steps": sum(federation.steps for federation in federations),
        "cpu_train": sum(federation.cpu_seconds for federation in federations),
        "cpu_measure": meter.cpu_seconds,
        "measurements": meter.count,
        "outliers": [o["words"] for line in lines for o in line["outliers"]],
        "rejected": [o["reason"] for o in outcomes if o["outcome"] == "rejected"],
        "held": sorted({site for line in lines for site in line["held"]}),
        "weights": weights_of(federations[0].state),
    }
    arrays = {}
    for moment, parts in meter.found.items():
        rows = mean_of(parts)
        result[moment] = {
            name: {
                "auroc": m.test.value,
                "freedom": m.test.freedom,
                "val": m.val,
                "knn": m.knn,
                "knn_accuracy": m.knn_accuracy,
            }
            for name, m in rows.items()
        }
        for name, m in rows.items():
            arrays[f"{moment}/{name}"] = m.test.draws.astype(np.float32)
            for probe, found in m.others.items():
                row = {"auroc": found.value, "freedom": found.freedom}
                result.setdefault(f"{moment}_{probe}", {})[name] = row
                arrays[f"{moment}_{probe}/{name}"] = found.draws.astype(np.float32)
    (out / "measured").mkdir(exist_ok=True)
    save_arrays(out / "measured" / f"{job.name}.safetensors", arrays)
    write_json(out / "measured" / f"{job.name}.json", result)


def main() -> None:
    file = Path(sys.argv[1])
    out = file.parents[1]
    execute(Job(**read_json(file)), open_sites(out / "data"), out)


if __name__ == "__main__":
    main()
