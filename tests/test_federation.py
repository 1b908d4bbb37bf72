"""What must hold of a whole federation: real apps, real strategy, real training."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.chain import read
from core.checkpoint import sha256_file
from core.errors import UserError
from core.initial import initial_state
from core.site_round import site_round
from core.sites import open_site
from server.engines import ENGINES, EngineName, run_in_process
from server.history import open_run, read_history
from server.simulate import simulate

ROOT = Path(__file__).parents[1]


def federate(run_dir, recipe, site_files, engine=EngineName.INPROCESS):
    """Run a study; returns the digest of its last checkpoint."""
    run = open_run(run_dir, recipe)
    ENGINES[engine](run_dir, site_files)
    assert len(read_history(run_dir)) == recipe.federation.rounds
    return sha256_file(run.checkpoint_path(recipe.federation.rounds))


def test_one_site_in_a_federation_equals_central_training_bit_for_bit(
    tmp_path, make_recipe, make_sites
):
    (file,) = make_sites({"alone": ["ct", "us"]})
    recipe = make_recipe(min_sites=1, rounds=3, local_steps=2)
    federate(tmp_path / "run", recipe, [file])
    run = open_run(tmp_path / "run", recipe)
    federated = run.load(lambda: None).state

    central = make_recipe(min_sites=1, rounds=1, local_steps=6)
    update, _ = site_round(
        central,
        initial_state(central),
        open_site(file.parent / "data"),
        {},
        site="alone",
        first_step=0,
        device="cpu",
    )
    for group, expected in (
        (federated.student, update.student),
        (federated.teacher, update.teacher),
    ):
        assert set(group) == set(expected)
        for name, array in group.items():
            assert array.tobytes() == expected[name].tobytes(), name


def test_the_order_of_the_sites_changes_no_bit(tmp_path, recipe, make_sites):
    sites = {"a": ["ct"], "b": ["us", "ct"], "c": ["oct"]}
    one = federate(tmp_path / "one", recipe, make_sites(sites))
    files = [tmp_path / "sites" / name / "site.toml" for name in ("c", "a", "b")]
    for file in files:
        (file.parent / "state").rename(file.parent / "state-of-the-first-run")
    assert federate(tmp_path / "other", recipe, files) == one


def test_a_checkpoint_holds_prototypes_of_every_modality(tmp_path, recipe, make_sites):
    files = make_sites({"a": ["ct"], "b": ["ct", "us"]})
    federate(tmp_path / "run", recipe, files)
    state = open_run(tmp_path / "run", recipe).load(lambda: None).state
    assert list(state.prototypes.counts) == ["ct", "us"]
    assert 1 <= len(state.prototypes.centroids["ct"]) <= 3


@pytest.fixture
def two_sites(make_sites):
    """Both hold CT; the directory name is the site's."""
    return make_sites({"a": ["ct"], "b": ["us", "ct"]})


def test_real_processes_give_the_bits_of_the_in_process_engine(tmp_path, recipe, two_sites):
    one = federate(tmp_path / "inprocess", recipe, two_sites)
    other = federate(tmp_path / "processes", recipe, two_sites, EngineName.PROCESSES)
    assert other == one
    text = str(tmp_path)
    assert not [line for line in _processes() if text in line], "a process was left behind"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_gives_the_bits_of_the_in_process_engine(tmp_path, recipe, two_sites):
    one = federate(tmp_path / "inprocess", recipe, two_sites)
    assert federate(tmp_path / "ray", recipe, two_sites, EngineName.RAY) == one


def test_without_ray_its_engine_says_what_to_install(tmp_path, two_sites, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install fedmermed\[ray\], or use another --engine"):
        ENGINES[EngineName.RAY](tmp_path, two_sites)


def test_a_site_that_cannot_join_ends_real_processes_with_its_reason(tmp_path, recipe, two_sites):
    two_sites[0].write_text("not a site file")
    open_run(tmp_path / "run", recipe)
    with pytest.raises(UserError, match=r"^'site a': error: site file '.*site.toml'.* is not"):
        ENGINES[EngineName.PROCESSES](tmp_path / "run", two_sites)
    assert not [line for line in _processes() if str(tmp_path) in line]


def test_a_failing_study_fails_in_real_processes_too(tmp_path, make_recipe, make_sites):
    (site,) = make_sites({"a": ["ct"]})
    open_run(tmp_path / "run", make_recipe(wait_for_sites_seconds=1.0, min_sites=2))
    with pytest.raises(UserError, match=r"round 1: [01] site\(s\) connected after .* s, 2 needed;"):
        ENGINES[EngineName.PROCESSES](tmp_path / "run", [site])
    assert not [line for line in _processes() if str(tmp_path) in line]


def _processes():
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return lines


RECIPE = """
name = "kill"
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
[optim]
batch_size = 8
precision = "fp32"
[federation]
rounds = 4
local_steps = 12
prototypes_per_modality = 3
prototype_min_patients = 2
"""


def start_simulation(recipe_file, data, out):
    command = [sys.executable, "-m", "server", "simulate", str(recipe_file)]
    command += ["--data", str(data), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_killed_at_random_and_after_rounds_a_simulation_ends_with_the_same_hash(
    tmp_path, make_sites
):
    files = make_sites({"a": ["ct"], "b": ["ct"]})
    data = tmp_path / "data"
    data.mkdir()
    for file in files:
        (file.parent / "data" / "ct").rename(data / file.parent.name)
    recipe_file = tmp_path / "kill.toml"
    recipe_file.write_text(RECIPE)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    simulate(recipe_file, data=data, out=whole)

    chance = random.Random(11)
    kills = 0
    for rounds_before_death in (1, None, 2):  # None: some time after a site was given work
        process = start_simulation(recipe_file, data, out)
        before = _messages(out)
        while process.poll() is None:
            time.sleep(0.002)
            if rounds_before_death is None:
                reached = _messages(out) > before
            else:
                reached = len(read_history(out)) >= rounds_before_death
            if reached:
                time.sleep(chance.uniform(0, 0.1) if rounds_before_death is None else 0)
                process.send_signal(signal.SIGKILL)
                process.wait()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert len(read_history(out)) < 4
    simulate(recipe_file, data=data, out=out)
    assert len(read_history(out)) == 4
    for name in ("round-0004.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (out / name).read_bytes()
    chains = [read(state) for state in out.glob("sites/*/state")]
    assert [chain.problem for chain in chains] == ["", ""]


def _messages(out):
    """How many messages the sites have audited: grows in the middle of a round."""
    logs = out.glob("sites/*/state/audit.jsonl")
    return sum(len(log.read_text().splitlines()) for log in logs)


def test_two_simulations_do_not_share_a_run_directory(tmp_path, recipe, two_sites):
    run = open_run(tmp_path / "run", recipe)
    with run.locked(), pytest.raises(UserError, match="another process is working on run dir"):
        run_in_process(tmp_path / "run", two_sites)
