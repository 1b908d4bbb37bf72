"""Prototypes of a site's patients."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from core.config import Recipe
from core.initial import initial_state
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.privacy.noise import PrivateRandom
from core.privacy.prototypes import unit_statistics
from core.privacy.release import embed_patients, released_prototypes, starting_rows
from core.privacy.sampling import Patients
from core.shards import Shard
from core.step import TrainState
from core.train import load_network, new_state
from core.wire import Prototypes

NOTHING = Prototypes({}, {})


class Fixed(PrivateRandom):
    """The same draws for every image: what one patient changes is then seen."""

    def uniform(self, count: int):
        return np.full(count, 0.4)


def recipe(**privacy: object) -> Recipe:
    table = {
        "model": {
            "options": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "head_hidden": 32,
            "embedding_dim": 16,
        },
        "images": {"px": 16},
        "views": {"global_px": 16, "local_px": 8, "local_views": 1},
        "memory": {"entries_per_modality": 32},
        "loss": {"koleo_weight": 0.0},
        "federation": {"prototypes_per_modality": 4, "prototype_min_patients": 2},
        "evaluation": {"every_rounds": 0},
        "privacy": {"mode": "record", "prototype_noise": 0.05, **privacy},
    }
    return Recipe.model_validate_json(json.dumps(table))


@functools.cache
def shard(modality: str, patients: int = 15) -> Shard:
    drawn = make_phantoms(modality, patients=patients, images_per_patient=3, px=16, seed=1)
    keys = [f"p{number:02}".encode() for number in range(patients)]
    return dataclasses.replace(drawn, keys=np.array(keys))


def started(config: Recipe) -> TrainState:
    torch.set_num_threads(1)
    state = new_state(config, torch.device("cpu"), "st-mary")
    load_network(state.teacher, initial_state(config).teacher)
    return state


def test_a_patient_of_two_modalities_is_one_unit_with_at_most_the_recipes_images() -> None:
    config = recipe(images_per_patient=4)
    patients = Patients([shard("us"), shard("pathology")])
    embeddings, units = embed_patients(config, started(config), patients, PrivateRandom())
    assert embeddings.keys() == units.keys() == {"us", "pathology"}
    owners = np.concatenate(list(units.values()))
    found, images = np.unique(owners, return_counts=True)
    assert len(found) == len(patients)
    assert set(images) == {4}
    assert {len(rows) for rows in embeddings.values()} != {0}
    for name, rows in embeddings.items():
        assert rows.shape == (len(units[name]), 16)
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)


def test_removing_a_patient_moves_sums_and_counts_by_at_most_one() -> None:
    config = recipe()
    state, shards = started(config), [shard("us", 9), shard("pathology", 9)]
    rows = {name: starting_rows(config, state, name, NOTHING) for name in ("us", "pathology")}

    def statistics(removed: int) -> tuple[np.ndarray, np.ndarray]:
        kept = [
            dataclasses.replace(s, split=np.where(s.patient == removed, "test", s.split))
            for s in shards
        ]
        found = embed_patients(config, state, Patients(kept), Fixed())
        sums, counts = unit_statistics(*found, rows)
        return np.concatenate(list(sums.values())), np.concatenate(list(counts.values()))

    whole = statistics(-1)
    held = {int(p) for s in shards for p in s.patient[s.split == "train"]}
    for removed in held:
        moved = [
            float(np.linalg.norm(a - b)) for a, b in zip(whole, statistics(removed), strict=True)
        ]
        assert 0.1 < max(moved) <= 1 + 1e-5


def test_new_prototypes_start_where_the_released_ones_are_and_else_among_public_images() -> None:
    config = recipe()
    state = started(config)
    received = Prototypes({"us": np.eye(16, dtype=np.float32)[:3]}, {"us": np.ones(3)})
    rows = starting_rows(config, state, "us", received)
    assert rows.shape == (4, 16)
    assert np.array_equal(rows[:3], np.eye(16)[:3])
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    full = Prototypes({"us": np.eye(16, dtype=np.float32)[:6]}, {"us": np.ones(6)})
    assert np.array_equal(starting_rows(config, state, "us", full), np.eye(16)[:4])
    assert np.array_equal(
        starting_rows(config, state, "ct", NOTHING), starting_rows(config, state, "ct", NOTHING)
    )


def test_only_what_a_site_declares_leaves_it() -> None:
    config = recipe()
    state, patients = started(config), Patients([shard("us"), shard("pathology")])
    sent = released_prototypes(config, state, patients, ["us", "oct"], NOTHING, PrivateRandom())
    assert sent.centroids.keys() == sent.counts.keys() == {"us"}
    assert np.linalg.norm(sent.centroids["us"], axis=1) == pytest.approx(1, abs=1e-5)
    assert MODALITIES.index("pathology") in patients.modalities


def test_few_patients_under_much_noise_send_nothing() -> None:
    config = recipe(prototype_noise=10.0)
    state, patients = started(config), Patients([shard("us")])
    sent = released_prototypes(config, state, patients, ["us"], NOTHING, PrivateRandom())
    assert sent.centroids == {}
