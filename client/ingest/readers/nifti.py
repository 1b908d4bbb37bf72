"""NIfTI volumes as slices, plain or compressed by gzip, by nibabel.

Of the header nibabel parses the fixed part alone: its extensions may hold a whole DICOM header.
"""

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.ingest.frames import pick_frames
from client.ingest.grey import robust_range, to_bytes
from client.ingest.pictures import make_pictures
from client.ingest.sources import identity_of
from client.ingest.types import MAX_FRAME_PIXELS, Item, Reading, Reason, Rejected, Rules

MAX_VOLUME_BYTES: Final = 2**31
"""2,000 slices of 1,024 x 512 pixels; larger volumes are refused before they are read."""

MAX_HEADER_BYTES: Final = 2**24
"""Extensions before the voxels are skipped, which a compressed file must not make endless."""

NIFTI1_BYTES: Final = 348
NIFTI2_BYTES: Final = 540
GZIP: Final = b"\x1f\x8b"
Stream = gzip.GzipFile | io.BufferedReader

AXIAL: Final = 2
"""Third axis of a volume turned so that its axes run to the right, the front and the head."""


def read_nifti(item: Item, rules: Rules) -> Reading:
    """Read slices of the first volume of a NIfTI file.

    CT is cut into axial slices and shown in the window of the rules. Other volumes are cut across
    their coarsest axis, which is from B-scan to B-scan in OCT, and stretched between the 0.5 and
    99.5 percentiles of the volume. Slices lie as the header's orientation says, seen the
    radiological way: head or front up, the patient's right on the left. NaN is background.

    Raises:
        Rejected: with the reason, also when neither item nor rules name the modality, and
            OTHER_MODALITY for segmentations and statistical maps that say so.
    """
    modality = item.modality or rules.modality
    if modality is None:
        raise Rejected(Reason.UNDECIDED)
    try:
        import nibabel
    except ImportError:
        raise Rejected(Reason.EXTRA_MISSING) from None
    try:
        with _open(item.path) as file:
            header = _header(nibabel, file)
            volume = _first_volume(file, header)
    except EOFError:
        raise Rejected(Reason.TRUNCATED) from None
    except (zlib.error, gzip.BadGzipFile):
        raise Rejected(Reason.DAMAGED_PIXELS) from None
    except OSError:
        raise Rejected(Reason.UNREADABLE) from None
    volume, spacing = _turned(nibabel, volume, header)
    slices = np.moveaxis(volume, _slice_axis(modality, volume.shape, spacing), 0)
    if slices[0].size > MAX_FRAME_PIXELS:
        raise Rejected(Reason.TOO_LARGE)
    window = rules.ct_window if modality == "ct" else None
    frames = _frames(slices, _slope_and_intercept(header), window, rules.frames)
    pictures, text = make_pictures(frames, modality, rules)
    return Reading(pictures, identity_of(item, rules), "NIfTI", text=text)


def _open(path: Path) -> Stream:
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP
    return gzip.open(path) if compressed else open(path, "rb")


def _header(nibabel: Any, file: Stream) -> Any:
    """The fixed part of the header, and only of volumes of images."""
    block = _read(file, NIFTI1_BYTES).tobytes()
    try:
        if block[344:348] == b"n+1\0":
            header = nibabel.Nifti1Header(block)
        else:
            block += _read(file, NIFTI2_BYTES - NIFTI1_BYTES).tobytes()
            header = nibabel.Nifti2Header(block)
    except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError, OverflowError):
        raise Rejected(Reason.DAMAGED_HEADER) from None
    if int(header["intent_code"]) != 0:
        raise Rejected(Reason.OTHER_MODALITY)
    return header


def _first_volume(file: Stream, header: Any) -> NDArray[Any]:
    """Voxels as they are stored: numbers [X, Y, Z], or bytes [X, Y, Z, 3] of colour."""
    shape = tuple(int(side) for side in header.get_data_shape()[:3])
    shape += (1,) * (3 - len(shape))
    dtype = header.get_data_dtype()
    past = int(header.get_data_offset()) - int(header["sizeof_hdr"])
    if min(shape) < 1 or past < 0:
        raise Rejected(Reason.DAMAGED_HEADER)
    if dtype.names is None and dtype.kind not in "iuf":  # complex numbers are no image
        raise Rejected(Reason.NOT_AN_IMAGE)
    if math.prod(shape) * dtype.itemsize > MAX_VOLUME_BYTES or past > MAX_HEADER_BYTES:
        raise Rejected(Reason.TOO_LARGE)
    _read(file, past)
    voxels = _read(file, math.prod(shape) * dtype.itemsize)
    file.read(1)  # at its end, gzip compares the checksum
    volume: NDArray[Any] = voxels.view(dtype).reshape(shape, order="F")
    if dtype.names is not None:
        volume = np.stack([volume[name] for name in dtype.names[:3]], axis=-1)
    return volume


def _read(file: Stream, count: int) -> NDArray[np.uint8]:
    """Exactly so many bytes; memory is touched only as far as the file really fills it."""
    data = np.empty(count, np.uint8)
    for start in range(0, count, 2**20):
        chunk = file.read(min(2**20, count - start))
        data[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
        if len(chunk) < min(2**20, count - start):
            raise EOFError
    return data


def _turned(
    nibabel: Any, volume: NDArray[Any], header: Any
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The volume with its axes to the right, the front and the head, and its spacing along them."""
    try:
        affine = header.get_best_affine()
        axes = nibabel.orientations.io_orientation(affine)
        turned = nibabel.orientations.apply_orientation(volume, axes)
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.orientations.OrientationError,
        np.linalg.LinAlgError,
        ValueError,
    ):
        raise Rejected(Reason.DAMAGED_HEADER) from None
    spacing = np.empty(3)
    spacing[axes[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return turned, spacing


def _slice_axis(modality: str, shape: tuple[int, ...], spacing: NDArray[np.float64]) -> int:
    if 1 in shape[:3]:
        return shape.index(1)
    if modality == "ct":
        return AXIAL
    # Equal spacings differ in the last digits; then the axis of fewest samples is between slices.
    coarse = [axis for axis in range(3) if spacing[axis] >= 0.99 * spacing.max()]
    return min(coarse, key=lambda axis: (shape[axis], -axis))


def _slope_and_intercept(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        return 1.0, 0.0  # as the format says: no scaling
    return slope, intercept


def _frames(
    slices: NDArray[Any],
    scaling: tuple[float, float],
    window: tuple[float, float] | None,
    most: int,
) -> Iterator[NDArray[np.uint8]]:
    slope, intercept = scaling
    colour = slices.ndim == 4
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif not colour:
        low, high = sorted(end * slope + intercept for end in robust_range(slices))
    for index in pick_frames(len(slices), most):
        # Both remaining axes run away from where the picture's rows and columns begin.
        plane = slices[index][::-1, ::-1].swapaxes(0, 1)
        if colour:
            yield plane
        else:
            with np.errstate(all="ignore"):
                values = plane.astype(np.float32) * np.float32(slope) + np.float32(intercept)
            yield to_bytes(values, low, high)
