"""What the parts of `fedmermed-site prepare` hand to each other.

Sources list items; a worker reads one item into a reading; the parent turns its outcome into
pictures of the shard or a counted reason. Nothing here but `Item` and `Reading.identity` may hold
text of a file or a path, and neither is written into a shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from core.modalities import MODALITIES

if TYPE_CHECKING:
    from client.ingest.duplicates import Fingerprint

MIN_SIDE_PX: Final = 16
"""Images with a shorter side hold too little to learn from."""

MAX_FRAME_PIXELS: Final = 150_000_000
"""Larger single frames are refused before they are decoded (mammograms have about 30 million)."""

Policy = Literal["skip", "mask", "accept"]

BURNED_IN_DEFAULTS: Final[dict[str, Policy]] = {
    "declared": "skip",
    "screen": "skip",
    "ultrasound": "mask",
    "photo": "mask",
    "other": "mask",
}
"""Policy for text burned into the pixels, by class of image."""


class Reason(StrEnum):
    """Why a file gives no picture: a closed list, so that no text of a file reaches a report."""

    EMPTY = "empty file"
    UNREADABLE = "cannot be opened or read"
    LINK = "link to a directory, not followed"
    SPECIAL = "not a regular file"
    NOT_AN_IMAGE = "not an image file we know"
    DICOMDIR = "DICOM directory index"
    NO_PIXELS = "DICOM object without pixels"
    DAMAGED_HEADER = "damaged header"
    TRUNCATED = "shorter than its header says"
    DAMAGED_PIXELS = "pixels cannot be decoded"
    NO_DECODER = "compressed in a way we cannot decode"
    SIZE_LIE = "compressed image of another size than its header says"
    TOO_LARGE = "too large"
    TOO_SMALL = "too small"
    CONSTANT = "all pixels equal"
    NOT_FINITE = "values that are not finite"
    OTHER_MODALITY = "not one of the seven modalities"
    UNDECIDED = "modality undecided; name it with --modality or a folder"
    LOCALIZER = "localizer, not an image to learn from"
    BURNED_IN = "text burned into the pixels"
    NO_TISSUE = "slide without tissue"
    EXTRA_MISSING = "reader not installed"
    DUPLICATE = "same image as an earlier one"
    NEAR_DUPLICATE = "nearly the same image as an earlier one"
    TOO_MUCH_MEMORY = "needed more memory than a worker may have"
    TIMED_OUT = "took too long"
    WORKER_DIED = "its decoder crashed"
    READER_FAILED = "reader failed"


class Rejected(Exception):
    """A file gives no picture, for a reason of the closed list."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type["Rejected"], tuple[Reason]]:
        return Rejected, (self.reason,)


@dataclass(frozen=True)
class Item:
    """One file to read, with what its place or a CSV says of it."""

    path: Path
    key: str
    """path relative to its source, with its source's position in front: unique in a run"""
    modality: str | None = None
    label: str = ""
    """class name, or empty"""
    split: str = ""
    """train, val, test, or empty: decided by the patient"""
    patient: str = ""
    """what the CSV calls the patient, or empty"""
    reason: Reason | None = None
    """set where listing it already showed that it cannot be read"""


@dataclass(frozen=True)
class Rules:
    """How files become pictures; a resumed run must have the same."""

    px: int = 64
    """side of the square pictures"""
    modality: str | None = None
    """where neither header nor folder tells"""
    ct_window: tuple[float, float] = (40.0, 400.0)
    """centre and width in Hounsfield units"""
    frames: int = 16
    """most frames of one cine, slices of one volume"""
    tiles: int = 200
    """most tiles of one slide"""
    tile_um_per_px: float = 0.5
    patients: Literal["file", "folder"] = "file"
    """whose a file without a PatientID is: its own patient, or that of the folder it lies in"""
    labels: Literal["none", "folder"] = "none"
    duplicates: Literal["remove", "keep"] = "remove"
    burned_in: Mapping[str, Policy] = field(default_factory=lambda: dict(BURNED_IN_DEFAULTS))

    def __post_init__(self) -> None:
        assert self.modality is None or self.modality in MODALITIES
        assert set(self.burned_in) == set(BURNED_IN_DEFAULTS)


@dataclass(frozen=True)
class Picture:
    """One square picture of the shard to be."""

    pixels: NDArray[np.uint8]
    """[px, px, C] with C 1 or 3"""
    modality: str


@dataclass(frozen=True)
class Reading:
    """What a reader found in one file."""

    pictures: tuple[Picture, ...]
    """at least one"""
    identity: str
    """whose images they are, in clear; hashed before it leaves the worker"""
    kind: str
    """what the file is: 'DICOM JPEG 2000', 'PNG', ... of a closed list"""
    vendor: str = ""
    """of the closed list in vendors, or empty"""
    text: Literal["", "found", "masked"] = ""
    """text burned into the pixels"""


@dataclass(frozen=True)
class Outcome:
    """What became of one file, as its worker tells the parent: no text of the file is in it."""

    reason: Reason | None = None
    """why it gives no picture, or None"""
    note: str = ""
    """type of the exception of a READER_FAILED"""
    pictures: tuple[Picture, ...] = ()
    fingerprints: "tuple[Fingerprint, ...]" = ()
    """one a picture"""
    patient: str = ""
    """key of the patient"""
    kind: str = ""
    vendor: str = ""
    text: Literal["", "found", "masked"] = ""


@dataclass(frozen=True)
class Summary:
    """The counts of a finished run; what report and terminal show."""

    name: str
    pictures: Mapping[tuple[str, str], int]
    """(modality, split) -> pictures in the shard"""
    patients: int
    files: int
    used: int
    """files that gave at least one picture"""
    reasons: Mapping[Reason, int]
    """files that gave none, by reason"""
    duplicate_pictures: Mapping[Reason, int]
    """pictures left out as DUPLICATE or NEAR_DUPLICATE"""
    kinds: Mapping[str, int]
    vendors: Mapping[str, int]
    text: Mapping[str, int]
    """files with 'found' or 'masked' text"""
    seconds: float
    """of this run; a resumed run counts from its resume"""
    read: int
    """files read in this run"""
