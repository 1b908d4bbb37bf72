import contextlib
import gzip
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.ingest.readers.nifti import read_nifti
from client.ingest.types import Item, Reason, Rejected, Rules

nibabel = pytest.importorskip("nibabel")
RULES = Rules(px=16, frames=4)


def write(path: Path, volume: NDArray[Any], affine: Any = None, **header: Any) -> Path:
    """A NIfTI file; without an affine its axes run to the right, the front and the head."""
    image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    image.to_filename(path)
    return path


def read(path: Path, modality: str | None = "ct", rules: Rules = RULES) -> NDArray[np.uint8]:
    pictures = read_nifti(Item(path, f"0/{path.name}", modality), rules).pictures
    return np.stack([picture.pixels[..., 0] for picture in pictures])


def rejection(path: Path, modality: str | None = "ct") -> Reason:
    with pytest.raises(Rejected) as rejected:
        read(path, modality)
    return rejected.value.reason


def patched(source: Path, target: Path, place: int, data: bytes) -> Path:
    content = bytearray(source.read_bytes())
    content[place : place + len(data)] = data
    (gzip.open if target.suffix == ".gz" else open)(target, "wb").write(content)  # type: ignore[operator]
    return target


def body() -> NDArray[np.int16]:
    """Air with a bright front right quarter, so that every axial slice shows where it lies."""
    volume = np.full((16, 16, 8), -1000, np.int16)
    volume[8:, 8:] = 40
    volume[12:, 12:] = 2000
    return volume


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_ct_is_shown_in_its_window_and_seen_from_the_feet(tmp_path: Path, suffix: str) -> None:
    slices = read(write(tmp_path / f"a.{suffix}", body()))
    assert slices.shape == (4, 16, 16)
    for picture in slices:
        # Front is up and the patient's right on the left; the window is centre 40, width 400.
        assert (picture[4:8, :8] == 128).all()
        assert (picture[:4, :4] == 255).all()
        assert not picture[8:].any()
        assert not picture[:, 8:].any()


def test_slices_are_axial_however_the_volume_is_stored(tmp_path: Path) -> None:
    expected = read(write(tmp_path / "a.nii", body()))
    # Axes to the feet, the left and the front: the same body, stored another way.
    stored = np.transpose(body()[::-1, :, ::-1], (2, 0, 1))
    affine = np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(read(write(tmp_path / "b.nii", stored, affine)), expected)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -24), (-1, 2000), (2, 0)])
def test_slope_and_intercept_give_hounsfield_units(
    tmp_path: Path, slope: float, intercept: float
) -> None:
    stored = ((body() - intercept) / slope).astype(np.int16)
    plain = write(tmp_path / "a.nii", stored)
    scaling = np.array([slope, intercept], "<f4").tobytes()
    path = patched(plain, tmp_path / "b.nii.gz", 112, scaling)
    np.testing.assert_array_equal(nibabel.load(path).get_fdata(), body())
    np.testing.assert_array_equal(read(path), read(write(tmp_path / "c.nii", body())))


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_a_slope_that_means_none_is_none(tmp_path: Path, slope: float) -> None:
    plain = write(tmp_path / "a.nii", body())
    path = patched(plain, tmp_path / "b.nii", 112, np.array([slope, 7], "<f4").tobytes())
    np.testing.assert_array_equal(read(path), read(plain))


def test_the_window_of_the_rules_is_used(tmp_path: Path) -> None:
    lung = Rules(px=16, frames=1, ct_window=(-500, 2000))
    [picture] = read(write(tmp_path / "a.nii", body()), rules=lung)
    # -1000 is 500 of 2000 above the low end -1500, 40 is 1540.
    assert sorted(set(picture.ravel().tolist())) == [64, 196, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64, ">i2"])
def test_other_volumes_are_stretched_between_percentiles(tmp_path: Path, dtype: Any) -> None:
    ramp = np.zeros((16, 16, 3), dtype)
    ramp[:] = np.arange(16)[::-1, None, None] * 10
    slices = read(write(tmp_path / "a.nii", ramp), "oct")
    assert slices.shape == (3, 16, 16)
    assert (slices[0] == np.rint(np.arange(16) * 17)).all()


def test_oct_is_cut_from_b_scan_to_b_scan(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 255, (20, 40, 30), dtype=np.uint8)
    volume[:, 5] //= 4  # one dark B-scan
    affine = np.diag([0.0117, 0.12, 0.0039, 1])
    slices = read(write(tmp_path / "a.nii", volume, affine), "oct", Rules(px=16, frames=40))
    assert len(slices) == 40
    assert slices[5].mean() < slices[6].mean() / 2
    # Equal spacings: the axis of fewest samples.
    slices = read(write(tmp_path / "b.nii", volume), "oct", Rules(px=16, frames=99))
    assert len(slices) == 20


