"""Small DICOM files for the tests of its readers."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian

CT_IMAGE = UID("1.2.840.10008.5.1.4.1.1.2")
WriteDicom = Callable[..., Path]


@pytest.fixture(autouse=True)
def malformed_headers_may_be_written() -> Iterator[None]:
    before = config.settings.writing_validation_mode
    config.settings.writing_validation_mode = config.IGNORE
    yield
    config.settings.writing_validation_mode = before


@pytest.fixture
def write_dicom(tmp_path: Path) -> WriteDicom:
    """Write a DICOM file: an array of one frame, or compressed frames; header by keyword.

    A header value of None takes the element out.
    """
    numbers = itertools.count()

    def write(
        pixels: NDArray[Any] | list[bytes], syntax: UID = ExplicitVRLittleEndian, **header: object
    ) -> Path:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CT_IMAGE
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
        dataset.PixelRepresentation = 0
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        if isinstance(pixels, list):
            dataset.Rows = dataset.Columns = 64
            dataset.BitsAllocated = 8
            dataset.PixelData = encapsulate(pixels)
            dataset["PixelData"].VR = "OB"
        else:
            dataset.Rows, dataset.Columns = pixels.shape[:2]
            dataset.BitsAllocated = 8 * pixels.dtype.itemsize
            dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
            if pixels.ndim == 3:
                dataset.SamplesPerPixel = 3
                dataset.PhotometricInterpretation = "RGB"
                dataset.PlanarConfiguration = 0
            dataset.PixelData = pixels.tobytes()
            dataset["PixelData"].VR = "OW"
        dataset.BitsStored = dataset.BitsAllocated
        for keyword, value in header.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        path = tmp_path / f"{next(numbers)}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def ramp() -> NDArray[np.uint16]:
    """Every value from 0 to 4,095, once."""
    return np.arange(4096, dtype=np.uint16).reshape(64, 64)
