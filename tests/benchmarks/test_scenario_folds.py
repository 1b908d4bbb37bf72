"""What networks are worth on all labelled images, fold by fold."""

import dataclasses

import numpy as np
import pytest

from core.checkpoint import read_json, save_arrays
from core.errors import UserError
from core.evaluate import labelled_tasks
from core.evaluation.protocol import FeatureSource
from core.phantoms import make_phantoms


@pytest.fixture(scope="module")
def task():
    """Ultrasound of 72 patients of two images each."""
    (found,) = labelled_tasks(
        [make_phantoms("us", patients=72, images_per_patient=2, px=32, seed=1)]
    )
    return found


def test_every_image_is_in_one_fold_with_all_of_its_patient_and_classes_are_dealt_evenly(
    bench, task
):
    indices = np.arange(len(task.shard.label))
    fold = bench.scenario_folds.folds_of(task, indices)
    patients = [set(task.shard.patient[fold == number].tolist()) for number in range(5)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 72
    shares = [np.mean(task.shard.label[fold == number]) for number in range(5)]
    assert np.ptp(shares) < 0.15
    assert (fold == bench.scenario_folds.folds_of(task, indices)).all()


def test_a_probe_never_scores_a_patient_whose_images_it_learned_from(bench, task):
    patients = np.unique(task.shard.patient)
    drawn = np.random.default_rng(0).permutation(len(patients)) % 2
    label = drawn[np.searchsorted(patients, task.shard.patient)]
    names = {"us": ("no", "yes")}
    task = dataclasses.replace(
        task, shard=dataclasses.replace(task.shard, label=label, classes=names)
    )
    by_patient = FeatureSource(  # tells each patient apart and nothing else
        "patient", lambda task, i: np.eye(72, dtype=np.float32)[task.shard.patient[i] % 72]
    )
    by_label = FeatureSource("label", lambda task, i: task.shard.label[i, None].astype(np.float32))
    found = bench.scenario_folds.measure_folds({"": by_patient, "_standard": by_label}, task)
    assert found["folds"].value == pytest.approx(0.5, abs=0.15)
    assert found["folds_standard"].value == found["unseen_standard"].value == 1


def test_a_job_leaves_its_networks_and_folds_are_added_to_the_results(bench, study, hospitals):
    arms = ["ours", "local", "hand_made"]
    jobs = bench.scenarios.plan(study, ["extreme"], arms, [0], [None])
    for job in jobs:
        bench.scenario_run.execute(job, hospitals, study.out)
    bench.scenarios.report(study, jobs)
    before = read_json(study.results)["results"]["extreme"]["4"]
    for job in jobs:
        assert bench.scenario_folds.results_of(study, job) == {}
        bench.scenario_folds.execute(job, study.out)
    bench.scenario_folds.report(study, jobs, study.out)
    picture = (study.out / "extreme_folds.svg").read_text()
    assert all(f"<!-- {arm} -->" in picture for arm in arms)
    rows = read_json(study.results)["results"]["extreme"]["4"]
    found = {arm: rows[arm].pop("folds") for arm in arms}
    assert rows == before
    for moment in ("folds", "unseen", "folds_standard", "unseen_standard"):
        ours, other = (found[arm]["0"][moment]["us"]["auroc"] for arm in ("ours", "hand_made"))
        assert found["ours"][f"{moment}_less_hand_made"]["us"][0] == pytest.approx(ours - other)
        assert f"{moment}_less_ours" not in found["ours"]
        assert set(found["local"]["0"][moment]) == set(hospitals)
    network, _ = (
        bench.scenario_folds.sources_of(jobs[1], study.out)["us"][probe]
        for probe in bench.scenario_folds.PROBES
    )
    (us,) = labelled_tasks(hospitals["us"])
    value = bench.scenario_folds.measure_folds({"": network}, us)["folds"].value
    assert found["local"]["0"]["folds"]["us"]["auroc"] == value
    bench.scenarios.report(study, jobs)  # a later report of the tests keeps them
    kept = read_json(study.results)["results"]["extreme"]["4"]
    assert {arm: kept[arm]["folds"] for arm in arms} == found
    table = bench.scenario_tables.KINDS["folds"]({arm: kept[arm] for arm in arms})
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {arm}" for arm in arms]


def test_arms_of_another_length_are_held_against_those_of_that_length(bench, study):
    """Where they were measured; what was found of the networks is made up here."""
    plan = bench.scenarios.plan
    jobs = plan(study, ["extreme"], ["init", "ours"], [0], [4])
    longer = plan(study, ["extreme"], ["ours", "local"], [0], [6])
    (study.out / "folds").mkdir(exist_ok=True)
    drawn = bench.scenario_measure.DRAWS
    for job, auroc in zip((*jobs, *longer), (0.6, 0.7, 0.8, 0.9), strict=True):
        found = {"folds": {"us": {"auroc": auroc, "freedom": 30.0}}}
        file = study.out / "folds" / f"{job.name}.json"
        bench.scenario_jobs.write_json(file, {"job": dataclasses.asdict(job), **found})
        draws = np.random.default_rng(0).normal(auroc, 0.01, drawn).astype(np.float32)
        save_arrays(file.with_suffix(".safetensors"), {"folds/us": draws})
    bench.scenario_jobs.write_json(
        study.results, {"recipe_sha256": study.recipe_sha256, "results": {}}
    )
    bench.scenario_folds.report(study, [*jobs, *longer])
    kept = read_json(study.results)["results"]["extreme"]
    assert kept["4"]["init"]["folds"]["folds_less_ours"]["us"][0] == pytest.approx(0.6 - 0.7)
    assert kept["6"]["local"]["folds"]["folds_less_ours"]["us"][0] == pytest.approx(0.9 - 0.8)
    assert kept["6"]["local"]["folds"]["folds_less_init"]["us"][0] == pytest.approx(0.9 - 0.6)


def test_networks_of_another_recipe_or_none_are_not_measured(bench, study, hospitals):
    (job,) = bench.scenarios.plan(study, ["extreme"], ["init"], [0], [None])
    with pytest.raises(UserError, match=r"init-4-0\.safetensors' is not there.*run scenarios\.py"):
        bench.scenario_folds.execute(job, study.out)
    bench.scenario_run.execute(job, hospitals, study.out)
    results = {"recipe_sha256": "another", "results": {}}
    bench.scenario_jobs.write_json(study.results, results)
    with pytest.raises(UserError, match=r"results of another recipe.*run scenarios\.py"):
        bench.scenario_folds.report(study, [job])
    assert read_json(study.results) == results
    other = dataclasses.replace(job, values={"rate": 3.0})
    with pytest.raises(UserError, match="of another recipe or other values"):
        bench.scenario_folds.execute(other, study.out)


def test_what_is_lost_when_sites_leave_is_the_end_less_half_time(bench, study, hospitals):
    arms = ["ours", "no_memory_fast"]
    jobs = bench.scenarios.plan(study, ["leaving"], arms, [0], [4])
    bench.scenario_jobs.write_json(
        study.results, {"recipe_sha256": study.recipe_sha256, "results": {}}
    )
    for job in jobs:
        bench.scenario_run.execute(job, hospitals, study.out)
        bench.scenario_folds.execute(job, study.out)
    bench.scenario_folds.report(study, jobs)
    kept = read_json(study.results)["results"]["leaving"]["4"]
    moments = {key for key, found in kept["ours"]["folds"]["0"].items() if "us" in found}
    assert {key for key in moments if "unseen" in key} == {"unseen", "unseen_standard"}
    for probe in ("", "_standard"):
        lost = {}
        for arm in arms:
            row = kept[arm]["folds"]["0"]
            end, half = (row[f"{m}folds{probe}"]["us"]["auroc"] for m in ("", "half_"))
            assert end != half
            lost[arm] = end - half
            assert kept[arm]["folds"][f"change{probe}"]["us"][0] == pytest.approx(lost[arm])
        share = kept["ours"]["folds"][f"change_less_share{probe}"]["us"][0]
        assert share == pytest.approx(lost["ours"] - 0.3 * lost["no_memory_fast"])
    bench.scenario_folds.report(study, jobs[:1])  # FedAvg is there to be compared with
    assert read_json(study.results)["results"]["leaving"]["4"] == kept
    table = bench.scenario_tables.KINDS["folds_lost"](kept)
    assert f"{kept['ours']['folds']['change']['us'][0]:+.3f}" in table
