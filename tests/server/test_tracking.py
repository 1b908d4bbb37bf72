"""A study in MLflow's own records."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from core.errors import UserError
from server.tracking import track

pytest.importorskip("mlflow")


@pytest.fixture
def uri(tmp_path, monkeypatch):
    """A database, with artifacts beside it."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def seen(uri):
    """MLflow's only run, and the history of its metrics."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("studies").experiment_id])
    metrics = {n: client.get_metric_history(run.info.run_id, n) for n in run.data.metrics}
    files = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id)}
    return run, metrics, files


def test_a_study_is_sent_once_however_often_and_ends_with_its_model(make_study, uri):
    run = make_study({"st-mary": ("ct",), "city": ("us",)}, rounds=4)
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run / "history.jsonl").write_bytes(b"".join(lines[:2]))
    first = track(run, uri, "studies")
    assert track(run, uri, "studies") == first
    found, metrics, files = seen(uri)
    study = json.loads((run / "study.json").read_text())["study"]
    assert found.info.run_name == "tiny"
    assert found.info.status == "RUNNING"
    assert found.data.tags["fedmermed.study"] == study
    assert found.data.params["federation.rounds"] == "4"
    assert [(m.step, m.value) for m in metrics["loss/ct"]] == [(1, 3.99), (2, 3.98)]
    assert [m.step for m in metrics["knn_auroc/ct"]] == [0]  # of the model before training
    assert files == {}

    (run / "history.jsonl").write_bytes(b"".join(lines))
    (run / "model.safetensors").write_bytes(b"model")
    assert track(run, uri, "studies") == first
    found, metrics, files = seen(uri)
    assert found.info.status == "FINISHED"
    assert [m.step for m in metrics["site_update_norm/city"]] == [1, 2, 3, 4]
    assert metrics["loss/ct"][3].timestamp - metrics["loss/ct"][0].timestamp == 3 * 47_000
    assert files == {"model.safetensors": 5}
    for history in metrics.values():
        assert max(Counter(m.step for m in history).values()) == 1


def test_a_kill_before_the_note_of_what_was_sent_doubles_nothing(make_study, uri):
    from mlflow import MlflowClient

    run = make_study({"st-mary": ("ct",)}, rounds=2, planned=3)
    found = track(run, uri, "studies")
    MlflowClient(tracking_uri=uri).set_tag(found, "fedmermed.rounds", "0")
    track(run, uri, "studies")
    _, metrics, _ = seen(uri)
    assert [m.step for m in metrics["loss/ct"]] == [1, 2]


def test_what_is_no_study_or_no_place_is_refused(make_study, tmp_path, uri):
    with pytest.raises(UserError, match="is not a run directory"):
        track(tmp_path, uri, "studies")
    with pytest.raises(UserError, match="MLflow at 'nowhere://x' refused"):
        track(make_study({"st-mary": ("ct",)}), "nowhere://x", "studies")


def test_without_mlflow_the_command_says_what_to_install(make_study, monkeypatch, uri):
    run = make_study({"st-mary": ("ct",)})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'fedmermed\[mlflow\]'"):
        track(run, uri, "studies")


def test_mlflows_telemetry_is_off_before_it_is_imported(make_study, tmp_path):
    run = make_study({"st-mary": ("ct",)})
    program = (
        "import sys; from pathlib import Path; from server.tracking import track\n"
        f"track(Path({str(run)!r}), 'sqlite:///{tmp_path / 'own.db'}', 'studies')\n"
        "from mlflow.telemetry.client import get_telemetry_client\n"
        "print(get_telemetry_client())"
    )
    cleared = {n: v for n, v in os.environ.items() if "TELEMETRY" not in n and "TRACK" not in n}
    cleared.pop("PYTEST_CURRENT_TEST", None)  # where MLflow sends nothing of itself
    cleared.pop("CI", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=cleared, cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "None"
    shutil.rmtree(tmp_path / "mlruns", ignore_errors=True)
