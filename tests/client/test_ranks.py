"""A round shared by two processes, on the CPU: the ones that share it on GPUs differ in device."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from client import ranks
from client.rank import RECEIVED, REQUEST
from client.ranks import run_ranks
from client.rounds import Request, _shared, answer
from client.site import SiteConfig, load_site
from core.checkpoint import load_arrays, save_arrays, write_json
from core.config import recipe_from_json
from core.device import resolve_devices
from core.errors import UserError
from core.initial import initial_state

STUDY = "ab" * 16
ROOT = Path(__file__).parents[2]


@pytest.fixture
def shared_recipe(recipe):
    """Twelve images a step, which two ranks halve."""
    table = json.loads(recipe.to_json())
    table["optim"]["batch_size"] = 12
    return recipe_from_json(json.dumps(table), "test")


@pytest.fixture
def site_file(make_sites):
    file = make_sites({"st-mary": ["ct", "us"]})[0]
    file.write_text(file.read_text().replace("threads = 1", "threads = 1\ndevices = 2"))
    return file


def on_one(site: SiteConfig, path: Path) -> SiteConfig:
    return site.model_copy(update={"devices": 1, "state_dir": str(path)})


def rank_processes(directory: Path) -> dict[int, int]:
    """Rank -> process, of those that work for a site."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "client.rank" in words and words[-3].startswith(str(directory)):
            found[int(words[-2])] = int(entry.name)
    return found


