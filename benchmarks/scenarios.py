"""Is a federation as good as pooling, and ours as good as others? Real images, hard cases, tables.

Scenarios, each over the seven modalities at 64 px (train split trains, val chooses the probe, test
is measured; colour fundus on its single source):
  extreme        one modality a site
  skewed_0.5     two or three sites a modality, their labels dealt by Dirichlet(.5)
  skewed_0.1     the same, Dirichlet(.1)
  sizes          a big site with four fifths of everything, and a small one a modality
  leaving        the only sites of ultrasound and dermatology leave at half time
  joining        dermatology's site joins at half time
  participation  the sites of skewed_0.5, of which 30 % answer a round
  broken         half of dermatology is at one more site, whose images are black or noise
  misnamed       half of dermatology is at one more site, which calls it chest X-rays
  quarter, sixteenth
                 as extreme, with so many of each site's patients
  three          as extreme, without all sites but those of chest X-ray, ultrasound and OCT
  alone          all sites but CT's leave after an eighth of the rounds; the learning rate stays at
                 its peak
  endless        as extreme, at that learning rate; nobody leaves
Arms are in competitors.py; those against forgetting run in `leaving` and `alone` only. Within a
scenario all arms see as many views (`local`: each site in every round).

Run: python benchmarks/scenarios.py --data DIR [--out DIR] [--seeds 0 1 2] [--jobs 2]
     [--scenarios ...] [--arms ...] [--steps N ...] [--plots DIR] [--pretend]
     [--recipe FILE] [--device cuda]
It resumes after a kill, which loses the jobs that run; each job is pinned to one processor, so a
seed gives the same bits again. Adds to benchmarks/scenarios.json (with another recipe or device,
to OUT/scenarios.json) and prints tables in Markdown; scenario_tables.py puts them into pages.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import competitors
import torch
from scenario_compare import Draws, changes, differences, per_doubling
from scenario_jobs import Job, Study, draws_of, make_job, results_of, run_jobs
from scenario_plot import draw_arms
from scenario_sites import CHANGING, SCENARIOS, SHARES
from scenario_tables import KINDS

from core.checkpoint import read_json, write_json
from core.evaluation.intervals import Comparison

ROOT: Final = Path(__file__).resolve().parents[1]
FORGETFUL: Final = "no_memory_fast"
"""The arm of whose loss, when sites have left, ours may have SHARE_LOST."""
SHARE_LOST: Final = 0.3
Done = dict[str, list[tuple[Job, dict[str, Any]]]]
"""Arm -> its jobs that have a result, with it."""


def plan(
    study: Study,
    scenarios: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[int | None],
) -> list[Job]:
    """All jobs, seed by seed, so that a study that is stopped early has whole seeds."""
    return [
        make_job(study, scenario, arm, seed, length)
        for seed, length, scenario, arm in itertools.product(seeds, steps, scenarios, arms)
        if scenario in ("leaving", "alone") or arm not in competitors.FORGETTING
    ]


def by_arm(study: Study, jobs: Sequence[Job]) -> Done:
    """The jobs that are done."""
    done: Done = {}
    for job in jobs:
        if (result := results_of(study, job)) is not None:
            done.setdefault(job.arm, []).append((job, result))
    return done


def seeds_of(study: Study) -> list[int]:
    """Seeds that have any result, so that a run of some does not forget the others."""
    names = [file.stem for file in (study.out / "measured").glob("*.json")]
    return sorted({int(n.rpartition("-")[2]) for n in names if not n.startswith("tune-")})


def draws(study: Study, done: Done, moment: str) -> dict[str, Draws]:
    """Arm -> seed, if that was measured, -> modality -> AUROC with its draws."""
    found = {arm: {j.seed: draws_of(study, j, moment) for j, _ in r} for arm, r in done.items()}
    return {arm: {seed: rows for seed, rows in by.items() if rows} for arm, by in found.items()}


def report(study: Study, jobs: Sequence[Job], plots: Path | None = None) -> None:
    """Add what the jobs found to the study's results, print all tables, draw a picture each."""
    facts = {"recipe_sha256": study.recipe_sha256, "torch": torch.__version__}
    results: dict[str, Any] = {}
    file = study.results
    if file.exists() and (kept := read_json(file))["recipe_sha256"] == study.recipe_sha256:
        results = kept["results"]
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.scenario, job.name.split("-")[-2]), []).append(job)
    for (scenario, steps), chosen in groups.items():
        if not by_arm(study, chosen):
            continue
        arms = dict.fromkeys(["ours", "hand_made", FORGETFUL, *(job.arm for job in chosen)])
        done = by_arm(study, plan(study, [scenario], [*arms], seeds_of(study), [int(steps)]))
        rows = results.setdefault(scenario, {}).setdefault(steps, {})
        asked = {job.arm for job in chosen}
        for arm, found in compared(study, scenario, done).items():
            if arm in asked or arm not in rows:  # the others are there to be compared with
                rows[arm] = rows.get(arm, {}) | found | across(study, scenario, arm, int(steps))
        shown = {arm: rows[arm] for arm in competitors.ARMS if arm in done}
        print(f"\n### {scenario}, {steps} steps a site")
        for kind, table in KINDS.items():
            if (text := table(shown)).count("\n") > 1:  # it has rows
                print(f"\n{(table.__doc__ or kind).splitlines()[0]}\n\n{text}", flush=True)
        if plots and "ours" in done:
            draw_arms(plots / f"{scenario}.svg", f"{scenario}, {steps} steps a site", shown)
    write_json(file, facts | {"results": results})


