"""How a DICOM header says the pixels are laid out, checked before anything believes it."""

from dataclasses import dataclass
from typing import Final

from pydicom.dataset import Dataset

from client.ingest.types import MAX_FRAME_PIXELS, MIN_SIDE_PX, Reason, Rejected

PHOTOMETRICS: Final = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
DEPTHS: Final = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layout:
    """How the header says the pixels are laid out; checked to be possible."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    allocated: int
    """bits a sample takes"""
    stored: int
    """bits of it that count"""
    signed: bool
    planar: int
    """1: colour by plane"""

    @property
    def frame_bits(self) -> int:
        """Bits of one uncompressed frame."""
        bits = self.rows * self.columns * self.samples * self.allocated
        return bits // 3 * 2 if self.photometric == "YBR_FULL_422" else bits


def read_layout(dataset: Dataset, keyword: str) -> Layout:
    """Read the layout of an image's pixels.

    Args:
        dataset: Header of the image.
        keyword: PixelData, FloatPixelData or DoubleFloatPixelData.

    Raises:
        Rejected: DAMAGED_HEADER where it is impossible; TOO_LARGE; TOO_SMALL; NO_DECODER for
            colours that we do not know. Missing or malformed elements raise what pydicom raises.
    """
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    samples = int(dataset.SamplesPerPixel)
    photometric = str(dataset.PhotometricInterpretation).strip().upper()
    allocated = int(dataset.BitsAllocated)
    is_float = keyword != "PixelData"
    stored = allocated if is_float else int(dataset.BitsStored)
    representation = 1 if is_float else int(dataset.PixelRepresentation)
    layout = Layout(
        rows=rows,
        columns=columns,
        # Zero frames are one: files say so that hold one.
        frames=int(dataset.get("NumberOfFrames") or 1),
        samples=samples,
        photometric=photometric,
        allocated=allocated,
        stored=stored,
        signed=representation == 1,
        planar=int(dataset.get("PlanarConfiguration") or 0),
    )
    possible = (
        rows > 0
        and columns > 0
        and layout.frames > 0
        and samples in PHOTOMETRICS
        and allocated in DEPTHS
        and 1 <= stored <= allocated
        and representation in (0, 1)
        and layout.planar in (0, 1)
    )
    known = {name for names in PHOTOMETRICS.values() for name in names}
    if not possible or (photometric in known and photometric not in PHOTOMETRICS[samples]):
        raise Rejected(Reason.DAMAGED_HEADER)
    if photometric not in known:
        raise Rejected(Reason.NO_DECODER)
    if rows * columns > MAX_FRAME_PIXELS:
        raise Rejected(Reason.TOO_LARGE)
    if min(rows, columns) < MIN_SIDE_PX:
        raise Rejected(Reason.TOO_SMALL)
    return layout
