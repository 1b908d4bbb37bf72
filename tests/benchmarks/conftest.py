"""The study's modules, and three phantom hospitals of a modality each."""

import json
from types import SimpleNamespace

import pytest
import torch

from core.config import load_recipe, recipe_from_json
from core.phantoms import make_phantoms
from core.shards import write_shard

IN_ORDER = (
    *("federation_loop", "our_arms", "competitor_step", "competitor_dino", "competitor_mae"),
    *("competitor_fedema", "competitors", "real_images", "scenario_sites", "scenario_measure"),
    *(
        "scenario_compare",
        "scenario_cells",
        "scenario_leaving",
        "scenario_fold_tables",
        "scenario_tables",
        "scenario_jobs",
        "scenario_run",
        "scenario_plot",
    ),
    *("scenarios", "scenario_folds"),
)
"""Each imports only what stands before it."""
TABLE = {
    "model": {
        "options": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4},
        "head_hidden": 32,
        "embedding_dim": 16,
    },
    "views": {"global_px": 32, "local_px": 16, "local_views": 1},
    "memory": {"entries_per_modality": 32, "centred": True},
    "loss": {"koleo_weight": 0.02, "description_weight": 0.3},
    "optim": {"batch_size": 8, "learning_rate": 0.1, "precision": "fp32", "warmup": 0.0},
    "federation": {
        "rounds": 2, "local_steps": 2, "min_sites": 1, "prototypes_per_modality": 3,
        "prototype_min_patients": 2,
    },
    "evaluation": {"every_rounds": 0},
}  # fmt: skip


@pytest.fixture(scope="session")
def bench(load_benchmark):
    """All modules by name."""
    torch.set_num_threads(1)
    return SimpleNamespace(**{name: load_benchmark(name) for name in IN_ORDER})


@pytest.fixture
def study_recipe():
    """Two rounds of two steps that describe the views."""
    return recipe_from_json(json.dumps(TABLE), "test")


@pytest.fixture(scope="session")
def hospitals():
    """Modality -> its shards."""
    return {
        modality: [make_phantoms(modality, patients=72, images_per_patient=2, px=32, seed=1)]
        for modality in ("cxr", "us", "dermatology")
    }


@pytest.fixture
def study(bench, study_recipe, hospitals, tmp_path, monkeypatch):
    """A study of phantoms whose start is random, without a process a job."""
    for modality, shards in hospitals.items():
        for shard in shards:
            write_shard(tmp_path / "data" / modality / shard.name, shard)
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(
        bench.real_images.toml_text(study_recipe.model_dump(mode="json", exclude_none=True))
    )
    assert load_recipe(recipe_file) == study_recipe
    monkeypatch.setattr(bench.real_images, "RECIPE", recipe_file)
    monkeypatch.setattr(bench.scenario_tables, "RESULTS", tmp_path / "scenarios.json")
    return bench.scenario_jobs.Study(tmp_path / "data", tmp_path)