def gone(directory: Path, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while rank_processes(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not rank_processes(directory)


def distance(a, b) -> float:
    return float(np.sqrt(sum(((a[name] - b[name]).astype(float) ** 2).sum() for name in a)))


@pytest.mark.parametrize("description_weight", [0, 1])
def test_two_ranks_train_as_one_process_with_the_whole_batch(
    site_file, shared_recipe, tmp_path, caplog, description_weight
):
    """Rounds after each other; apart by no more than a fiftieth of the way that training goes.

    AdamW's first steps are as long for a gradient of mere rounding as for any other (the keys'
    biases have such); tests/core/test_step.py holds gradients to one in 100,000.
    """
    caplog.set_level("INFO", "fedmermed.site")
    loss = shared_recipe.loss.model_copy(update={"description_weight": description_weight})
    shared_recipe = shared_recipe.model_copy(update={"loss": loss})
    site = load_site(site_file)
    alone = on_one(site, tmp_path / "alone")
    start = initial_state(shared_recipe)
    arrays = start.to_arrays()
    for number, step in ((1, 0), (2, 2)):
        request = Request(STUDY, number, step, shared_recipe, arrays)
        (shared, _), (whole, _) = answer(site, request), answer(alone, request)
        assert (shared.round_number, shared.num_examples) == (number, whole.num_examples)
        for name, value in whole.metrics.items():
            if not name.startswith("seconds"):
                assert shared.metrics[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name
        assert distance(shared.student, whole.student) < 0.02 * distance(
            whole.student, start.student
        )
        arrays = whole.to_arrays()
    said = [line for line in caplog.messages if "step 1 of 2, loss " in line]
    assert said[0] == said[1]
    assert len(said) == 4
    states = [Path(s.state_dir) / "studies" / STUDY for s in (site, alone)]
    held, expected = (sorted(p.name for p in path.iterdir()) for path in states)
    assert held == expected  # nothing of the ranks is left
    kept, kept_alone = (load_arrays(p / "round-0002" / "private.safetensors")[0] for p in states)
    assert np.array_equal(kept["memory/patients"], kept_alone["memory/patients"])
    assert np.allclose(kept["memory/embeddings"], kept_alone["memory/embeddings"], atol=1e-2)


def test_a_rank_that_is_killed_ends_the_round_in_one_line_and_the_state_is_as_before(
    site_file, shared_recipe, monkeypatch, capfd
):
    site = load_site(site_file)
    request = Request(STUDY, 1, 0, shared_recipe, initial_state(shared_recipe).to_arrays())
    hear = ranks._Rank.hear

    killed = []

    def kill_second(rank, data, on_report):
        if not killed:  # the first tells what it lost too
            killed.append(rank_processes(site.state_path)[1])
            os.kill(killed[0], signal.SIGKILL)
        hear(rank, data, on_report)

    monkeypatch.setattr(ranks._Rank, "hear", kill_second)
    with pytest.raises(UserError) as caught:
        answer(site, request)
    assert str(caught.value) == (
        "training on 2 devices failed at rank 1 of 2, on cpu: it was ended by SIGKILL; memory may "
        "have run out; mend that, or set devices = 1 in the site file to train on one"
    )
    assert not rank_processes(site.state_path)
    study = site.state_path / "studies" / STUDY
    assert sorted(p.name for p in study.iterdir()) == ["lock", "progress.json"]
    assert "Traceback" not in capfd.readouterr().err


def test_ranks_end_with_who_started_them_and_the_next_round_clears_up(site_file, shared_recipe):
    """Killed by SIGKILL while they start; what was handed over is left, for its owner alone."""
    site = load_site(site_file)
    code = """
import sys
from pathlib import Path
from client.rounds import Request, answer
from client.site import load_site
from core.config import recipe_from_json
from core.initial import initial_state
recipe = recipe_from_json(sys.argv[2], "test")
arrays = initial_state(recipe).to_arrays()
answer(load_site(Path(sys.argv[1])), Request("ab" * 16, 1, 0, recipe, arrays))
"""
    words = [sys.executable, "-c", code, str(site_file), shared_recipe.to_json()]
    with subprocess.Popen(words, cwd=ROOT) as parent:
        while len(rank_processes(site.state_path)) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    assert gone(site.state_path)
    study = site.state_path / "studies" / STUDY
    (left,) = study.glob(".ranks-*")
    assert left.stat().st_mode & 0o077 == 0
    request = Request(STUDY, 1, 0, shared_recipe, initial_state(shared_recipe).to_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "run_ranks", lambda *_: None)
        with pytest.raises(UserError, match=r"update.json' cannot be read"):
            answer(site, request)
    assert not list(study.glob(".ranks-*"))


def test_an_error_in_a_rank_is_told_with_its_reason(site_file, shared_recipe, tmp_path):
    """The first waits for a second that has no GPU."""
    save_arrays(tmp_path / RECEIVED, initial_state(shared_recipe).to_arrays())
    request = {
        "site": "st-mary", "shards": [str(p) for p in load_site(site_file).shard_paths],
        "recipe": shared_recipe.to_json(), "first_step": 0, "devices": ["cpu", "cuda:63"],
        "threads": 1, "private": "",
    }  # fmt: skip
    write_json(tmp_path / REQUEST, request)
    with pytest.raises(UserError, match=r"failed at rank 1 of 2, on cuda:63: .+; mend that, or"):
        run_ranks(tmp_path, request["devices"], lambda *_: None)
    assert not rank_processes(tmp_path)


def test_record_privacy_and_small_batches_use_fewer_devices(
    make_record_recipe, shared_recipe, caplog
):
    caplog.set_level("INFO", "fedmermed.site")
    assert _shared(make_record_recipe(), "a", ["cuda:0", "cuda:1"]) == ["cuda:0"]
    assert caplog.messages == ["site a: 1 of 2 devices train: record privacy trains on one"]
    assert len(_shared(shared_recipe, "a", ["cpu"] * 20)) == 12
    assert len(_shared(shared_recipe, "a", ["cpu"] * 12)) == 12
    assert caplog.messages[1:] == [
        "site a: 12 of 20 devices train: parts of 12 images would be empty on more"
    ]


def test_devices_are_all_that_are_seen_or_as_many_as_asked_for(monkeypatch):
    assert resolve_devices("cpu", 0) == ["cpu"]
    assert resolve_devices("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resolve_devices("auto", 0) == ["cuda:0", "cuda:1", "cuda:2"]
    assert resolve_devices("cuda", 2) == ["cuda:0", "cuda:1"]
    assert resolve_devices("auto", 1) == ["cuda"]  # as ever
    assert resolve_devices("cuda:2", 0) == ["cuda:2"]
    with pytest.raises(UserError, match=r"devices = 4 of 'auto' .* that is 3 GPU\(s\) here; lower"):
        resolve_devices("auto", 4)
