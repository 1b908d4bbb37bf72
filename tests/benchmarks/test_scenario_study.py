"""Jobs of a study, from the plan to what they leave."""

import dataclasses

import numpy as np
import pytest
import torch

from core.checkpoint import read_json, save_arrays, write_json
from core.evaluate import auroc, extract, knn_scores, labelled_tasks, measures, probe_scores
from core.evaluation.baselines import hand_made
from core.initial import initial_state
from core.modalities import MEAN_STD
from core.schedules import learning_rate


def test_a_job_leaves_what_tables_need_and_counts_for_itself_alone(bench, study, hospitals, capsys):
    jobs = bench.scenarios.plan(study, ["leaving"], ["ours", "init", "rehearsal"], [0], [4])
    for job in jobs:
        assert bench.scenario_jobs.results_of(study, job) is None
        bench.scenario_run.execute(job, hospitals, study.out)
    results = [bench.scenario_jobs.results_of(study, job) for job in jobs]
    assert [r["site_steps"] for r in results] == [2 * 3 + 2 * 1, 0, 2 * 3 + 2 * 3]
    assert [r["measurements"] for r in results] == [2, 2, 2]
    assert results[0]["half"] == results[2]["half"]  # rehearsal begins when a site has left
    assert results[1]["half"] == results[1]["end"]
    other = dataclasses.replace(jobs[0], values={"rate": 3.0})
    assert bench.scenario_jobs.results_of(study, other) is None
    bench.scenarios.report(study, jobs)
    kept = read_json(study.results)["results"]["leaving"]["4"]
    assert kept["rehearsal"]["0"]["end"] == results[2]["end"]
    difference = kept["init"]["less_ours"]["us"][0]
    expected = results[1]["end"]["us"]["auroc"] - results[0]["end"]["us"]["auroc"]
    assert difference == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "| rehearsal | ultrasound |" in printed
    assert "### leaving, 4 steps a site" in printed
    accuracies = [row["knn_accuracy"] for row in kept["rehearsal"]["0"]["end"].values()]
    changed = results[2]["end"]["us"]["auroc"] - results[2]["half"]["us"]["auroc"]
    assert kept["rehearsal"]["change"]["us"][0] == pytest.approx(changed)
    votes = printed.partition("Accuracy of a vote")[2].splitlines()
    row = next(line for line in votes if line.startswith("| rehearsal |"))
    assert row.endswith(f"| {np.mean(accuracies):.3f} |")


def test_a_try_measures_both_networks_on_val_and_nothing_on_test(bench, study, hospitals, tmp_path):
    planned = bench.scenario_jobs.tuning_job(study, "mae", {"rate": 1.0, "depth": 1}, 4)
    write_json(tmp_path / "job.json", dataclasses.asdict(planned))
    job = bench.scenario_jobs.Job(**read_json(tmp_path / "job.json"))  # as its process reads it
    (shard,) = hospitals["us"]
    unseen = np.where(shard.split == "test", -1, shard.label)  # no test label is needed
    hidden = {"us": [dataclasses.replace(shard, label=unseen)]}
    bench.scenario_run.execute(job, hidden, study.out)
    result = bench.scenario_jobs.results_of(study, planned)
    assert set(result["val"]) == {"student", "teacher"}
    assert result["end"] == result["half"] == {}
    assert job.seed == bench.competitors.TUNING_SEED


def test_tuning_runs_all_tries_and_writes_the_choice_that_a_study_then_takes(
    bench, study, hospitals, tmp_path, monkeypatch, capsys
):
    def run_jobs(study, jobs, processes):
        for job in jobs:
            bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)

    grid = {"dino": {"rate": (1.0, 3.0), "temperature": (0.04,)}}
    file = tmp_path / "competitors.json"
    monkeypatch.setattr(bench.scenario_jobs, "run_jobs", run_jobs)
    monkeypatch.setattr(bench.competitors, "GRIDS", grid)
    monkeypatch.setattr(bench.competitors, "CHOSEN", file)
    words = ["--tune", "--data", str(study.data), "--out", str(study.out), "--arms", "dino"]
    monkeypatch.setattr("sys.argv", ["competitors.py", *words, "--steps", "4"])
    bench.competitors.main()
    kept = read_json(file)
    figures = [
        (row["val"][network], row["values"]["rate"], network)
        for row in kept["tries"]["dino"]
        for network in ("student", "teacher")
    ]
    highest, rate, network = max(figures, key=lambda figure: figure[0])
    chosen = {"rate": rate, "temperature": 0.04, "measured": network}
    assert kept["chosen"]["dino"] == chosen
    assert f"{highest:.4f}" in capsys.readouterr().out
    assert bench.competitors.chosen_values("dino", study.recipe_sha256, file) == (chosen, True)


