"""The study's loop over rounds and sites against the product's own command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import load_arrays
from core.config import load_recipe
from core.phantoms import make_phantoms
from core.shards import write_shard
from core.sites import open_sites
from core.wire import GlobalState

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "tiny"
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
description_weight = 0.3
[optim]
batch_size = 8
[federation]
rounds = 3
local_steps = 2
prototypes_per_modality = 3
prototype_min_patients = 2
[evaluation]
every_rounds = 2
"""


@pytest.fixture
def data(tmp_path):
    """Three sites, of which two share a modality, so that prototypes are merged."""
    sites = {"a": ("oct", "us"), "b": ("oct",), "c": ("us", "cfp")}
    for number, (site, modalities) in enumerate(sites.items()):
        for modality in modalities:
            shard = make_phantoms(
                modality, patients=14, images_per_patient=2, px=32, seed=10 * number
            )
            write_shard(tmp_path / "data" / site / modality, shard)
    return tmp_path / "data"


def test_it_ends_with_the_weights_and_prototypes_of_simulate_bit_for_bit(bench, tmp_path, data):
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE)
    cpu = str(min(os.sched_getaffinity(0)))  # one processor, one thread: equal bits
    subprocess.run(
        ["taskset", "-c", cpu, sys.executable, "-m", "server", "simulate", str(file),
         "--data", str(data), "--out", str(tmp_path / "run")],
        check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    arrays, _ = load_arrays(tmp_path / "run" / "round-0003.safetensors")
    expected = GlobalState.from_arrays(arrays).to_arrays()
    sites = open_sites(data)
    federation = bench.federation_loop.federate(
        load_recipe(file), sites, lambda number: list(sites), lambda number: bench.our_arms.ours()
    )
    found = federation.state.to_arrays()
    assert found.keys() == expected.keys()
    assert any(name.startswith("prototypes/") for name in found)
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []


def test_a_site_that_does_not_answer_changes_nothing_and_goes_on_later(
    bench, study_recipe, hospitals
):
    recipe = bench.federation_loop.changed(study_recipe, federation={"rounds": 3})
    asked = {1: ["cxr", "us"], 2: ["cxr"], 3: ["cxr", "us"]}
    seen = []
    federation = bench.federation_loop.federate(
        recipe, hospitals, asked.get, lambda number: bench.our_arms.ours(),
        lambda number, state: seen.append(number),
    )  # fmt: skip
    assert [sorted(line["sites"]) for line in federation.lines] == list(asked.values())
    assert federation.steps == 5 * 2
    assert seen == [1, 2, 3]
    moments = [n for n in federation.private["us"] if n.endswith("step/head.layers.0.bias")]
    assert float(federation.private["us"][moments[0]]) == 4  # two rounds of two steps


def test_an_update_that_is_not_finite_is_rejected_and_the_others_go_on(
    bench, study_recipe, hospitals
):
    def at_site(recipe, received, shards, private, **options):
        update, private = bench.federation_loop.site_round(
            recipe, received, shards, private, **options
        )
        if options["site"] == "us":
            next(iter(update.student.values()))[...] = np.nan
        return update, private

    arm = bench.federation_loop.Arm(site_round=at_site)
    federation = bench.federation_loop.federate(
        study_recipe, hospitals, lambda number: ["cxr", "us"], lambda number: arm
    )
    outcomes = federation.lines[-1]["sites"]
    assert outcomes["cxr"]["outcome"] == "admitted"
    assert "site 'us', round 2" in outcomes["us"]["reason"]
    assert all(np.isfinite(a).all() for a in federation.state.student.values())
