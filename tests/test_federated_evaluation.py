"""A model measured at several sites, through the real apps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict
from sklearn.metrics import roc_auc_score

from core.admission import Rejected
from core.checkpoint import read_json, save_arrays
from core.config import load_recipe
from core.errors import UserError
from core.evaluate import probe_scores
from core.evaluation.shared_probe import fit_shared_probe, read_probes, site_tasks
from core.export import load_model
from core.initial import initial_state
from core.phantoms import make_phantoms
from core.shards import open_shard, write_shard
from core.sites import open_site
from server.__main__ import main
from server.engines import load_client_app
from server.evaluation import ask_sites, evaluate, make_request, read_reply
from server.evaluation_report import combine
from server.grid import InProcessGrid

OPEN = "min_test_images = 2\nsend_score_histograms = true\nmin_patients_per_cell = 2\n"
TOML = """
[model]
options = { embed_dim = 32, depth = 2, num_heads = 2, patch_size = 8 }
[views]
global_px = 32
local_px = 16
"""


@pytest.fixture
def model(tmp_path):
    """A recipe: its random network is measured."""
    file = tmp_path / "model.toml"
    file.write_text(TOML)
    return file


@pytest.fixture
def images(tmp_path):
    """The evaluator's own labelled images."""
    shard = make_phantoms("cxr", patients=42, images_per_patient=2, px=32, seed=99)
    return write_shard(tmp_path / "own", shard)


def test_the_shared_probe_is_the_probe_of_core_evaluate(model, images):
    loaded = load_model(model)
    (task,) = site_tasks([open_shard(images)])
    probe = fit_shared_probe(loaded, task, last_blocks=2)
    train, val, test = (task.features(loaded, s, last_blocks=2) for s in ("train", "val", "test"))
    expected = probe_scores(train, task.labels("train"), val, task.labels("val"), test)
    assert probe.classes == ("normal", "opacity")
    assert probe.scores(test) == pytest.approx(expected, abs=1e-5)  # sklearn computes in float32


def test_pooled_auroc_is_sklearns_on_the_scores_that_never_left(model, images, make_sites):
    files = make_sites({n: ["cxr"] for n in ("a", "b", "c")}, patients=84, policy=OPEN)
    result = evaluate(model, data=files[0].parents[1], probe_data=images, last_blocks=2)
    pooled = result["modalities"]["cxr"]["pooled"]

    loaded = load_model(model)
    request, arrays = make_request(model, images, 2, 20)
    probe = read_probes(arrays, request.probe_classes)["cxr"]
    scores, labels = [], []
    for file in files:
        (task,) = site_tasks(open_site(file.parent / "data"))
        scores.append(probe.scores(task.features(loaded, "test", last_blocks=2))[:, 1])
        labels.append(task.labels("test"))
    expected = roc_auc_score(np.concatenate(labels), np.concatenate(scores))
    assert pooled["low"] <= expected <= pooled["high"]
    assert pooled["low"] < pooled["auroc"] < pooled["high"]
    assert pooled["sites"] == 3
    assert pooled["too_coarse"] == (pooled["high"] - pooled["low"] > 0.2)
    share = pooled["within_share"]
    assert share * pooled["within"] + (1 - share) * pooled["across"] == pytest.approx(
        pooled["auroc"]
    )
    own = [s["modalities"]["cxr"]["shared_probe"]["auroc"] for s in result["sites"].values()]
    assert own == pytest.approx([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)])
    counts = [len(y) for y in labels]
    mean = result["modalities"]["cxr"]["mean_of_sites"]["shared_probe"]["auroc"]
    assert mean == pytest.approx(np.average(own, weights=counts))


def test_without_a_shared_probe_nothing_is_pooled_and_the_reason_is_said(model, make_sites, capsys):
    files = make_sites({"a": ["us"], "b": ["us"]}, patients=42, policy=OPEN)
    result = evaluate(model, data=files[0].parents[1])
    assert result["modalities"]["us"]["pooled"] is None
    assert result["modalities"]["us"]["sites"] == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "No pooled AUROC: it takes one probe for all sites" in out
    assert "mean of sites" in out


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedmermed-server", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_command_lists_failures_by_name_and_goes_on(
    model, make_sites, tmp_path, monkeypatch, capsys
):
    policy = "min_test_images = 2\n"
    files = make_sites({n: ["us"] for n in ("a", "shut", "torn")}, patients=42, policy=policy)
    files[1].write_text(files[1].read_text() + "send_metrics = false\n")
    files[2].write_text("nonsense = [")
    report = tmp_path / "report.json"
    assert command(monkeypatch, model, "--data", files[0].parents[1], "--out", report) == 0
    result = read_json(report)
    assert set(result["sites"]) == {"a"}
    assert result["failures"] == {
        "shut": "this site's policy sends no metrics",
        "torn": "the site could not do this (UserError); its log says why",
    }
    out = capsys.readouterr().out
    assert "'shut' did not answer: this site's policy sends no metrics" in out
    assert "'torn' did not answer: the site could not do this" in out