@pytest.mark.parametrize("arm", ["local", "local_without_start"])
def test_alone_each_site_trains_in_every_round_and_is_measured_on_its_own(
    bench, study, hospitals, arm
):
    (job,) = bench.scenarios.plan(study, ["leaving"], [arm], [0], [4])
    bench.scenario_run.execute(job, hospitals, study.out)
    result = bench.scenario_jobs.results_of(study, job)
    assert result["site_steps"] == 3 * 4
    assert set(result["end"]) == set(result["half"]) == {"cxr", "us", "dermatology"}
    assert result["measurements"] == 2 * 3


def test_pooled_sees_as_many_views_a_step_as_all_sites_that_answer(bench, study, hospitals):
    (job,) = bench.scenarios.plan(study, ["skewed_0.5"], ["pooled"], [0], [4])
    recipe = bench.scenario_run.recipe_from_json(job.recipe, "the job")
    scenario = bench.scenario_run.build(job.scenario, hospitals, 0, 2)
    pooled = bench.scenario_run._recipe_of(job, recipe, scenario)
    assert pooled.optim.batch_size == 6 * recipe.optim.batch_size  # two sites a modality
    before, after = (r.optim.batch_size * r.optim.learning_rate for r in (recipe, pooled))
    assert after == pytest.approx(before)  # the rate is for 256 images
    (sites,) = bench.scenario_run.runs_of(job, scenario)
    images = sum(len(shard.images) for shard in sites["pooled"])
    assert images == sum((s.split == "train").sum() for held in hospitals.values() for s in held)


def test_arms_against_forgetting_run_where_somebody_leaves_alone(bench, study):
    jobs = bench.scenarios.plan(study, ["extreme", "leaving"], ["ours", "decay"], [0], [4])
    assert [(j.scenario, j.arm) for j in jobs] == [
        ("extreme", "ours"), ("leaving", "ours"), ("leaving", "decay"),
    ]  # fmt: skip
    assert not jobs[-1].tuned
    assert len({job.name for job in jobs}) == 3


def test_where_nobody_leaves_a_study_without_an_end_its_rate_stays_as_well(bench, study, hospitals):
    (job,) = bench.scenarios.plan(study, ["endless"], ["low_rate"], [0], [4])
    recipe = bench.scenario_run.recipe_from_json(job.recipe, "the job")
    scenario = bench.scenario_run.build("endless", hospitals, 0, recipe.federation.rounds)
    assert [scenario.answering(n) for n in (1, 2)] == [["cxr", "dermatology", "us"]] * 2
    assert not scenario.changing
    own = bench.scenario_run.arms_of(job, scenario)(2).recipe(recipe)
    peak = recipe.optim.learning_rate * recipe.optim.batch_size / 256
    assert [learning_rate(own, step) for step in range(4)] == pytest.approx([0.333 * peak] * 4)


