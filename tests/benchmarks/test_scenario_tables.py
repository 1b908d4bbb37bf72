"""What jobs left, as differences, tables, pictures and pages."""

import numpy as np
import pytest

from core.checkpoint import read_json, write_json
from core.errors import UserError
from core.evaluation.intervals import Resampled


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
    early = rows["init"]["0"]["end_early"]["us"]["auroc"]
    assert early != init
    for key, other in (("early_less_probe", init), ("early_less_hand_made", hand_made)):
        assert rows["init"][key]["us"][0] == pytest.approx(early - other)
        assert key not in rows["hand_made"]
    assert rows["hand_made"]["0"]["end_early"] == rows["hand_made"]["0"]["end_standard"]
    (line,) = bench.scenario_tables.early(rows).splitlines()[2:]
    assert line.split()[1:6:2] == ["init", f"{init:.3f}", f"{early:.3f}"]
    assert f" {early - hand_made:+.3f} " in line
    older = {key: cell for key, cell in rows["init"]["0"].items() if key != "end_early"}
    rows["init"]["1"] = older  # measured before that probe was
    assert len(bench.scenario_tables.early(rows).splitlines()) == 2


def test_ours_from_random_weights_is_held_against_fedavg_from_the_same(bench, study, hospitals):
    arms = ["without_start", "no_memory_without_start", "ours"]
    jobs = bench.scenarios.plan(study, ["extreme"], arms, [0], [4])
    for job in jobs:
        bench.scenario_run.execute(job, {"us": hospitals["us"]}, study.out)
    bench.scenarios.report(study, jobs)
    rows = read_json(study.results)["results"]["extreme"]["4"]
    ours, plain = (rows[arm]["0"]["end"]["us"]["auroc"] for arm in arms[:2])
    found = rows["without_start"]["less_no_memory"]["us"][0]
    assert found == pytest.approx(ours - plain)
    lines = bench.scenario_tables.over_no_memory(rows).splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["without_start"]
    assert lines[0].split()[3] == f"{found:+.3f}"


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
    first["results"]["extreme"]["4"]["ours"]["0"]["held"] = ["of another machine"]
    write_json(study.results, first)
    bench.scenarios.report(study, later)  # ours is held against, not asked for
    assert read_json(study.results) == first


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
    rows = {name: row["4"] for name, row in read_json(study.results)["results"].items()}
    values = {name: row["ours"]["0"]["end"]["us"]["auroc"] for name, row in rows.items()}
    assert "per_data_doubling" not in rows["three"]["ours"]
    assert "dermatology" in rows["three"]["ours"]["0"]["end"]  # though nobody trained on it
    for name in ("quarter", "three"):
        difference = values[name] - values["extreme"]
        assert rows[name]["ours"]["less_extreme"]["us"][0] == pytest.approx(difference)
        table = bench.scenario_tables.over_extreme(rows[name])
        assert table.splitlines()[2].startswith("| ours |")
    slope = np.polyfit([0, -2, -4], [values[n] for n in ("extreme", "quarter", "sixteenth")], 1)[0]
    found = rows["sixteenth"]["ours"]["per_data_doubling"]["us"][0]
    assert found == pytest.approx(slope, abs=1e-9)  # nothing, of either sign, on some processors
    table = bench.scenario_tables.data_growth(rows["sixteenth"])
    assert f"{found:+.3f}" in table.splitlines()[2]


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


def test_what_is_recorded_was_measured_with_the_recipe_as_it_is(bench, tmp_path):
    study = bench.scenario_jobs.Study(tmp_path, tmp_path)
    for file in (study.results, study.tried):
        assert read_json(file)["recipe_sha256"] == study.recipe_sha256
