"""Synthetic DICOM files: the phantoms of core.phantoms behind headers as scanners write them.

Drawn small and enlarged, with noise of their own, so that no two files are near duplicates. Tests
and benchmarks share them; nothing in them belongs to a person.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from core.phantoms import make_phantoms

UID_ROOT: Final = "1.2.826.0.1.3680043.10.1999"
DRAWN_PX: Final = 128


@dataclass(frozen=True)
class Kind:
    """One sort of file in an archive."""

    modality: str
    """of the seven"""
    sop_class: str
    dicom_modality: str
    size: tuple[int, int]
    """rows, columns"""
    syntax: UID = ExplicitVRLittleEndian
    bits: int = 8
    frames: int = 1
    header: tuple[tuple[str, object], ...] = ()
    """further elements"""


CHEST: Final = (("BodyPartExamined", "CHEST"), ("ViewPosition", "PA"))
CT: Final = (("RescaleIntercept", -1024), ("RescaleSlope", 1), ("RescaleType", "HU"))
NO_TEXT: Final = (("BurnedInAnnotation", "NO"),)

KINDS: Final[dict[str, Kind]] = {
    "CT 512 x 512, 16 bits, uncompressed": Kind(
        "ct", "1.2.840.10008.5.1.4.1.1.2", "CT", (512, 512), bits=16, header=CT
    ),
    "CT 512 x 512, 16 bits, JPEG 2000": Kind(
        "ct", "1.2.840.10008.5.1.4.1.1.2", "CT", (512, 512), JPEG2000Lossless, 16, header=CT
    ),
    "CT 512 x 512, 16 bits, RLE": Kind(
        "ct", "1.2.840.10008.5.1.4.1.1.2", "CT", (512, 512), RLELossless, 16, header=CT
    ),
    "chest X-ray 1,024 x 1,000, 12 bits, uncompressed": Kind(
        "cxr", "1.2.840.10008.5.1.4.1.1.1.1", "DX", (1024, 1000), bits=12, header=CHEST
    ),
    "chest X-ray 1,024 x 1,000, 12 bits, JPEG 2000": Kind(
        "cxr", "1.2.840.10008.5.1.4.1.1.1.1", "DX", (1024, 1000), JPEG2000Lossless, 12, header=CHEST
    ),
    "ultrasound 480 x 640, colour, uncompressed": Kind(
        "us", "1.2.840.10008.5.1.4.1.1.6.1", "US", (480, 640)
    ),
    "ultrasound cine, 20 frames 240 x 320, colour, JPEG": Kind(
        "us", "1.2.840.10008.5.1.4.1.1.3.1", "US", (240, 320), JPEGBaseline8Bit, frames=20
    ),
    "fundus photograph 800 x 800, colour, JPEG": Kind(
        "cfp", "1.2.840.10008.5.1.4.1.1.77.1.5.1", "OP", (800, 800), JPEGBaseline8Bit, 8, 1, NO_TEXT
    ),
    "dermoscopy 450 x 600, colour, JPEG": Kind(
        "dermatology", "1.2.840.10008.5.1.4.1.1.77.1.7", "DMS", (450, 600), JPEGBaseline8Bit
    ),
    "microscopy 512 x 512, colour, JPEG": Kind(
        "pathology", "1.2.840.10008.5.1.4.1.1.77.1.2", "SM", (512, 512), JPEGBaseline8Bit
    ),
}


def draw(kind: Kind, seed: int) -> NDArray[Any]:
    """Frames of one file, as stored: uint8 or uint16 [F, rows, columns(, 3)]."""
    shard = make_phantoms(
        kind.modality, patients=1, images_per_patient=kind.frames, px=DRAWN_PX, seed=seed
    )
    draws = np.random.default_rng(seed)
    rows, columns = kind.size
    frames = []
    for small in shard.images:
        grey = small.shape[2] == 1
        picture = Image.fromarray(small[:, :, 0] if grey else small)
        large = np.asarray(picture.resize((columns, rows), Image.Resampling.BICUBIC), np.float32)
        large = large + draws.normal(0, 3, large.shape).astype(np.float32)
        if kind.modality == "us":
            large = np.repeat(large[:, :, None], 3, axis=2)
        if kind.modality == "ct":
            large = large * (400 / 255) - 160 + 1024  # the soft-tissue window, as stored
        elif kind.bits > 8:
            large = large * ((2**kind.bits - 1) / 255)
        limit = 2**kind.bits - 1
        stored = np.rint(np.clip(large, 0, limit)).astype(np.uint16 if kind.bits > 8 else np.uint8)
        frames.append(stored)
    return np.stack(frames)


def make_dicom(kind: Kind, frames: NDArray[Any], *, patient: str, number: int) -> Dataset:
    """A dataset with its file meta, ready to be saved.

    Args:
        kind: What the header says.
        frames: What `draw` gave.
        patient: PatientID.
        number: Number of the file in the archive, for its UIDs.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = UID(kind.sop_class)
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID_ROOT}.1.{number}"
    dataset.SOPInstanceUID = f"{UID_ROOT}.1.{number}"
    dataset.StudyInstanceUID = f"{UID_ROOT}.2.{number}"
    dataset.SeriesInstanceUID = f"{UID_ROOT}.3.{number}"
    dataset.PatientID = patient
    dataset.PatientName = f"Synthetic^{patient}"
    dataset.Modality = kind.dicom_modality
    dataset.Manufacturer = "SYNTHETIC"
    dataset.StudyDate = "20200101"
    for keyword, value in kind.header:
        setattr(dataset, keyword, value)
    _set_pixels(dataset, kind, frames)
    return dataset


def write_archive(
    directory: Path, counts: dict[str, int], *, seed: int = 0, track: Callable[..., Any] = iter
) -> list[Path]:
    """Write so many files of each kind, mixed, four files a patient and folder."""
    order = [name for name, count in counts.items() for _ in range(count)]
    np.random.default_rng(seed).shuffle(order)
    paths = []
    for number, name in enumerate(track(order)):
        kind = KINDS[name]
        patient = f"P{number // 4:05d}"
        path = directory / patient / f"{number:06d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = draw(kind, seed * 1_000_000 + number)
        dataset = make_dicom(kind, frames, patient=patient, number=number)
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _set_pixels(dataset: Dataset, kind: Kind, frames: NDArray[Any]) -> None:
    colour = frames.ndim == 4
    dataset.Rows, dataset.Columns = kind.size
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.BitsAllocated = 16 if kind.bits > 8 else 8
    dataset.BitsStored = kind.bits
    dataset.HighBit = kind.bits - 1
    dataset.PixelRepresentation = 0
    if colour:
        dataset.PlanarConfiguration = 0
    if kind.frames > 1:
        dataset.NumberOfFrames = kind.frames
    if kind.syntax == JPEGBaseline8Bit:
        dataset.file_meta.TransferSyntaxUID = kind.syntax
        dataset.PhotometricInterpretation = "YBR_FULL_422" if colour else "MONOCHROME2"
        dataset.PixelData = encapsulate([jpeg(frame) for frame in frames])
        dataset["PixelData"].VR = "OB"
        return
    dataset.PixelData = frames.tobytes()
    dataset["PixelData"].VR = "OW"
    if kind.syntax != ExplicitVRLittleEndian:
        dataset.compress(kind.syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)


def jpeg(frame: NDArray[np.uint8], quality: int = 90) -> bytes:
    """One frame as a JPEG baseline codestream."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=quality)
    return out.getvalue()
