"""A federation with record privacy, on real images, killed in the middle and gone on with."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.chain import read
from core.checkpoint import read_json
from core.config import load_recipe
from core.privacy.accounting import epsilon, study_events
from core.privacy.ledger import Ledger
from server.history import read_history
from server.overview_reader import OverviewReader
from server.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name = "private"
seed = 5
[model]
options = { embed_dim = 32, depth = 1, num_heads = 2, patch_size = 8 }
head_hidden = 32
embedding_dim = 16
[views]
global_px = 32
local_px = 16
local_views = 1
[memory]
entries_per_modality = 32
[loss]
koleo_weight = 0.0
[evaluation]
every_rounds = 0
[federation]
rounds = 3
local_steps = 4
prototypes_per_modality = 4
[privacy]
mode = "record"
noise_multiplier = 1.0
sampling_rate = 0.02
expected_patients = 10
prototype_releases = 1
prototype_noise = 4.0
"""
SETS = ("cxr_nih_pneumonia_64", "us_busi_64", "oct_noor_64")


@pytest.fixture
def study(tmp_path, real_data):
    """The recipe's file and three hospitals' data."""
    data = tmp_path / "data"
    data.mkdir()
    for name in SETS:
        shutil.copy(real_data / "images64" / f"{name}.npz", data)
    file = tmp_path / "private.toml"
    file.write_text(RECIPE)
    return file, data


def killed_in_round(number, file, data, out):
    """Start `simulate` and kill it once some site has been charged for this round."""
    command = [sys.executable, "-m", "server", "simulate", str(file), "--data", str(data)]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not any(
        f'"round": {number}' in ledger.read_text()
        for ledger in out.glob("sites/*/state/ledger.jsonl")
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(read_history(out)) < load_recipe(file).federation.rounds


def test_three_hospitals_train_privately_are_killed_and_end_with_the_stated_epsilon(
    study, tmp_path
):
    file, data = study
    out, recipe = tmp_path / "run", load_recipe(file)
    for number in (1, 2):
        killed_in_round(number, file, data, out)
    simulate(file, data=data, out=out)

    lines = read_history(out)
    due = epsilon(study_events(recipe), recipe.privacy.delta)
    assert [sorted(line["sites"]) for line in lines] == [["cxr", "oct", "us"]] * 3
    outcomes = [outcome for line in lines for outcome in line["sites"].values()]
    assert {outcome["outcome"] for outcome in outcomes} == {"admitted"}
    assert all(set(outcome["metrics"]) == {"epsilon"} for outcome in outcomes)
    for site in ("cxr", "oct", "us"):
        state = out / "sites" / site / "state"
        assert Ledger(state / "ledger.jsonl").epsilon(recipe.privacy.delta) == due
        assert lines[-1]["sites"][site]["metrics"]["epsilon"] == pytest.approx(due)
        assert read(state).problem == ""
    told = read_json(out / "summary.json")["privacy"]
    assert told["mode"] == "record"
    assert told["epsilon"] == pytest.approx(dict.fromkeys(("cxr", "oct", "us"), due))
    view = OverviewReader(out).read().privacy
    # another process may have summed with other threads, which moves the last bit of a double
    assert (view.mode, view.spent, view.planned) == ("record", *[pytest.approx(due)] * 2)
