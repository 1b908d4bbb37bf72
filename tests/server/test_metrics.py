import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from core.errors import UserError
from server.history import read_history
from server.metrics import METRICS, PREFIX, StudyCollector, of_history

DOCS = Path(__file__).parents[2] / "docs"
TWO = {"st-mary": ("ct", "us"), "city": ("cxr",)}


def scraped(collector):
    """Sample name and labels -> value, as Prometheus's own parser reads the endpoint's text."""
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        name = sample.name.removeprefix(PREFIX)
        found[name, *(sample.labels[label] for label in METRICS[name].labels)] = sample.value
    return found


def test_a_study_reads_as_its_history_says(make_study):
    def change(number, sites, line):
        if number == 2:
            sites["city"] = {"outcome": "silent", "reason": "no reply", "asked": 3}
            line["alarms"] = ["site 'st-mary': ct: collapse"]
        if number == 3:
            line["outliers"] = [{"site": "city", "figure": "cosine", "words": "x"}]

    run = make_study(TWO, rounds=3, planned=5, change=change)
    found = scraped(StudyCollector(run))
    assert found["rounds_done",] == 3
    assert found["rounds_planned",] == 5
    assert found["study_running",] == 0
    assert found["study_failed",] == 0
    assert found["bytes_total", "down"] == 6000
    assert found["phase_seconds_total", "exchange"] == 135
    assert found["round_seconds", "exchange"] == 45
    assert found["sites_admitted",] == 2
    assert found["collapse_alarms_total",] == 1
    assert found["last_round_collapse_alarms",] == 0
    assert found["loss", "ct"] == pytest.approx(3.97)
    assert found["knn_auroc", "cxr"] == pytest.approx(0.7)
    assert found["site_rounds_total", "city", "admitted"] == 2
    assert found["site_rounds_total", "city", "silent"] == 1
    assert found["site_asked_again_total", "city"] == 2
    assert found["site_outliers_total", "city"] == 1
    assert found["site_outliers_total", "st-mary"] == 0
    assert found["site_images", "st-mary", "us"] == 100
    assert found["site_update_norm", "city"] == pytest.approx(1.1)
    assert found["site_cosine", "city"] == 0.25


def test_a_site_that_is_gone_keeps_its_last_admitted_round(make_study):
    def change(number, sites, line):
        if number > 1:
            sites["city"] = {"outcome": "absent", "reason": "not connected"}

    found = scraped(StudyCollector(make_study(TWO, rounds=3, change=change)))
    assert found["site_last_admitted_round", "city"] == 1
    assert found["site_last_admitted_round", "st-mary"] == 3


def test_a_new_round_and_a_failure_are_seen_by_the_next_scrape(make_study):
    run = make_study(TWO, rounds=3)
    file = run / "history.jsonl"
    whole = file.read_text()
    file.write_text(whole[: whole.index("\n") + 1])
    collector = StudyCollector(run)
    assert scraped(collector)["rounds_done",] == 1
    file.write_text(whole)
    (run / "failure.json").write_text("{}")
    found = scraped(collector)
    assert (found["rounds_done",], found["study_failed",]) == (3, 1)


def test_a_study_that_works_is_running(make_study):
    from server.history import open_run, read_recipe

    run = make_study(TWO)
    collector = StudyCollector(run)
    with open_run(run, read_recipe(run / "recipe.json")).locked():
        assert scraped(collector)["study_running",] == 1
    assert scraped(collector)["study_running",] == 0


def test_a_study_before_its_first_round_has_metrics_too(make_study):
    run = make_study(TWO)
    (run / "history.jsonl").unlink()
    found = scraped(StudyCollector(run))
    assert (found["rounds_done",], found["last_round_timestamp_seconds",]) == (0, 0)


def test_names_of_sites_cannot_break_out_of_their_label(make_study):
    odd = 'a"} 1\nfedmermed_loss{modality="ct"} 0\\'

    def change(number, sites, line):
        sites[odd] = {"outcome": "absent", "reason": "not connected"}

    found = scraped(StudyCollector(make_study(TWO, change=change)))
    assert found["site_rounds_total", odd, "absent"] == 2
    assert found["loss", "ct"] == pytest.approx(3.98)


def test_a_metric_that_is_on_no_list_is_not_shown(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"] |= {"secret/ct": 1.0, "loss/patient-7": 2.0, "site_weight/ct": 3.0}

    found = scraped(StudyCollector(make_study(TWO, change=change)))
    assert not [key for key in found if "secret" in str(key) or "patient" in str(key)]
    assert ("site_weight", "ct") not in found


def test_every_documented_metric_is_made_and_every_made_one_is_documented(make_study):
    run = make_study(TWO)
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `fedmermed_(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(METRICS)
    for name, kind, labels, words in rows:
        assert kind == ("counter" if name.endswith("_total") else "gauge")
        assert tuple(re.findall(r"`(\w+)`", labels)) == METRICS[name].labels
        assert words == METRICS[name].help
    for name in re.findall(r"fedmermed_(\w+)", text):
        assert name in METRICS
    made = {name for name, samples in of_history(read_history(run)).items() if samples}
    now = {"study_info", "study_running", "study_failed", "rounds_planned"}
    optional = {"epsilon", "site_epsilon", "koleo", "description"}
    assert set(METRICS) - made - now - optional == {"last_round_timestamp_seconds"}


def test_epsilon_is_told_by_site_and_of_the_model(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"]["epsilon"] = 1.5 * number
        line["metrics"] = {"epsilon": 0.25 * number}

    found = scraped(StudyCollector(make_study(TWO, change=change)))
    assert found["site_epsilon", "city"] == 3.0
    assert found["epsilon",] == 0.5


def test_the_grafana_dashboard_asks_only_for_metrics_and_labels_that_exist():
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    queries = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) >= 15
    for query in queries:
        names = re.findall(r"fedmermed_(\w+)", query["expr"])
        assert names
        labels = {label for name in names for label in METRICS[name].labels}
        asked = re.findall(r"{{(\w+)}}", query["legendFormat"])
        asked += re.findall(r"by \((\w+)\)", query["expr"])
        assert set(asked) <= labels, query
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used == variables
    assert "label_values(fedmermed_study_info, instance)" in json.dumps(dashboard)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_directory_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        StudyCollector(tmp_path)
