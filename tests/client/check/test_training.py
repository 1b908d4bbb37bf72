import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.check import training
from client.check.training import Measured, measure, step
from core.checkpoint import load_arrays
from core.config import recipe_from_json
from core.step_memory import step_memory

ROOT = Path(__file__).parents[3]


def of_model(recipe, **model):
    table = json.loads(recipe.to_json())
    table["model"] |= model
    return recipe_from_json(json.dumps(table), "test")


@pytest.fixture
def site_file(make_sites):
    return make_sites({"st-mary": ["ct", "us"]})[0]


def test_a_step_is_measured_as_a_round_goes(site_file, recipe, tmp_path, monkeypatch):
    """Sizes against the files of a real round at the same site; from any directory."""
    from client.rounds import Request, answer
    from client.site import load_site
    from core.initial import initial_state

    site = load_site(site_file)
    arrays = initial_state(recipe).to_arrays()
    update, _ = answer(site, Request("ab" * 16, 1, 0, recipe, arrays))
    private, _ = load_arrays(
        site.state_path / "studies" / ("ab" * 16) / "round-0001" / "private.safetensors"
    )
    monkeypatch.chdir(tmp_path)
    measured = measure(site_file, recipe)
    assert (measured.error, measured.device) == ("", "cpu")
    assert measured.private_bytes == sum(array.nbytes for array in private.values())
    weights = (*update.student.values(), *update.teacher.values())
    assert measured.reply_bytes == sum(array.nbytes for array in weights)
    assert measured.message_bytes == sum(array.nbytes for array in arrays.values())
    assert 0 < measured.step_seconds < 20
    assert 0 < measured.other_seconds < 20
    assert 100_000_000 < measured.peak_bytes < 4_000_000_000
    assert "on the CPU" in step(measured).found


def test_what_a_step_takes_is_foretold_for_each_device_with_what_would_make_it_less(
    site_file, recipe
):
    site_file.write_text(site_file.read_text().replace("threads = 1", "threads = 1\ndevices = 2"))
    measured = measure(site_file, recipe)
    assert (measured.error, measured.devices) == ("", 2)
    assert (
        measured.foretold_bytes
        == step_memory(recipe, half=False, fused_attention=False, devices=2).total
    )
    assert [change for change, _ in measured.savings] == [
        "model.checkpointing = true", "optim.accumulate = 2", "optim.accumulate = 4",
    ]  # fmt: skip
    assert measured.savings[2][1] < measured.savings[1][1] < measured.foretold_bytes
    assert measured.free_bytes > measured.foretold_bytes


def test_running_out_of_memory_is_a_red_line(site_file, recipe):
    """A head of 4 TB."""
    measured = measure(site_file, of_model(recipe, head_hidden=1_000_000))
    assert measured.out_of_memory == "memory"
    assert step(measured).found == "out of memory on this machine: an allocation failed"


def test_a_step_leaves_memory_to_others():
    code = """
import torch
from client.check.step import _limit_memory, _out_of_memory
_limit_memory(3_000_000_000)
torch.ones(10**8)
try:
    torch.ones(10**9)  # 4 GB
except RuntimeError as error:
    assert _out_of_memory(error) == "memory"
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_a_process_killed_for_memory_is_a_red_line(site_file, recipe, monkeypatch):
    died = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.run
    monkeypatch.setattr(
        training.subprocess, "run", lambda command, **kw: run([sys.executable, "-c", died], **kw)
    )
    measured = measure(site_file, recipe)
    assert step(measured).found == "out of memory on this machine: killed by the system"


def test_a_process_that_does_not_end_is_ended(site_file, recipe, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(training, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(
        training.subprocess, "run", lambda command, **kw: run(["sleep", "60"], **kw)
    )
    assert measure(site_file, recipe).error == "no end after 0.3 s"


def test_what_a_recipe_asks_in_vain_is_told_with_its_remedy(site_file, recipe):
    finding = step(measure(site_file, of_model(recipe, backbone="nope")))
    assert "cannot be built: Unknown model (nope)" in finding.found
    assert finding.remedy.startswith("Give a vision transformer that timm.list_models() lists")


def test_a_gpu_that_is_not_there_is_told(site_file):
    site_file.write_text(site_file.read_text().replace("'cpu'", "'cuda:63'"))
    measured = measure(site_file, None)
    assert measured.device == ""
    assert "device 'cuda:63' was asked for" in measured.error
    assert measured.remedy.endswith("or give 'auto' or 'cpu'.")


def test_a_missing_torch_is_told(site_file, recipe, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert measure(site_file, recipe) == Measured(
        error="torch and timm not installed", remedy="Type: pip install 'fedmermed[site]'"
    )