def test_where_all_but_one_leave_the_rate_stays_and_losses_are_held_against_fedavg(
    bench, study, hospitals, monkeypatch, capsys
):
    monkeypatch.setitem(bench.scenario_sites.CHANGING, "alone", ("us", "dermatology"))
    arms = ["ours", "no_memory_fast", "decay"]
    ours, fedavg, decay = jobs = bench.scenarios.plan(study, ["alone"], arms, [0], [4])
    recipe = bench.scenario_run.recipe_from_json(ours.recipe, "the job")
    scenario = bench.scenario_run.build("alone", hospitals, 0, recipe.federation.rounds)
    assert [scenario.answering(n) for n in (1, 2)] == [["cxr", "dermatology", "us"], ["cxr"]]
    first, second = (bench.scenario_run.arms_of(decay, scenario)(n).recipe(recipe) for n in (1, 2))
    rates = [[learning_rate(r, step) for step in range(4)] for r in (first, second)]
    peak = recipe.optim.learning_rate * recipe.optim.batch_size / 256
    assert rates[0] == pytest.approx([peak] * 4)
    assert rates[1] == pytest.approx([decay.values["factor"] * peak] * 4)

    (hand_made,) = bench.scenarios.plan(study, ["extreme"], ["hand_made"], [0], [None])
    for job in (ours, fedavg, hand_made):
        bench.scenario_run.execute(job, hospitals, study.out)
    bench.scenarios.report(study, jobs)
    kept = read_json(study.results)["results"]["alone"]["4"]
    for probe in ("", "_standard"):
        lost = {
            arm: np.mean([
                kept[arm]["0"][f"end{probe}"][m]["auroc"]
                - kept[arm]["0"][f"half{probe}"][m]["auroc"]
                for m in ("us", "dermatology")
            ])
            for arm in arms[:2]
        }  # fmt: skip
        assert kept["ours"][f"change{probe}"]["mean"][0] == pytest.approx(lost["ours"])
        allowed = 0.3 * lost["no_memory_fast"]
        difference = kept["ours"][f"change_less_share{probe}"]["mean"][0]
        assert difference == pytest.approx(lost["ours"] - allowed)
        by_fedavg = kept["ours"][f"change_less_fedavg{probe}"]["mean"][0]
        assert by_fedavg == pytest.approx(lost["ours"] - lost["no_memory_fast"])
    found = bench.scenario_jobs.results_of(study, hand_made)["end"]
    ahead = [row["auroc"] - found[m]["auroc"] for m, row in kept["ours"]["0"]["end"].items()]
    assert kept["ours"]["less_hand_made"]["mean"][0] == pytest.approx(np.mean(ahead))
    heads = "| arm | probe [95 %] | less no_memory_fast's | less .3 of that |"
    assert heads in capsys.readouterr().out


def test_hand_made_features_need_no_weights_and_go_through_the_same_probe_and_vote(
    bench, study, hospitals
):
    jobs = bench.scenarios.plan(study, ["extreme"], ["hand_made"], [0, 1], [4])
    for job in jobs:
        bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)
    first, second = (bench.scenario_jobs.results_of(study, job) for job in jobs)
    assert first["end"] == second["end"]
    assert first["site_steps"] == 0
    (task,) = labelled_tasks(hospitals["us"])
    features = [hand_made(task, i) for i in (task.train, task.val, task.test)]
    train, val, test = (task.labels(i) for i in (task.train, task.val, task.test))
    probe = probe_scores(features[0], train, features[1], val, features[2])
    vote = measures(knn_scores(features[0], train, features[2], neighbours=20), test)
    found = first["end"]["us"]
    assert found["auroc"] == pytest.approx(auroc(probe, test))
    assert (found["knn"], found["knn_accuracy"]) == (vote["auroc"], vote["accuracy"])


def test_long_and_short_rounds_have_the_same_number_of_steps(bench, study):
    arms = ["ours", "long_rounds", "short_rounds"]
    for steps, expected in (
        (80, [(40, 2), (4, 20), (80, 1)]),
        (24, [(12, 2), (2, 12), (24, 1)]),  # 10 times 2 do not divide 24, nor leave two rounds
        (30, [(15, 2), (2, 15), (30, 1)]),
    ):
        jobs = bench.scenarios.plan(study, ["extreme"], arms, [0], [steps])
        federations = [bench.scenario_run.recipe_from_json(j.recipe, "").federation for j in jobs]
        assert [(f.rounds, f.local_steps) for f in federations] == expected
        assert [job.name for job in jobs] == [f"extreme-{arm}-{steps}-0" for arm in arms]


def test_draws_come_back_from_the_disk_as_they_were(bench, study):
    (job,) = bench.scenarios.plan(study, ["extreme"], ["ours"], [0], [4])
    draws = np.linspace(0, 1, 1000, dtype=np.float32)
    save_arrays(study.out / "measured" / f"{job.name}.safetensors", {"end/us": draws})
    row = {"auroc": 0.5, "freedom": 7.0}
    write_json(study.out / "measured" / f"{job.name}.json", {"end": {"us": row}})
    found = bench.scenario_jobs.draws_of(study, job, "end")["us"]
    assert (found.value, found.freedom) == (0.5, 7.0)
    np.testing.assert_array_equal(found.draws, draws)
    assert bench.scenario_jobs.draws_of(study, job, "end_early") == {}


