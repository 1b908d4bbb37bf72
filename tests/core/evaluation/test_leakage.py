import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.evaluation.leakage import Finding, find_leaks, refuse_leaks
from core.phantoms import make_phantoms
from core.shards import Shard, open_shard, write_shard
from core.sites import open_sites


@functools.cache  # drawing takes most of the time; nothing below alters a shard
def shard(modality: str = "cxr", seed: int = 0) -> Shard:
    drawn = make_phantoms(modality, patients=20, images_per_patient=2, px=64, seed=seed)
    return dataclasses.replace(drawn, name=f"{modality}{seed}")


def rows(part: Shard, split: str) -> list[int]:
    return [int(row) for row in np.flatnonzero(part.split == split)]


def with_image(part: Shard, row: int, image: np.ndarray) -> Shard:
    images = part.images.copy()
    images[row] = image
    return dataclasses.replace(part, images=images)


def test_a_patient_in_two_splits_is_found() -> None:
    clean = shard()
    train, test = rows(clean, "train"), rows(clean, "test")
    patient = clean.patient.copy()
    patient[test[0]] = patient[train[0]]
    found = find_leaks([dataclasses.replace(clean, patient=patient)])
    number = patient[train[0]]
    assert found == [
        Finding("cxr0", "patient", ("train", "test"), 1, (f"patient number {number}",))
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_identical_image_is_found_with_its_rows(split: str) -> None:
    clean = shard()
    source, test = rows(clean, split)[3], rows(clean, "test")[1]
    found = find_leaks([with_image(clean, test, clean.images[source])])
    assert found == [
        Finding(
            "cxr0",
            "identical image",
            (split, "test"),
            1,
            (f"{split} image {source} = test image {test}",),
        )
    ]


def test_an_image_copied_inside_one_split_or_between_train_and_val_is_no_leak() -> None:
    clean = shard()
    train, val = rows(clean, "train"), rows(clean, "val")
    copied = with_image(clean, train[1], clean.images[train[0]])
    assert find_leaks([with_image(copied, val[0], clean.images[train[0]])]) == []


def test_an_identical_image_is_found_in_another_shard_even_of_another_modality() -> None:
    one, other = shard("cxr", 1), shard("ct", 2)
    source, test = rows(one, "train")[0], rows(other, "test")[0]
    (finding,) = find_leaks([one, with_image(other, test, one.images[source])])
    assert (finding.shard, finding.splits) == ("cxr1 + ct2", ("train", "test"))
    assert finding.examples == (f"train image {source} = test image {test}",)


def test_the_same_patient_number_in_two_shards_is_another_patient() -> None:
    one, other = shard("cxr", 1), shard("cxr", 2)
    assert set(one.patient) & set(other.patient)
    assert find_leaks([one, other]) == []


@pytest.mark.parametrize("change", ["brighter", "noisier", "coarser"])
@pytest.mark.parametrize("modality", ["cxr", "us", "cfp"])
def test_an_altered_copy_is_found_as_near_identical(modality: str, change: str) -> None:
    clean = shard(modality)
    source, test = rows(clean, "train")[2], rows(clean, "test")[0]
    image = clean.images[source].astype(np.float64)
    if change == "brighter":
        image = image * 1.1 + 8
    elif change == "noisier":
        image += np.random.default_rng(0).normal(0, 3, image.shape)
    else:
        image = (image // 8) * 8
    altered = image.clip(0, 255).astype(np.uint8)
    found = find_leaks([with_image(clean, test, altered)])
    named = [finding for finding in found if f"{source} ~ test image {test}" in finding.examples[0]]
    assert [(f.kind, f.splits) for f in named] == [("near-identical image", ("train", "test"))]


def test_images_of_one_brightness_resemble_nothing_unless_they_are_identical() -> None:
    clean = shard()
    train, test = rows(clean, "train")[0], rows(clean, "test")[0]
    blank = with_image(clean, train, np.full_like(clean.images[0], 25))
    assert find_leaks([with_image(blank, test, np.full_like(clean.images[0], 26))]) == []
    (finding,) = find_leaks([with_image(blank, test, np.full_like(clean.images[0], 25))])
    assert finding.kind == "identical image"


def test_many_copies_are_counted_by_test_image_with_five_examples() -> None:
    clean = shard()
    test = rows(clean, "test")
    images = clean.images.copy()
    images[test] = images[rows(clean, "train")[0]]
    images[rows(clean, "train")] = images[test[0]]
    (finding,) = find_leaks([dataclasses.replace(clean, images=images)])
    assert (finding.count, len(finding.examples)) == (len(test), 5)


def test_identical_images_and_patients_are_refused_unless_only_reported() -> None:
    near = Finding("a", "near-identical image", ("train", "test"), 1, ("train image 1 ~ ...",))
    refuse_leaks([near])
    for kind in ("identical image", "patient"):
        leak = Finding("a + b", kind, ("val", "test"), 3, ("the first", "the second"))
        message = rf"'a \+ b': 3 {kind}\(s\) of 'test' are also in 'val' \(the first\)"
        with pytest.raises(UserError, match=message):
            refuse_leaks([near, leak])
        refuse_leaks([near, leak], report_only=True)


def test_shards_on_disk_of_different_sizes_and_channels_are_compared(tmp_path: Path) -> None:
    large = shard("dermatology", 1)
    small = make_phantoms("dermatology", patients=30, images_per_patient=1, px=32, seed=2)
    source, test = rows(large, "train")[0], rows(small, "test")[0]
    shrunk = large.images[source].reshape(32, 2, 32, 2, 3).mean((1, 3)).astype(np.uint8)
    write_shard(tmp_path / "one", large)
    write_shard(tmp_path / "two", with_image(small, test, shrunk))
    found = find_leaks([open_shard(tmp_path / "one"), open_shard(tmp_path / "two")])
    examples = [finding.examples for finding in found if "+" in finding.shard]
    assert (f"train image {source} ~ test image {test}",) in examples


IMAGES64 = Path(__file__).parents[3].parent / "shared/data/images64"


@pytest.mark.skipif(not IMAGES64.is_dir(), reason="real images are not here")
def test_distinct_real_images_are_rarely_flagged() -> None:
    sites = open_sites(IMAGES64)
    shards = [part for parts in sites.values() for part in parts if "ct" not in part.classes]
    flagged = {
        part.name: sum(finding.count for finding in find_leaks([part])) / max(1, tests)
        for part in shards
        if (tests := int((part.split == "test").sum()))
    }
    assert max(share for name, share in flagged.items() if not name.startswith("us")) < 0.01
    assert max(flagged.values()) < 0.1  # breast ultrasound holds true near-copies
