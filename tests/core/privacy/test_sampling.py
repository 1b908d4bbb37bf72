"""Who takes part in a step."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.privacy.noise import PrivateRandom
from core.privacy.sampling import Patients, draw_patients
from core.shards import Shard


def shard(modality: str = "us", patients: int = 20, images: int = 3, keys: str = "") -> Shard:
    drawn = make_phantoms(modality, patients=patients, images_per_patient=images, px=16, seed=1)
    if not keys:
        return drawn
    names = [f"{keys}-{number}".encode() for number in range(patients)]
    return dataclasses.replace(drawn, keys=np.array(names))


def images_by_patient(patients: Patients) -> list[list[int]]:
    return [patients.images_of(number).tolist() for number in range(len(patients))]


def test_every_training_image_is_in_one_unit_and_no_other_image_in_any() -> None:
    shards = [shard(), shard("ct")]
    found = sorted(image for images in images_by_patient(Patients(shards)) for image in images)
    split = np.concatenate([s.split for s in shards])
    assert found == np.flatnonzero(split == "train").tolist()
    assert Patients(shards).modalities == [MODALITIES.index("ct"), MODALITIES.index("us")]


def test_a_patient_in_two_shards_and_modalities_is_one_unit() -> None:
    first, second = shard("ct", keys="a"), shard("us", keys="a")
    apart = shard("us", keys="b")
    together, alone = Patients([first, second]), Patients([first])
    assert len(together) == len(alone)
    assert {len(images) for images in images_by_patient(together)} == {6}
    assert len(Patients([first, apart])) == 2 * len(alone)
    modalities = {together.kind_of(image)[0] for image in together.images_of(0)}
    assert len(modalities) == 2


def test_patients_that_tables_only_number_are_kept_apart() -> None:
    mixed = shard(keys="a")
    assert mixed.keys is not None
    half = dataclasses.replace(mixed, keys=np.where(np.arange(20) % 2, mixed.keys, b""))
    alone = len(Patients([mixed]))
    assert len(Patients([shard(), shard()])) == 2 * alone
    numbered = len({int(p) for p in half.patient[half.split == "train"] if p % 2 == 0})
    assert len(Patients([half, half])) == alone + numbered


def test_an_image_is_read_from_its_shard() -> None:
    grey, colour = shard("us"), shard("dermatology")
    patients = Patients([grey, colour])
    last = images_by_patient(patients)[-1][-1]
    assert np.array_equal(patients.pixels_of(last), colour.images[last - len(grey.images)])
    assert patients.kind_of(last) == (MODALITIES.index("dermatology"), (16, 16, 3))


def test_each_patient_is_drawn_at_the_rate_and_independently() -> None:
    patients, random = Patients([shard(patients=40, images=1)]), PrivateRandom()
    first = {int(patients.images_of(number)[0]): number for number in range(len(patients))}
    taken = np.zeros((2000, len(patients)))
    for step in taken:
        step[[first[int(images[0])] for images in draw_patients(patients, 0.3, 1, random)]] = 1
    # Of about 28 counts none is far off, and the number drawn spreads as independent draws do.
    counts = taken.sum(0)
    assert stats.binomtest(int(counts.max()), 2000, 0.3).pvalue > 1e-6
    assert stats.binomtest(int(counts.min()), 2000, 0.3).pvalue > 1e-6
    assert taken.sum(1).var() == pytest.approx(len(patients) * 0.3 * 0.7, rel=0.2)
    assert abs(np.corrcoef(taken.T) - np.eye(len(patients))).max() < 0.12


def test_at_most_the_given_number_of_images_stands_for_a_patient_and_each_has_its_turn() -> None:
    patients, random = Patients([shard(patients=7, images=5)]), PrivateRandom()
    seen: dict[int, set[int]] = {}
    for _ in range(200):
        for images in draw_patients(patients, 1.0, 2, random):
            assert len(set(images.tolist())) == 2
            owner = next(n for n in range(len(patients)) if images[0] in patients.images_of(n))
            assert set(images.tolist()) <= set(patients.images_of(owner).tolist())
            seen.setdefault(owner, set()).update(images.tolist())
    assert all(len(images) == 5 for images in seen.values())
    assert {len(i) for i in draw_patients(patients, 1.0, 9, random)} == {5}


def test_a_site_without_training_images_draws_nobody() -> None:
    empty = dataclasses.replace(shard(), split=np.full(60, "test"))
    patients = Patients([empty])
    assert len(patients) == 0
    assert patients.modalities == []
    assert draw_patients(patients, 1.0, 2, PrivateRandom()) == []


def test_the_seed_of_the_process_does_not_decide_who_is_drawn() -> None:
    patients = Patients([shard(patients=60)])
    found = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002  (what must have no effect)
        found.append([i.tolist() for i in draw_patients(patients, 0.5, 1, PrivateRandom())])
    assert found[0] != found[1]