def test_a_study_runs_from_the_command_to_the_tables_and_not_twice(
    bench, study, hospitals, tmp_path, monkeypatch, capsys
):
    (tmp_path / "npz").mkdir()
    for modality in ("cxr", "us"):
        (shard,) = hospitals[modality]
        arrays = {}
        for split in ("train", "val", "test"):
            chosen = shard.split == split
            arrays |= {f"{split}_images": shard.images[chosen][..., 0]}
            arrays |= {f"{split}_labels": shard.label[chosen][:, None]}
        np.savez(tmp_path / "npz" / f"{modality}_phantoms.npz", **arrays)
    words = ["--data", tmp_path / "npz", "--out", tmp_path / "out", "--seeds", 0, "--jobs", 1]
    words += ["--steps", 4, "--scenarios", "extreme", "--arms", "ours"]
    monkeypatch.setattr("sys.argv", ["scenarios.py", *map(str, words)])
    monkeypatch.setenv("PYTHONPATH", str(bench.real_images.ROOT))
    bench.scenarios.main()
    measured = tmp_path / "out" / "measured" / "extreme-ours-4-0.json"
    first = measured.stat().st_mtime_ns
    assert "done: extreme-ours-4-0.json" in (printed := capsys.readouterr().out)
    assert "CPU seconds: a step of a site" in printed
    bench.scenarios.main()
    assert measured.stat().st_mtime_ns == first
    monkeypatch.setattr("sys.argv", ["scenarios.py", *map(str, words), "--pretend"])
    capsys.readouterr()
    bench.scenarios.main()
    assert capsys.readouterr().out.startswith("done: extreme-ours-4-0")


def test_one_pass_serves_the_probe_of_the_product_and_the_others(bench, study_recipe, hospitals):
    state = initial_state(study_recipe)
    full, others = bench.scenario_measure.of_network(study_recipe, state.teacher)
    (shard,) = hospitals["us"]
    (task,) = labelled_tasks([shard])
    backbone, chosen = bench.scenario_measure.backbone_of(study_recipe, state.teacher), task.test
    px = study_recipe.views.global_px
    expected = extract(backbone, shard.images[chosen], "us", px, last_blocks=2)
    assert full.extract(task, chosen) == pytest.approx(expected, abs=1e-5)
    mean, std = (torch.tensor(part)[:, None, None] for part in MEAN_STD["us"])
    pixels = torch.from_numpy(shard.images[chosen]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        tokens = backbone.forward_features((pixels - mean) / std)
    usual = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).numpy()
    found = others["standard"].extract(task, chosen)
    assert found.shape[1] == 2 * usual.shape[1]  # of two blocks, the last one last
    assert found[:, usual.shape[1] :] == pytest.approx(usual, abs=1e-5)
    found, added = others["early"].extract(task, chosen), 2 * backbone.num_features
    assert found[:, :-added] == pytest.approx(expected, abs=1e-5)
    whole = []
    for shown in (pixels, pixels.flip(-1)):
        with torch.no_grad():
            first = backbone._pos_embed(backbone.patch_embed((shown - mean) / std))[:, 1:]
        whole.append(torch.cat([first.mean(1), first.std(1, correction=0)], 1).numpy())
    assert found[:, -added:] == pytest.approx((whole[0] + whole[1]) / 2, abs=1e-5)


def test_another_recipe_or_device_leaves_our_results_alone(bench, study, tmp_path):
    assert study.results == bench.scenario_tables.RESULTS
    jobs = bench.scenario_jobs
    other = jobs.Study(study.data, tmp_path / "gpu", device="cuda")
    assert other.results == tmp_path / "gpu" / "scenarios.json"
    assert other.tried == tmp_path / "gpu" / "competitors.json"
    assert jobs.make_job(other, "extreme", "ours", 0, 4).device == "cuda"
