"""Jobs from the plan to the tables."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from core.checkpoint import read_json, save_arrays, write_json
from core.config import load_recipe
from core.errors import UserError
from core.evaluate import auroc, extract, knn_scores, labelled_tasks, measures, probe_scores
from core.evaluation.baselines import hand_made
from core.evaluation.intervals import Resampled
from core.initial import initial_state
from core.modalities import MEAN_STD
from core.pretrain import Pretraining
from core.shards import write_shard


@pytest.fixture
def study(bench, study_recipe, hospitals, tmp_path, monkeypatch):
    """A study of phantoms whose start is random, without a process a job."""
    for modality, shards in hospitals.items():
        for shard in shards:
            write_shard(tmp_path / "data" / modality / shard.name, shard)
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(
        bench.real_images.toml_text(study_recipe.model_dump(mode="json", exclude_none=True))
    )
    assert load_recipe(recipe_file) == study_recipe
    monkeypatch.setattr(bench.real_images, "RECIPE", recipe_file)
    monkeypatch.setattr(bench.scenario_tables, "RESULTS", tmp_path / "scenarios.json")
    return bench.scenario_jobs.Study(tmp_path / "data", tmp_path)


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


def test_alone_each_site_trains_in_every_round_and_is_measured_on_its_own(bench, study, hospitals):
    (job,) = bench.scenarios.plan(study, ["leaving"], ["local"], [0], [4])
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


def test_only_arms_with_a_network_have_a_start_made(bench, study, study_recipe, monkeypatch):
    study.recipe = bench.federation_loop.changed(study_recipe, model={"phantom_steps": 1})
    commands = []
    monkeypatch.setattr(bench.real_images, "prepare", lambda data, out: {})
    monkeypatch.setattr(bench.real_images, "run_all", lambda some, jobs: commands.extend(some))
    for arm, programs in (
        ("pixels", ["scenario_run.py"]), ("ours", ["scenario_start.py", "scenario_run.py"])
    ):  # fmt: skip
        commands.clear()
        jobs = bench.scenarios.plan(study, ["extreme"], [arm], [0], [4])
        bench.scenario_jobs.run_jobs(study, jobs, 1)
        assert [words[1].rpartition("/")[2] for words in commands] == programs


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


def test_votes_are_shown_with_the_largest_distance_from_their_mean(bench):
    values = {"ours": [(0.5, 0.9), (0.6, 0.9), (1.0, 0.9)], "local": [(0.5,)]}
    study = {
        arm: {
            str(seed): {
                "end": {m: {"knn_accuracy": v} for m, v in zip(("us", "ct"), row, strict=False)}
            }
            for seed, row in enumerate(rows)
        }
        for arm, rows in values.items()
    }
    lines = bench.scenario_tables.votes(study).splitlines()
    assert lines[0] == "| arm | CT | ultrasound | mean |"
    assert lines[2:] == [
        "| ours | 0.900 ± 0.000 | 0.700 ± 0.300 | 0.800 ± 0.150 |",
        "| local |  | 0.500 | 0.500 |",
    ]


def test_an_arm_measured_before_votes_were_counted_has_no_row_of_them(bench):
    older, newer = {"end": {"us": {"knn": 0.5}}}, {"end": {"us": {"knn_accuracy": 0.5}}}
    table = bench.scenario_tables.votes({"ours": {"0": newer, "1": older}, "local": {"0": newer}})
    assert [line.split()[1] for line in table.splitlines()] == ["arm", "---", "local"]


def resampled(value, generator, noise):
    """A measure with draws about it."""
    return Resampled(value, value + noise + 0.01 * generator.standard_normal(1000), 100.0)


def test_each_arm_is_held_against_hand_made_features_in_every_modality(bench, study, hospitals):
    jobs = bench.scenarios.plan(study, ["extreme"], ["init", "hand_made"], [0], [4])
    for job in jobs:
        bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)
    bench.scenarios.report(study, jobs[:1])  # hand-made features need not be named again
    rows = read_json(study.results)["results"]["extreme"]["4"]
    init, hand_made = (rows[arm]["0"]["end"]["us"]["auroc"] for arm in ("init", "hand_made"))
    assert rows["init"]["less_hand_made"]["us"][0] == pytest.approx(init - hand_made)
    assert "less_hand_made" not in rows["hand_made"]
    heads, _, *lines = bench.scenario_tables.over_hand_made(rows).splitlines()
    assert heads == "| less hand-made [95 %] | ultrasound | mean |"
    assert [line.split()[1] for line in lines] == ["init"]
    assert lines[0].split()[3] == f"{init - hand_made:+.3f}"


def test_differences_are_paired_over_images_and_seeds(bench):
    generator = np.random.default_rng(0)
    ours, arm = {}, {}
    for seed, level in enumerate((0.6, 0.7, 0.8)):  # seeds differ far more than arms
        noise = 0.05 * generator.standard_normal(1000)  # of the images, for both alike
        ours[seed] = {"us": resampled(level, generator, noise)}
        arm[seed] = {"us": resampled(level + 0.03, generator, noise)}
    found = bench.scenario_compare.differences(arm, ours)
    for name in ("us", bench.scenario_compare.MEAN):
        assert found[name].difference == pytest.approx(0.03)
        assert 0.005 < found[name].low < 0.03 < found[name].high < 0.055
    del arm[2]  # a seed that only one has does not count
    assert bench.scenario_compare.differences(arm, ours)["us"].difference == pytest.approx(0.03)


def test_an_arm_that_helps_one_seed_of_three_alone_is_not_told_from_ours(bench):
    generator = np.random.default_rng(0)
    still = np.zeros(1000)
    ours = {seed: {"us": resampled(0.7, generator, still)} for seed in range(3)}
    arm = {seed: {"us": resampled(0.7 + 0.1 * (seed == 0), generator, still)} for seed in range(3)}
    found = bench.scenario_compare.differences(arm, ours)["us"]
    assert found.difference == pytest.approx(0.1 / 3)
    assert found.low < 0.01


def test_a_later_run_of_one_seed_keeps_the_comparison_of_all(bench, study, hospitals):
    jobs = bench.scenarios.plan(study, ["extreme"], ["ours", "init"], [0, 1], [4])
    for job in jobs:
        bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)
    bench.scenarios.report(study, jobs)
    first = read_json(study.results)
    later = bench.scenarios.plan(study, ["extreme"], ["init"], [1], [4])
    bench.scenarios.report(study, later)
    assert read_json(study.results) == first
    assert "less_ours" in first["results"]["extreme"]["4"]["init"]


def test_growth_is_the_slope_over_doublings_and_knows_no_growth_from_little(bench):
    generator = np.random.default_rng(0)
    noise = {seed: 0.05 * generator.standard_normal(1000) for seed in range(3)}
    growing, still = (
        {
            length: {
                seed: {"us": resampled(0.7 + seed / 50 + slope * step, generator, noise[seed])}
                for seed in range(3)
            }
            for step, length in enumerate((100, 200, 400))
        }
        for slope in (0.02, 0.0)
    )
    found = bench.scenario_compare.per_doubling(growing)["us"]
    assert found.difference == pytest.approx(0.02)
    assert 0.005 < found.low < 0.02 < found.high < 0.035
    found = bench.scenario_compare.per_doubling(still)[bench.scenario_compare.MEAN]
    assert found.low < 0 < found.high


def test_an_arm_is_held_against_itself_with_all_data_and_sites(bench, study, hospitals):
    for scenario in ("extreme", "quarter", "sixteenth", "three"):
        for job in bench.scenarios.plan(study, [scenario], ["ours"], [0], [4]):
            bench.scenario_run.execute(job, hospitals, study.out)
            bench.scenarios.report(study, [job])
    bench.scenarios.report(study, bench.scenarios.plan(study, ["extreme"], ["ours"], [0], [4]))
    rows = {name: row["4"] for name, row in read_json(study.results)["results"].items()}
    values = {name: row["ours"]["0"]["end"]["us"]["auroc"] for name, row in rows.items()}
    assert "dermatology" in rows["three"]["ours"]["0"]["end"]  # though nobody trained on it
    for name in ("quarter", "three"):
        difference = values[name] - values["extreme"]
        assert rows[name]["ours"]["less_extreme"]["us"][0] == pytest.approx(difference)
        table = bench.scenario_tables.over_extreme(rows[name])
        assert table.splitlines()[2].startswith("| ours |")
    slope = np.polyfit([0, -2, -4], [values[n] for n in ("extreme", "quarter", "sixteenth")], 1)[0]
    found = rows["extreme"]["ours"]["per_data_doubling"]["us"][0]
    assert found == pytest.approx(slope, abs=1e-9)  # nothing, of either sign, on some processors
    table = bench.scenario_tables.data_growth(rows["extreme"])
    assert f"{found:+.3f}" in table.splitlines()[2]


def test_draws_come_back_from_the_disk_as_they_were(bench, study):
    (job,) = bench.scenarios.plan(study, ["extreme"], ["ours"], [0], [4])
    draws = np.linspace(0, 1, 1000, dtype=np.float32)
    save_arrays(study.out / "measured" / f"{job.name}.safetensors", {"end/us": draws})
    row = {"auroc": 0.5, "freedom": 7.0}
    write_json(study.out / "measured" / f"{job.name}.json", {"end": {"us": row}})
    found = bench.scenario_jobs.draws_of(study, job, "end")["us"]
    assert (found.value, found.freedom) == (0.5, 7.0)
    np.testing.assert_array_equal(found.draws, draws)


def test_all_jobs_of_a_seed_begin_as_the_product_does_heads_included(
    bench, study, study_recipe, monkeypatch, load_benchmark
):
    recipe = bench.federation_loop.changed(study_recipe, model={"phantom_steps": 1})
    small = functools.partial(Pretraining, phantoms=16, batch_size=14)
    monkeypatch.setattr("core.pretrain.Pretraining", small)
    file = study.out / "phantoms.toml"
    table = recipe.model_dump(mode="json", exclude_none=True)
    file.write_text(bench.real_images.toml_text(table))
    monkeypatch.setattr(bench.real_images, "RECIPE", file)
    begun = bench.scenario_jobs.Study(study.data, study.out)
    monkeypatch.setattr("sys.argv", ["", *begun.start_command(5, "ours")[2:]])
    load_benchmark("scenario_start").main()
    job = bench.scenario_jobs.make_job(begun, "extreme", "ours", 5, 4)
    found = initial_state(bench.scenario_run.recipe_from_json(job.recipe, "the job")).student
    expected = initial_state(recipe.model_copy(update={"seed": 5})).student
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    drawn = initial_state(recipe.from_scratch.model_copy(update={"seed": 5})).student
    name = "description.grid.bias"
    assert not np.array_equal(found[name], drawn[name])


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


def test_the_picture_shows_every_arm_and_is_the_same_each_time(bench, tmp_path):
    arms = {
        name: {str(seed): {"end": {"us": {"auroc": value + seed / 100}}} for seed in (0, 1)}
        for name, value in {"ours": 0.8, "local": 0.7}.items()
    }
    arms["local"]["less_ours"] = {"mean": [-0.1, -0.15, -0.05, 0.01]}
    files = [tmp_path / name for name in ("first.svg", "again.svg")]
    for file in files:
        bench.scenario_plot.draw_arms(file, "extreme", arms)
    first, again = (file.read_text() for file in files)
    assert first == again
    assert all(f"<!-- {arm} -->" in first for arm in arms)


def test_one_pass_serves_the_probe_of_the_product_and_the_usual_one(bench, study_recipe, hospitals):
    state = initial_state(study_recipe)
    full, standard = bench.scenario_measure.of_network(study_recipe, state.teacher)
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
    found = standard.extract(task, chosen)
    assert found.shape[1] == 2 * usual.shape[1]  # of two blocks, the last one last
    assert found[:, usual.shape[1] :] == pytest.approx(usual, abs=1e-5)


def test_a_page_holds_the_figures_of_the_study_and_says_which_it_lacks(bench):
    arms = {
        "ours": {"0": {"end": {"us": {"auroc": 0.75, "knn_accuracy": 0.5}}}},
        "local": {
            "0": {"end": {"us": {"auroc": 0.5, "knn_accuracy": 0.25}}},
            "less_ours": {"us": [-0.25, -0.3, -0.2, 0.01], "mean": [-0.25, -0.3, -0.2, 0.01]},
        },
    }
    results = {"extreme": {"4": arms}}
    mark = "<!-- table extreme 4 by_modality ours local -->"
    page = f"Before\n{mark}\nold\n<!-- end -->\nafter"
    filled = bench.scenario_tables.filled(page, results)
    assert filled.splitlines() == [
        "Before", mark, "| less ours [95 %] | ultrasound |", "| --- | --- |",
        "| local | -0.250 [-0.300, -0.200] |", "<!-- end -->", "after",
    ]  # fmt: skip
    assert bench.scenario_tables.filled(filled, results) == filled
    wrong = page.replace("local", "dino")
    with pytest.raises(UserError, match=r"'extreme 4 by_modality ours dino'.*not found: 'dino'"):
        bench.scenario_tables.filled(wrong, results)


def test_our_pages_say_what_the_study_found(bench):
    results = bench.scenario_tables.all_results()
    for name in ("README.md", "docs/results.md"):
        page = (bench.real_images.ROOT / name).read_text()
        assert bench.scenario_tables.TABLE.search(page)
        assert bench.scenario_tables.filled(page, results) == page


def test_what_the_coordinator_noticed_is_summed_and_quiet_arms_are_left_out(bench):
    quiet = {"outliers": 0, "rejected": 0, "held": []}
    loud = {"outliers": 2, "rejected": 1, "held": ["us"]}
    study = {"ours": {"0": quiet, "1": loud, "2": loud}, "local": {"0": quiet}}
    lines = bench.scenario_tables.noticed(study).splitlines()
    assert lines[2:] == ["| ours | 4 | 2 | us |"]


def test_the_values_that_were_chosen_are_bold_among_those_tried(bench):
    rows = [
        {"values": {"rate": rate}, "val": {"student": 0.5, "teacher": rate / 10}}
        for rate in (1.0, 3.0)
    ]
    arm = {"tries": rows, "chosen": {"rate": 3.0, "measured": "student"}}
    mark = "<!-- table tuning val tries dino -->"
    page = bench.scenario_tables.filled(f"{mark}\n<!-- end -->", {"tuning": {"val": {"dino": arm}}})
    assert page.splitlines()[3:-1] == [
        "| dino | rate: 1.0 | 0.5000 | 0.1000 |",
        "| dino | rate: 3.0 | **0.5000** | 0.3000 |",
    ]


def test_a_shorter_start_has_its_own_file_and_the_others_share_one(bench, study, study_recipe):
    study.recipe = bench.federation_loop.changed(study_recipe, model={"phantom_steps": 7})
    assert study.start(3, "ours") == study.start(3, "mae") != study.start(3, "init_1600")
    assert study.start(3, "ours_25600") == study.start(3, "no_memory_25600")
    assert study.start_command(3, "init_1600")[3:6] == ["1600", "cpu", "3"]
    assert study.start_command(3, "ours_25600")[3:6] == ["25600", "cpu", "3"]
    assert study.start_command(3, "dino")[3:6] == ["7", "cpu", "3"]


def test_a_start_of_another_width_is_made_and_measured_as_such(
    bench, study, study_recipe, monkeypatch, load_benchmark, hospitals
):
    small = functools.partial(Pretraining, phantoms=16, batch_size=14)
    monkeypatch.setattr("core.pretrain.Pretraining", small)
    monkeypatch.setitem(bench.competitors.STARTS, "init_wide", 1)
    monkeypatch.setitem(bench.competitors.STARTS, "init_1600", 1)
    file = study.out / "widths.toml"
    file.write_text(
        bench.real_images.toml_text(study_recipe.model_dump(mode="json", exclude_none=True))
    )
    monkeypatch.setattr(bench.real_images, "RECIPE", file)
    begun = bench.scenario_jobs.Study(study.data, study.out)
    main = load_benchmark("scenario_start").main
    jobs = bench.scenarios.plan(begun, ["extreme"], ["init_1600", "init_wide"], [0], [4])
    for job in jobs:
        monkeypatch.setattr("sys.argv", ["", *begun.start_command(0, job.arm)[2:]])
        main()
        bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)
    bench.scenarios.report(begun, jobs)
    rows = read_json(begun.results)["results"]["extreme"]["4"]
    narrow, wide = (rows[job.arm]["0"] for job in jobs)
    assert 3 < wide["weights"] / narrow["weights"] < 4  # the patches' projection grows less
    doublings = np.log2(wide["weights"] / narrow["weights"])
    growth = (wide["end"]["us"]["auroc"] - narrow["end"]["us"]["auroc"]) / doublings
    found = rows["init_1600"]["per_weights_doubling"]["us"][0]
    assert found == pytest.approx(growth, abs=1e-9)
    table = bench.scenario_tables.width_growth(rows)
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["init_1600"]
    assert f"{found:+.3f}" in table


def test_another_recipe_or_device_leaves_our_results_alone(bench, study, tmp_path):
    assert study.results == bench.scenario_tables.RESULTS
    jobs = bench.scenario_jobs
    other = jobs.Study(study.data, tmp_path / "gpu", device="cuda")
    assert other.results == tmp_path / "gpu" / "scenarios.json"
    assert other.tried == tmp_path / "gpu" / "competitors.json"
    assert jobs.make_job(other, "extreme", "ours", 0, 4).device == "cuda"
