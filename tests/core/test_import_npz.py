from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from core.import_npz import modality_of_file, read_npz

TRAIN = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def whole(**changes: Any) -> dict[str, Any]:
    arrays = {
        "train_images": TRAIN,
        "train_labels": np.array([[0], [1], [1], [0]], np.uint8),
        "train_groups": np.array([7, 7, 9, 7]),
        "test_images": TRAIN[:2],
        "test_labels": np.array([1, 0]),
        "test_groups": np.array([3, 3]),
        "class_names": np.array(["clear", "cloudy"]),
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def test_all_of_a_file_is_read(tmp_path: Path) -> None:
    shard = read_npz(save(tmp_path / "cxr_x.npz", **whole()))
    assert shard.name == "cxr_x"
    assert shard.images.shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(shard.images[:4, :, :, 0], TRAIN)
    assert shard.modality.tolist() == [1] * 6
    assert shard.patient.tolist() == [0, 0, 1, 0, 2, 2]
    assert shard.label.tolist() == [0, 1, 1, 0, 1, 0]
    assert shard.split.tolist() == ["train"] * 4 + ["test"] * 2
    assert shard.classes == {"cxr": ("clear", "cloudy")}


def test_without_groups_each_image_is_its_own_patient(tmp_path: Path) -> None:
    shard = read_npz(save(tmp_path / "us.npz", train_images=TRAIN, val_images=TRAIN))
    assert shard.patient.tolist() == list(range(8))
    assert shard.label.tolist() == [-1] * 8
    assert shard.classes == {"us": ()}


def test_class_names_come_from_the_file_then_from_medmnist_then_from_numbers(
    tmp_path: Path,
) -> None:
    arrays = whole(class_names=None)
    medmnist = read_npz(save(tmp_path / "pneumoniamnist_64.npz", **arrays))
    assert medmnist.classes == {"cxr": ("normal", "pneumonia")}
    assert read_npz(save(tmp_path / "us_x.npz", **arrays)).classes == {"us": ("0", "1")}
    given = read_npz(save(tmp_path / "anything.npz", **whole()), "dermatology")
    assert given.classes == {"dermatology": ("clear", "cloudy")}


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("ct_mednist_64", "ct"),
        ("Path_lung", "pathology"),
        ("derm-ham", "dermatology"),
        ("organamnist", "ct"),
        ("retinamnist_224", "cfp"),
        ("breastmnist", "us"),
        ("oct", "oct"),
    ],
)
def test_the_file_name_tells_the_modality(name: str, modality: str) -> None:
    assert modality_of_file(Path(f"{name}.npz")) == modality


def test_a_name_without_a_modality_is_refused() -> None:
    with pytest.raises(UserError, match=r"must begin with its modality .*--modality"):
        modality_of_file(Path("octopus.npz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None, "test_images": None}, "expected at least one of train_images"),
        ({"train_images": TRAIN.astype(np.float32)}, r"'train_images': expected uint8.*float32"),
        ({"train_images": TRAIN[:, :4]}, r"found uint8 \[4, 4, 8\]"),
        ({"train_images": TRAIN[0]}, r"found uint8 \[8, 8\]"),
        ({"test_images": np.zeros((2, 16, 16), np.uint8)}, "the splits differ in image shape"),
        ({"train_labels": np.array([0, 1])}, "one integer for each of 4 images"),
        ({"train_labels": np.zeros(4)}, "'train_labels': expected one integer.*float64"),
        ({"train_labels": np.array([0, 1, 2, 0])}, "expected labels 0 to 1, found 0 to 2"),
        ({"train_labels": np.array([0, 1, -1, 0])}, "found -1 to 1"),
        ({"class_names": np.array(["a", "a"])}, "'class_names' must be a list of distinct"),
        ({"train_groups": np.array([1, 2])}, "one number or text for each of 4 images"),
        ({"test_groups": np.array([7, 3])}, "patient number 0 is in 'train' and 'test'"),
        ({"train_labels": np.array([0, {}, 1, 2], dtype=object)}, "is not a whole npz file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "cxr.npz", **whole(**changes))
    with pytest.raises(UserError, match=message) as caught:
        read_npz(path)
    assert "\n" not in str(caught.value)


def test_an_empty_file_of_images_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "ct.npz", train_images=np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(UserError, match="is empty"):
        read_npz(path)


def test_a_file_cut_anywhere_or_altered_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "ct.npz", **whole())
    data = (tmp_path / "ct.npz").read_bytes()
    for length in (0, 3, 50, len(data) // 2, len(data) - 5):
        (tmp_path / "ct.npz").write_bytes(data[:length])
        with pytest.raises(UserError, match="is not a whole npz file"):
            read_npz(tmp_path / "ct.npz")
    flipped = bytearray(data)
    flipped[100] ^= 0xFF
    (tmp_path / "ct.npz").write_bytes(flipped)
    with pytest.raises(UserError, match="is not a whole npz file"):
        read_npz(tmp_path / "ct.npz")


def test_a_single_array_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ct.npy", TRAIN)
    (tmp_path / "ct.npy").rename(tmp_path / "ct.npz")
    with pytest.raises(UserError, match="a single array"):
        read_npz(tmp_path / "ct.npz")
    with pytest.raises(UserError, match="does not exist"):
        read_npz(tmp_path / "us.npz")