def compared(study: Study, scenario: str, done: Done) -> dict[str, dict[str, Any]]:
    """Arm -> seed -> row; and how it differs from ours, hand-made features, itself at half time."""
    end, usual, early = (draws(study, done, f"end{p}") for p in ("", "_standard", "_early"))
    weights = {a: done[a][0][1]["weights"] for a in competitors.WIDTHS_ALONE if a in done}
    found: dict[str, dict[str, Any]] = {}
    for arm, pairs in done.items():
        found[arm] = {str(job.seed): row(job, result) for job, result in pairs}
        for key, probe, other in (
            ("less_ours", end, "ours"),
            ("less_ours_standard", usual, "ours"),
            ("less_hand_made", end, "hand_made"),
            ("less_no_memory", end, "no_memory_without_start" if arm == "without_start" else arm),
        ):
            if arm != other and set(probe[arm]) & set(probe.get(other, ())):
                found[arm][key] = listed(differences(probe[arm], probe[other]))
        for key, other in (("early_less_probe", arm), ("early_less_hand_made", "hand_made")):
            if arm not in competitors.WITHOUT_NETWORK and early[arm] and other in end:
                found[arm][key] = listed(differences(early[arm], end[other]))
        for key, first, amounts in (
            ("per_doubling", "init", {a: study.phantom_steps(a) for a in competitors.LENGTHS}),
            ("per_weights_doubling", "init_1600", weights),
        ):
            points = {n: end[a] for a, n in amounts.items() if len(end.get(a, ())) == len(pairs)}
            if arm == first and len(points) > 1:
                found[arm][key] = listed(per_doubling(points))
    for probe in ("", "_standard") if scenario in CHANGING else ():
        half, last = (draws(study, done, f"{moment}{probe}") for moment in ("half", "end"))
        for arm, rows in what_became(half, last, CHANGING[scenario]).items():
            found[arm] |= {f"{key}{probe}": row for key, row in rows.items()}
    return found


def what_became(
    half: Mapping[str, Draws], end: Mapping[str, Draws], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Arm -> how the modalities whose sites left or joined changed, and that less FedAvg's."""
    found: dict[str, dict[str, Any]] = {arm: {} for arm in end}
    none = {arm: changes(rows, rows, names) for arm, rows in end.items()}
    own = {arm: changes(end[arm], half[arm], names) for arm in end}
    for arm in (arm for arm in end if own[arm]):
        found[arm]["change"] = listed(differences(own[arm], none[arm]))
        if set(own[arm]) & set(own.get(FORGETFUL, ())):
            for key, share in (("fedavg", 1.0), ("share", SHARE_LOST)):
                other = changes(end[FORGETFUL], half[FORGETFUL], names, share)
                found[arm][f"change_less_{key}"] = listed(differences(own[arm], other))
    return found


def across(study: Study, scenario: str, arm: str, steps: int) -> dict[str, Any]:
    """How an arm differs from itself in `extreme` and from hand-made features there.

    With less data, how it grows with that too.
    """
    if scenario == "extreme":
        return {}
    names = ["extreme", *(SHARES if scenario in SHARES else [scenario])]
    done = {n: by_arm(study, plan(study, [n], [arm], seeds_of(study), [steps])) for n in names}
    found = {n: draws(study, pairs, "end").get(arm, {}) for n, pairs in done.items()}
    whole, own = found["extreme"], found[scenario]
    plain = by_arm(study, plan(study, ["extreme"], ["hand_made"], seeds_of(study), [None]))
    hand_made = draws(study, plain, "end").get("hand_made", {})
    result = {}
    if set(hand_made) & set(own) and arm not in competitors.WITHOUT_NETWORK:
        result["less_hand_made"] = listed(differences(own, hand_made))
    if not set(whole) & set(own):
        return result
    result["less_extreme"] = listed(differences(own, whole))
    points = {share: found[n] for n, share in SHARES.items() if found.get(n)}
    if points and all(set(d) == set(whole) for d in points.values()):
        result["per_data_doubling"] = listed(per_doubling({1.0: whole, **points}))
    return result


def listed(found: Mapping[str, Comparison]) -> dict[str, list[float]]:
    """Modality -> difference, low, high, p."""
    return {name: [c.difference, c.low, c.high, c.p] for name, c in found.items()}


def row(job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a job."""
    moments = [key for key in result if key.startswith(("half", "end"))]
    kept = (
        *moments, "cpu_train", "cpu_measure", "measurements", "site_steps", "held", "weights"
    )  # fmt: skip
    counts = {key: len(result[key]) for key in ("outliers", "rejected")}
    return {key: result[key] for key in kept} | counts | {"values": job.values, "tuned": job.tuned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of npz files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "scenarios")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS)
    arms = list(competitors.ARMS)
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms)
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="of a site")
    parser.add_argument("--recipe", type=Path, help="another than configs/seven_sites.toml")
    parser.add_argument("--device", default="cpu", help="a torch device; with one of them --jobs 1")
    parser.add_argument("--plots", type=Path, help="directory for a picture a scenario")
    parser.add_argument("--pretend", action="store_true", help="only say what would run")
    arguments = parser.parse_args()
    study = Study(arguments.data, arguments.out.resolve(), arguments.recipe, arguments.device)
    jobs = plan(study, arguments.scenarios, arguments.arms, arguments.seeds, arguments.steps)
    if arguments.pretend:
        for job in jobs:
            state = "done" if results_of(study, job) else "to do"
            print(f"{state}: {job.name} {job.values or ''}{'' if job.tuned else ' not tuned'}")
        return
    run_jobs(study, jobs, arguments.jobs)
    report(study, jobs, arguments.plots)


if __name__ == "__main__":
    main()
