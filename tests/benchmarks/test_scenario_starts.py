"""The weights with which the jobs of a study begin."""

import numpy as np
import pytest

from core.checkpoint import read_json
from core.config import load_recipe
from core.initial import initial_state


def test_only_arms_with_a_network_have_a_start_made(bench, study, study_recipe, monkeypatch):
    study.recipe = bench.federation_loop.changed(study_recipe, model={"phantom_steps": 1})
    commands = []

    def run_all(some, jobs, pinned):
        commands.extend(some)
        assert pinned == (study.device == "cpu")  # beside a GPU all processors draw phantoms

    monkeypatch.setattr(bench.real_images, "prepare", lambda data, out: {})
    monkeypatch.setattr(bench.real_images, "run_all", run_all)
    for arm, device, programs in (
        ("pixels", "cpu", ["scenario_run.py"]),
        ("ours", "cpu", ["scenario_start.py", "scenario_run.py"]),
        ("ours", "cuda", ["scenario_start.py", "scenario_run.py"]),
    ):
        commands.clear()
        study.device = device
        jobs = bench.scenarios.plan(study, ["extreme"], [arm], [0], [4])
        bench.scenario_jobs.run_jobs(study, jobs, 1)
        assert [words[1].rpartition("/")[2] for words in commands] == programs


def test_all_jobs_of_a_seed_begin_as_the_product_does_heads_included(
    bench, study, study_recipe, monkeypatch, load_benchmark
):
    recipe = bench.federation_loop.changed(study_recipe, model={"phantom_steps": 1, "phantoms": 16})
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
    recipe = bench.federation_loop.changed(study_recipe, model={"phantoms": 16})
    monkeypatch.setitem(bench.competitors.STARTS, "init_wide", 1)
    monkeypatch.setitem(bench.competitors.STARTS, "init_1600", 1)
    file = study.out / "widths.toml"
    table = recipe.model_dump(mode="json", exclude_none=True)
    file.write_text(bench.real_images.toml_text(table))
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


def test_the_recipe_for_gpus_differs_from_the_measured_one_as_it_says_alone(bench, tmp_path):
    study = bench.scenario_jobs.Study(tmp_path, tmp_path)
    wide = study.options("ours_wide")
    model = {"options": wide, "phantom_steps": 25_600, "phantom_batch": 56}
    expected = bench.federation_loop.changed(study.recipe, model=model)
    recipe = load_recipe(study.recipe_file.with_name("seven_sites_gpu.toml"))
    assert recipe == expected.model_copy(update={"name": recipe.name})
