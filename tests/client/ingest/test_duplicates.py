"""Copies are found, other images are not, and the index lives in its caller's transaction."""

import io
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from client.ingest.duplicates import (
    MOST_COMPARED,
    DuplicateIndex,
    Fingerprint,
    alike,
    fingerprint,
)
from client.ingest.resize import square
from core.modalities import MODALITIES
from core.phantoms import make_phantoms

Pixels = NDArray[np.uint8]


def images(modality: str, px: int = 256, count: int = 4) -> list[Pixels]:
    """Phantoms as a file holds them, one of each patient."""
    drawn = make_phantoms(modality, patients=count, images_per_patient=1, px=px, seed=0).images
    return [image[..., 0] if image.shape[2] == 1 else image for image in drawn]


def jpeg(image: Pixels, quality: int = 75) -> Pixels:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def index_of(pictures: list[Pixels]) -> DuplicateIndex:
    index = DuplicateIndex(sqlite3.connect(":memory:"), pictures.__getitem__)
    for number, picture in enumerate(pictures):
        index.add(number, fingerprint(picture))
    return index


def verdict(index: DuplicateIndex, picture: Pixels) -> str:
    return index.find(fingerprint(picture), picture)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("px", [64, 224])
def test_copies_of_an_image_are_found(modality: str, px: int) -> None:
    originals = images(modality)
    index = index_of([square(image, px) for image in originals])
    for image in originals:
        smaller = np.asarray(Image.fromarray(image).resize((160, 160), Image.Resampling.BICUBIC))
        brighter = np.minimum(image, 253) + np.uint8(2)
        for copy in (jpeg(image), smaller, brighter):
            assert verdict(index, square(copy, px)) == "near"
        assert verdict(index, square(image, px)) == "exact"


@pytest.mark.parametrize("px", [32, 64])
def test_other_images_of_the_same_kind_are_not_found(px: int) -> None:
    pictures = [square(i, px) for m in MODALITIES for i in images(m, px=64, count=25)]
    index = index_of([])
    for number, picture in enumerate(pictures):
        assert verdict(index, picture) == ""
        index.add(number, fingerprint(picture))


def test_grey_in_three_channels_is_the_same_image_and_its_jpeg_nearly() -> None:
    grey = images("ct")[0]
    colour = np.repeat(grey[..., None], 3, axis=2)
    index = index_of([square(grey, 64)])
    assert verdict(index, square(colour, 64)) == "exact"
    assert verdict(index, square(jpeg(colour, 90), 64)) == "near"
    other_way = index_of([square(colour, 64)])
    assert verdict(other_way, square(grey, 64)) == "exact"


def test_a_small_change_of_content_makes_another_image() -> None:
    picture = square(images("cxr")[0], 64)
    lesion = picture.copy()
    lesion[20:26, 30:36] += np.uint8(12)  # less than a hundredth of the picture
    assert fingerprint(lesion).exact != fingerprint(picture).exact
    assert not alike(picture, lesion)
    assert verdict(index_of([picture]), lesion) == ""


def test_a_change_of_colour_alone_makes_another_image() -> None:
    grey = square(images("ct")[0], 64)
    red = np.repeat(grey, 3, axis=2) // 2
    red[..., 0] += 77  # luma is 77 R + 150 G + 29 B, by 256
    red[..., 2] += 30
    green = np.repeat(grey, 3, axis=2) // 2
    green[..., 1] += 43
    luma = np.array([77, 150, 29]) / 256
    assert np.abs((red @ luma - green @ luma).mean()) < 2
    assert not alike(red, green)


def test_two_nearly_black_images_are_not_the_same_one() -> None:
    draws = np.random.default_rng(0)
    first, second = draws.integers(0, 4, (2, 64, 64, 1), dtype=np.uint8)
    assert fingerprint(first).exact != fingerprint(second).exact
    assert not alike(first, second)


def test_brightness_that_runs_into_white_is_still_a_copy() -> None:
    picture = square(images("ct")[0], 64).copy()
    picture[:20] = 255
    brighter = np.minimum(picture, 253) + np.uint8(2)
    assert verdict(index_of([picture]), brighter) == "near"


def test_what_is_not_committed_was_never_known(tmp_path: Path) -> None:
    pictures = [square(image, 64) for image in images("us", count=6)]
    copies = [square(jpeg(image), 64) for image in images("us", count=6)]
    file = tmp_path / "journal.sqlite"
    connection = sqlite3.connect(file)
    index = DuplicateIndex(connection, pictures.__getitem__)
    for number in range(3):
        index.add(number, fingerprint(pictures[number]))
    connection.commit()
    for number in range(3, 6):
        index.add(number, fingerprint(pictures[number]))
    assert [verdict(index, copy) for copy in copies] == ["near"] * 6
    connection.close()  # as a kill would: the last three are gone with their pictures
    resumed = DuplicateIndex(sqlite3.connect(file), pictures.__getitem__)
    assert [verdict(resumed, copy) for copy in copies] == ["near"] * 3 + [""] * 3
    for number in range(3, 6):
        resumed.add(number, fingerprint(pictures[number]))
    assert [verdict(resumed, copy) for copy in copies] == ["near"] * 6


def test_a_crowd_of_near_hashes_costs_a_bounded_number_of_pictures() -> None:
    picture = square(images("oct")[0], 64)
    own = fingerprint(picture)
    read: list[int] = []

    def picture_at(number: int) -> Pixels:
        read.append(number)
        return 255 - picture

    index = DuplicateIndex(sqlite3.connect(":memory:"), picture_at)
    for number in range(300):
        index.add(number, Fingerprint(number.to_bytes(16, "big"), own.bits))
    assert index.find(own, picture) == ""
    assert read == list(range(MOST_COMPARED))


def test_slices_of_one_patient_and_other_patients_are_kept_apart(real_data: Path) -> None:
    for name, count in (("ct_mednist_bodyregion", 600), ("oct_noor", 340), ("derm_ham10000", 300)):
        with np.load(real_data / "images64" / f"{name}_64.npz") as arrays:
            pictures = [p.reshape(64, 64, -1) for p in arrays["train_images"][:count]]
        index = index_of([])
        index._picture_at = pictures.__getitem__
        for number, picture in enumerate(pictures):
            found = fingerprint(picture)
            assert index.find(found, picture) != "near"
            index.add(number, found)


def test_one_image_in_several_dicom_syntaxes_is_one(real_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pictures = []
    for name in ("CT1_RLE", "CT1_J2KR", "CT1_JLSL", "CT1_JLSN"):  # the last is nearly lossless
        frame = pydicom.dcmread(real_data / "dicom" / "real" / name).pixel_array.astype(float)
        low, high = np.percentile(frame, [1, 99])
        grey = np.clip((frame - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        pictures.append(square(grey, 64))
    index = index_of(pictures[:1])
    assert [verdict(index, picture) for picture in pictures[1:]] == ["exact", "exact", "near"]
