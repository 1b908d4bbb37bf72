import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import HEADER_BYTES, Shard, images_header, open_shard, write_shard

US = MODALITIES.index("us")


def small_shard(name: str = "small", px: int = 8, channels: int = 3) -> Shard:
    """Six images: two modalities, one unlabelled image, one patient with images of both."""
    rng = np.random.default_rng(0)
    return Shard(
        name=name,
        images=rng.integers(0, 256, (6, px, px, channels), dtype=np.uint8),
        modality=np.array([0, 0, US, US, US, 0], dtype=np.int16),
        patient=np.array([0, 1, 0, 2, 3, 3]),
        label=np.array([1, 0, 0, -1, 1, -1]),
        split=np.array(["train", "val", "train", "test", "test", "test"]),
        classes={"ct": ("head", "chest, wide"), "us": ("benign", "malignant")},
    )


def test_a_shard_comes_back_from_disk_as_it_was_and_memory_mapped(tmp_path: Path) -> None:
    shard = small_shard()
    opened = open_shard(write_shard(tmp_path / "s", shard), verify=True)
    assert isinstance(opened.images, np.memmap)
    assert not opened.images.flags.writeable
    assert (opened.name, opened.classes) == (shard.name, shard.classes)
    for name in ("images", "modality", "patient", "label", "split"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(shard, name))
        assert getattr(opened, name).dtype.kind == getattr(shard, name).dtype.kind


def test_the_table_holds_what_the_format_says(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", small_shard())
    with open(tmp_path / "s" / "table.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["modality", "patient", "label", "split"]
    assert rows[1] == ["ct", "0", "chest, wide", "train"]
    assert rows[4] == ["us", "2", "", "test"]


def test_opaque_patient_keys_of_another_writer_are_numbered(tmp_path: Path) -> None:
    directory = write_shard(tmp_path / "s", small_shard())
    table = directory / "table.csv"
    text = table.read_text().replace(",0,", ",x-17,")
    table.write_text(text)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["sha256"]["table.csv"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))
    opened = open_shard(directory)
    assert opened.patient.tolist() == [0, 1, 0, 2, 3, 3]
    assert opened.keys is not None
    assert opened.keys.tolist() == [b"x-17", b"", b"", b""]
    again = open_shard(write_shard(tmp_path / "again", opened))
    assert again.keys is not None
    assert again.keys.tolist() == opened.keys.tolist()


def test_a_shard_of_plain_numbers_names_nobody_beyond_itself(tmp_path: Path) -> None:
    assert open_shard(write_shard(tmp_path / "s", small_shard())).keys is None


def test_writing_replaces_the_shard_of_that_name_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", small_shard())
    write_shard(tmp_path / "s", small_shard(px=16))
    assert open_shard(tmp_path / "s").images.shape == (6, 16, 16, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_writing_over_anything_else_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="is not a shard; it is left as it is"):
        write_shard(folder, small_shard())
    assert (folder / "holiday.jpg").read_text() == "precious"
    write_shard(tmp_path / "other", small_shard("other"))
    with pytest.raises(UserError, match="holds shard 'other', not 'small'"):
        write_shard(tmp_path / "other", small_shard())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.shards.np.save", full_disk)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        write_shard(tmp_path / "s", small_shard())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_is_refused_when_written_and_when_opened(tmp_path: Path) -> None:
    shard = small_shard()
    nothing = {
        name: getattr(shard, name)[:0]
        for name in ("images", "modality", "patient", "label", "split")
    }
    with pytest.raises(UserError, match=r"is empty \(0 images\)"):
        write_shard(tmp_path / "s", replace(shard, **nothing))
    directory = write_shard(tmp_path / "s", shard)
    edit_manifest(directory, count=0)
    with pytest.raises(UserError, match=r"is empty \(0 images\)"):
        open_shard(directory)


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    split = np.array(["train", "val", "test", "test", "test", "test"])
    with pytest.raises(UserError, match="patient number 0 is in 'train' and 'test'"):
        write_shard(tmp_path / "s", replace(small_shard(), split=split))


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: "),
        ({"count": "6"}, "count: "),
        ({"channels": 4}, "channels: "),
        ({"note": 1}, "note: "),
        ({"classes": {"mri": []}}, "must be one of ct, cxr"),
        ({"px": 16}, r"expected uint8 \(6, 16, 16, 3\), found uint8 \(6, 8, 8, 3\)"),
        ({"count": 7}, "expected uint8"),
        ({"classes": {"ct": ["head"], "us": []}}, "line 2 does not fit the manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    directory = write_shard(tmp_path / "s", small_shard())
    edit_manifest(directory, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_shard(directory)
    assert "\n" not in str(caught.value)


def test_cut_or_missing_files_are_refused(tmp_path: Path) -> None:
    directory = write_shard(tmp_path / "s", small_shard())
    images = (directory / "images.npy").read_bytes()
    (directory / "images.npy").write_bytes(images[:-10])
    with pytest.raises(UserError, match=r"images\.npy' is damaged: .*; prepare the shard again"):
        open_shard(directory)
    (directory / "images.npy").write_bytes(images[:20])
    with pytest.raises(UserError, match=r"images\.npy' is damaged"):
        open_shard(directory)
    (directory / "images.npy").write_bytes(images)
    (directory / "table.csv").write_text("modality,patient,label,split\n")
    with pytest.raises(UserError, match=r"table\.csv' is damaged: its sha256"):
        open_shard(directory)
    (directory / "table.csv").unlink()
    with pytest.raises(UserError, match=r"table\.csv' is damaged: the file is missing"):
        open_shard(directory)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json' is damaged"):
        open_shard(directory)


def test_a_changed_pixel_is_found_by_verification_only(tmp_path: Path) -> None:
    directory = write_shard(tmp_path / "s", small_shard())
    data = bytearray((directory / "images.npy").read_bytes())
    data[-1] ^= 1
    (directory / "images.npy").write_bytes(data)
    open_shard(directory)
    with pytest.raises(UserError, match=r"images\.npy' is damaged: its sha256"):
        open_shard(directory, verify=True)


def test_a_manifest_may_name_the_window_of_its_ct_images(tmp_path: Path) -> None:
    manifest = write_shard(tmp_path / "s", small_shard()) / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert "ct_window" not in facts
    manifest.write_text(json.dumps({**facts, "ct_window": [40, 400]}))
    open_shard(tmp_path / "s", verify=True)
    manifest.write_text(json.dumps({**facts, "ct_window": [40]}))
    with pytest.raises(UserError, match="ct_window"):
        open_shard(tmp_path / "s")


def test_the_header_written_by_hand_is_the_one_numpy_writes(tmp_path: Path) -> None:
    for count in (1, 6, 12_345):
        np.save(tmp_path / "images.npy", np.zeros((count, 8, 8, 3), np.uint8))
        with open(tmp_path / "images.npy", "rb") as file:
            assert file.read(HEADER_BYTES) == images_header(count, 8, 3)
    assert len(images_header(10**12, 1024, 3)) == HEADER_BYTES