def test_no_answer_at_all_is_an_error_with_the_reasons(
    model, make_sites, tmp_path, monkeypatch, capsys
):
    files = make_sites({"a": ["us"]}, patients=42, policy="send_metrics = false\n")
    report = tmp_path / "report.json"
    assert command(monkeypatch, model, "--data", files[0].parents[1], "--out", report) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: none of 1 site(s) answered ('a': this site's policy sends no")
    assert read_json(report)["failures"] == {"a": "this site's policy sends no metrics"}


def test_shards_without_site_files_are_sites_with_the_default_policy(model, tmp_path):
    for name in ("north", "south"):
        shard = make_phantoms("us", patients=70, images_per_patient=2, px=32, seed=len(name))
        write_shard(tmp_path / "data" / name, shard)
    result = evaluate(model, data=tmp_path / "data", probe_data=tmp_path / "data")
    assert set(result["sites"]) == {"north", "south"}
    assert result["modalities"]["us"]["pooled"] is None
    notes = [site["notes"] for site in result["sites"].values()]
    assert notes == [{"pooling/us": "this site's policy sends no score histograms"}] * 2


def test_a_run_is_measured_at_its_own_sites(model, make_sites):
    (file,) = make_sites({"a": ["us"]}, patients=42, policy=OPEN)
    run = file.parents[2]  # RUN/sites/a/site.toml
    recipe = load_recipe(model)
    (run / "recipe.json").write_text(recipe.to_json())
    save_arrays(run / "round-0001.safetensors", initial_state(recipe).to_arrays())
    assert set(evaluate(run)["sites"]) == {"a"}


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "has no sites of its own"), ("nowhere", "'nowhere' does not exist; check the path")],
)
def test_without_sites_the_error_says_what_to_give(model, data, words):
    with pytest.raises(UserError, match=words):
        evaluate(model, data=Path(data) if data else None)


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    """A request with a shared probe, and its arrays."""
    home = tmp_path_factory.mktemp("question")
    (home / "model.toml").write_text(TOML)
    shard = make_phantoms("cxr", patients=28, images_per_patient=2, px=32, seed=99)
    return make_request(home / "model.toml", write_shard(home / "own", shard), 2, 5)


@pytest.fixture(scope="module")
def answer(question, tmp_path_factory):
    """What a good site answers."""
    home = tmp_path_factory.mktemp("site")
    shard = make_phantoms("cxr", patients=28, images_per_patient=2, px=32, seed=0)
    write_shard(home / "data" / "cxr", shard)
    text = f"name = 'good'\nshards = ['data']\nthreads = 1\ndevice = 'cpu'\n[policy]\n{OPEN}"
    (home / "site.toml").write_text(text)
    grid = WatchedGrid([home / "site.toml"])
    answers, failures = ask_sites(grid, *question, places={})
    assert set(answers) == {"good"}
    assert failures == {}
    return grid.last


class WatchedGrid(InProcessGrid):
    """Calls `change` on the last site's evaluate reply, and keeps it as `last`."""

    def __init__(self, site_files, change=lambda reply: reply):
        super().__init__(load_client_app(), [{"site": str(file)} for file in site_files])
        self.change = change

    def deliver(self, message):
        reply = super().deliver(message)
        last = message.metadata.dst_node_id == max(self.get_node_ids())
        if last and message.metadata.message_type == "evaluate":
            reply = self.change(reply)
            self.last = reply and reply.content
        return reply


def metric(name, value):
    return lambda content: content["metrics"].update({name: value})


def rows(name, values):
    return lambda content: content["histograms"].update({name: Array(np.asarray(values))})


def without(name):
    return lambda content: content["metrics"].pop(name)


def record(content):
    content["patients"] = ConfigRecord({"name": "Jane Roe"})


def note(content):
    content["notes"]["patient/us"] = "Jane Roe"


def garbage(content):
    damaged = Array("int64", (1, 2), "numpy.ndarray", b"no")
    content["histograms"]["histogram/cxr/1/positives"] = damaged


FAULTS = {
    "name": (metric("patients/cxr", 3), "metric 'patients/cxr' is not on the list"),
    "modality": (metric("num_test/mri", 3), "metric 'num_test/mri' is not on the list"),
    "nan": (metric("probe_auroc/cxr", float("nan")), "expected a number from 0 to 1"),
    "count": (metric("num_test/cxr", 0), "expected a whole number of images"),
    "missing": (without("knn_auroc/cxr"), "'knn_auroc/cxr' is missing"),
    "record": (record, "does not hold exactly the records"),
    "note": (note, "note 'patient/us' is not on the list"),
    "class": (rows("histogram/cxr/7/positives", [[100, 8]]), "was not asked for"),
    "side": (rows("histogram/cxr/1/others", [[100, 8]]), "was not asked for"),
    "sum": (rows("histogram/cxr/1/positives", [[100, 1]]), "not the modality's test images"),
    "half": (rows("histogram/cxr/0/positives", [[100, 8]]), "lacks positives or negatives"),
    "ends": (rows("histogram/cxr/1/positives", [[9, 1]]), "do not rise to 100"),
    "bytes": (garbage, "array 'histogram/cxr/1/positives'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_answer_that_is_not_as_declared_is_rejected(case, question, answer):
    fault, words = FAULTS[case]
    content = RecordDict({name: type(part)(dict(part)) for name, part in answer.items()})
    assert read_reply(content, question[0]).metrics
    fault(content)
    with pytest.raises(Rejected, match=words):
        read_reply(content, question[0])


def silence(reply):
    return None


def nonsense(reply):
    record(reply.content)
    return reply


@pytest.mark.parametrize(
    ("change", "words"),
    [(silence, "no reply before the deadline"), (nonsense, "reply rejected: it does not hold")],
)
def test_a_bad_site_is_named_with_the_reason_and_the_others_count(
    change, words, question, make_sites
):
    files = make_sites({"good": ["cxr"], "odd": ["cxr"]}, patients=28, policy=OPEN)
    answers, failures = ask_sites(WatchedGrid(files, change), *question, places={})
    assert set(answers) == {"good"}
    assert set(failures) == {"odd"}
    assert words in failures["odd"]
    assert combine(answers, question[0].probe_classes)["modalities"]["cxr"]["sites"] == 1


def test_the_asking_side_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; import server.evaluation"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
