import contextlib
import gzip
import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.ingest.read import read
from client.ingest.types import Item, Reason, Rejected, Rules

RULES = Rules(px=16, modality="ct")


def rejection(path: Path) -> Reason:
    with pytest.raises(Rejected) as rejected:
        read(Item(path, "0/x"), RULES)
    return rejected.value.reason


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", encoded("PNG"))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("name", ["a", "a.dcm", "a.nii.gz", "a.csv", "1.2.840.113619"])
def test_the_content_decides_whatever_the_name(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(kind))
    assert read(Item(tmp_path / name, "0/x"), RULES).kind == kind


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "png"])
def test_nifti_is_known_by_its_magic(tmp_path: Path, suffix: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).integers(-200, 300, (20, 20, 4)).astype(np.int16)
    for image in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        image(volume, np.eye(4)).to_filename(tmp_path / "plain.nii")
        data = (tmp_path / "plain.nii").read_bytes()
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(data if suffix == "nii" else gzip.compress(data))
        found = read(Item(path, "0/x"), RULES)
        assert (found.kind, len(found.pictures)) == ("NIfTI", 4)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html>Session expired, log in again</html>",
        b"%PDF-1.7\n" + bytes(400),
        zipped(),
        gzip.compress(b"image_path,modality\n" * 99),
        b"\x1f\x8b" + bytes(300),
        b"\x93NUMPY\x01\x00" + bytes(300),
        b"GIF89a" + bytes(300),
        b"BMI of the patients\n" * 30,
        b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(300),
        b"\0",
        bytes(4096),
        b"\xff" * 200,
        b"\x7fELF" + bytes(300),
    ],
)
def test_what_is_no_image_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    for name in ("a.png", "a.dcm", "a.nii.gz", "a.svs"):
        (tmp_path / name).write_bytes(data)
        assert rejection(tmp_path / name) == Reason.NOT_AN_IMAGE


def test_what_cannot_be_read_has_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.dcm").touch()
    assert rejection(tmp_path / "empty.dcm") == Reason.EMPTY
    assert rejection(tmp_path / "nowhere.dcm") == Reason.UNREADABLE
    assert rejection(tmp_path / "zero\0byte.dcm") == Reason.UNREADABLE
    assert rejection(tmp_path / ("long" * 99)) == Reason.UNREADABLE
    assert rejection(tmp_path) == Reason.SPECIAL
    os.mkfifo(tmp_path / "pipe.dcm")  # opening it would wait for ever
    assert rejection(tmp_path / "pipe.dcm") == Reason.SPECIAL
    assert rejection(Path(os.devnull)) == Reason.SPECIAL


def test_a_file_without_permission_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.dcm").write_bytes(encoded("PNG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who may read all
    reason = rejection(tmp_path / "a.dcm")
    monkeypatch.undo()
    assert reason == Reason.UNREADABLE


def test_what_listing_found_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=Reason.LINK):
        read(Item(tmp_path, "0/x", reason=Reason.LINK), RULES)


def test_dicom_goes_to_its_reader_with_or_without_a_preamble(tmp_path: Path) -> None:
    element = struct.pack("<HH2sH", 8, 0x60, b"CS", 2) + b"SR"
    (tmp_path / "bare").write_bytes(element)
    assert rejection(tmp_path / "bare") not in {Reason.NOT_AN_IMAGE, Reason.EMPTY}
    # A preamble may make the same file a TIFF; what it is as DICOM counts.
    (tmp_path / "both").write_bytes(b"II*\0".ljust(128, b"\0") + b"DICM")
    assert rejection(tmp_path / "both") == Reason.DAMAGED_HEADER


def test_reading_loads_no_torch_and_no_extra() -> None:
    code = (
        "import sys, client.ingest.read\n"
        "assert not {'torch', 'nibabel', 'openslide', 'flwr'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.sampled_from([b"", *map(encoded, ("PNG", "TIFF"))]), data=st.binary(max_size=600))
def test_any_bytes_give_pictures_or_a_reason(tmp_path: Path, start: bytes, data: bytes) -> None:
    (tmp_path / "x").write_bytes(start[: len(data)] + data)
    with contextlib.suppress(Rejected):
        read(Item(tmp_path / "x", "0/x"), RULES)