def test_a_single_slice_is_shown_whatever_axis_it_lies_across(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    for shape in ((40, 50), (40, 50, 1), (1, 40, 50)):
        assert read(write(tmp_path / "a.nii", image.reshape(shape)), "cxr").shape == (1, 16, 16)


def test_of_a_time_series_the_first_volume_is_read(tmp_path: Path) -> None:
    series = np.stack([body(), np.zeros_like(body())], axis=-1)
    np.testing.assert_array_equal(
        read(write(tmp_path / "a.nii.gz", series)), read(write(tmp_path / "b.nii", body()))
    )


def test_colour_is_kept(tmp_path: Path) -> None:
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    volume = np.zeros((16, 16, 2), dtype)
    volume["R"][8:], volume["B"][:8] = 200, 100
    path = write(tmp_path / "a.nii", volume)
    first, _ = read_nifti(Item(path, "0/a.nii", "dermatology"), RULES).pictures
    assert first.pixels[0, 0].tolist() == [200, 0, 0]
    assert first.pixels[0, 15].tolist() == [0, 0, 100]


def test_nan_is_background_and_nothing_else_is_refused(tmp_path: Path) -> None:
    volume = body().astype(np.float32)
    volume[:8] = np.nan
    assert not read(write(tmp_path / "a.nii", volume))[:, :, 8:].any()
    assert rejection(write(tmp_path / "a.nii", volume * np.nan), "oct") == Reason.NOT_FINITE


def test_slices_of_air_are_left_out(tmp_path: Path) -> None:
    volume = body()
    volume[..., :6] = -1000
    assert len(read(write(tmp_path / "a.nii", volume), rules=Rules(px=16))) == 2
    assert rejection(write(tmp_path / "a.nii", volume[..., :6])) == Reason.CONSTANT


def test_without_a_modality_nothing_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", body())
    assert rejection(path, None) == Reason.UNDECIDED
    assert len(read(path, None, Rules(px=16, frames=4, modality="oct"))) == 4


def test_a_segmentation_that_says_so_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", body(), intent_code=1002)
    assert rejection(path) == Reason.OTHER_MODALITY


def test_complex_numbers_are_no_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", body().astype(np.complex64))
    assert rejection(path) == Reason.NOT_AN_IMAGE


def test_extensions_are_skipped(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(body(), np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"DOE^JANE" * 5000))
    image.to_filename(tmp_path / "a.nii.gz")
    expected = read(write(tmp_path / "b.nii", body()))
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), expected)


def test_the_second_version_of_the_format_is_read(tmp_path: Path) -> None:
    nibabel.Nifti2Image(body(), np.eye(4)).to_filename(tmp_path / "a.nii")
    expected = read(write(tmp_path / "b.nii", body()))
    np.testing.assert_array_equal(read(tmp_path / "a.nii"), expected)


def test_a_size_beyond_the_limit_is_refused_in_little_memory(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.nii", body())
    for suffix in ("nii", "nii.gz"):
        sides = np.array([3, 32_000, 32_000, 32_000], "<i2").tobytes()
        huge = patched(plain, tmp_path / f"huge.{suffix}", 40, sides)
        late = patched(plain, tmp_path / f"late.{suffix}", 108, np.float32(1e9).tobytes())
        tracemalloc.start()
        try:
            assert rejection(huge) == Reason.TOO_LARGE
            assert rejection(late) == Reason.TOO_LARGE
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()


def test_what_follows_the_voxels_is_never_unpacked(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.nii", body())
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as file:
        file.write(plain.read_bytes())
        for _ in range(100):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(read(tmp_path / "bomb.nii.gz"), read(plain))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_slice_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.zeros((16, 16, 1), np.uint8))
    data = bytearray(path.read_bytes()[:352])
    data[40:48] = np.array([3, 12_500, 12_500, 1], "<i2").tobytes()
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(352 + 12_500**2)  # sparse
    assert rejection(path) == Reason.TOO_LARGE


def test_cut_and_damaged_files_are_named(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(-1000, 2000, (16, 16, 8)).astype(np.int16)
    for suffix in ("nii", "nii.gz"):
        path = write(tmp_path / f"a.{suffix}", volume)
        data = path.read_bytes()
        for length in (100, len(data) // 2):
            path.write_bytes(data[:length])
            assert rejection(path) == Reason.TRUNCATED
    path.write_bytes(data[:-8] + bytes(8))  # another checksum
    assert rejection(path) == Reason.DAMAGED_PIXELS
    path.write_bytes(data[:60] + b"\xff" * 40 + data[100:])
    assert rejection(path) == Reason.DAMAGED_PIXELS
    plain = write(tmp_path / "a.nii", volume)
    for place, junk in {
        40: b"\x03\0\0\0\x10\0",  # no columns
        70: b"\x63\x09",  # no such type of numbers
        108: np.float32(17).tobytes(),  # voxels within the header
    }.items():
        assert rejection(patched(plain, tmp_path / "b.nii", place, junk)) == Reason.DAMAGED_HEADER


def test_without_nibabel_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.nii", body())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert rejection(path) == Reason.EXTRA_MISSING


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(),
    suffix=st.sampled_from(["nii", "nii.gz"]),
    modality=st.sampled_from(["ct", "oct"]),
)
def test_a_mutated_file_gives_slices_or_a_reason(
    tmp_path: Path, data: st.DataObject, suffix: str, modality: str
) -> None:
    plain = write(tmp_path / "a.nii", body())
    mutated = bytearray(plain.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"b.{suffix}"
    (gzip.open if suffix == "nii.gz" else open)(path, "wb").write(mutated)  # type: ignore[operator]
    with contextlib.suppress(Rejected):
        assert read(path, modality).shape[1:] == (16, 16)
