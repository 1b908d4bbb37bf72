"""DICOM files: single images, cines, enhanced objects, volumes and the tiles of slides."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.ingest import traits
from client.ingest.burned_in import Box
from client.ingest.dicom_file import DicomFile, guard, open_dicom
from client.ingest.dicom_pixels import KINDS, decode_frame
from client.ingest.frames import pick_frames
from client.ingest.modality import burned_in_class, modality_of
from client.ingest.pictures import make_pictures
from client.ingest.readers.slide import MIN_TISSUE, find_tissue
from client.ingest.sources import identity_of
from client.ingest.types import Item, Reading, Reason, Rejected, Rules
from client.ingest.vendors import vendor_of

CORNERS: Final = tuple(f"RegionLocation{corner}" for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1"))


def read_dicom(item: Item, rules: Rules) -> Reading:
    """Read the frames of one DICOM file.

    What costs least decides first: the header, then the length of the pixels, then the pixels of
    the picked frames, one at a time.

    Args:
        item: The file; its modality counts only where the header leaves it open.
        rules: How files become pictures.

    Raises:
        Rejected: The file gives no picture, with the reason.
    """
    with open_dicom(item.path) as file:
        modality = _modality(file, item, rules)
        text_class = burned_in_class(file.dataset, modality)
        declared = text_class == "declared"
        if declared and rules.burned_in[text_class] == "skip":
            raise Rejected(Reason.BURNED_IN)
        images = _images(file, rules, modality)
        regions = _regions(file.dataset)
        pictures, text = make_pictures(images, modality, rules, text_class, regions)
        return Reading(
            pictures,
            guard(Reason.DAMAGED_HEADER, lambda: _identity(file.dataset, item, rules)),
            KINDS[file.syntax],
            vendor_of(traits.first(file.dataset, "Manufacturer")),
            text or ("found" if declared else ""),
        )


def _modality(file: DicomFile, item: Item, rules: Rules) -> str:
    """What the header says; where that leaves it open, what the folder or the operator says.

    Pixels that cannot be decoded are rejected first: nobody needs to name their modality.
    """
    answer = guard(Reason.DAMAGED_HEADER, lambda: modality_of(file.dataset))
    if isinstance(answer, Reason) and answer is not Reason.UNDECIDED:
        raise Rejected(answer)
    if file.syntax not in KINDS:
        raise Rejected(Reason.NO_DECODER)
    file.check_length()
    if answer is Reason.UNDECIDED:
        answer = item.modality or rules.modality or answer
    if isinstance(answer, Reason):
        raise Rejected(answer)
    return answer


def _images(file: DicomFile, rules: Rules, modality: str) -> Iterator[NDArray[np.uint8]]:
    """The picked frames; of a slide cut into tiles, those that are mostly tissue."""
    count = file.layout.frames
    if modality != "pathology" or count == 1:
        for index in pick_frames(count, rules.frames):
            yield decode_frame(file, index, rules, modality)
        return
    empty = True
    for index in pick_frames(count, rules.tiles):
        tile = decode_frame(file, index, rules, modality)
        if tile.ndim == 2 or find_tissue(tile).mean() >= MIN_TISSUE:
            empty = False
            yield tile
    if empty:
        raise Rejected(Reason.NO_TISSUE)


def _identity(dataset: Dataset, item: Item, rules: Rules) -> str:
    """Whose images these are: PatientID with its issuer, else what the CSV or the study says."""
    patient, issuer, study = (
        str(dataset.get(keyword) or "").strip()
        for keyword in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID")
    )
    if patient:
        return f"dicom:{issuer}\0{patient}"
    return f"study:{study}" if study and not item.patient else identity_of(item, rules)


def _regions(dataset: Dataset) -> list[Box]:
    """The parts of an ultrasound image that show the body, as its machine marked them."""
    boxes = []
    for region in traits.items(dataset, "SequenceOfUltrasoundRegions"):
        corners = [traits.first(region, keyword) for keyword in CORNERS]
        if all(corner.isdecimal() for corner in corners):
            x0, y0, x1, y1 = (int(corner) for corner in corners)
            boxes.append((x0, y0, x1 + 1, y1 + 1))  # the header counts its corners in
    return boxes
