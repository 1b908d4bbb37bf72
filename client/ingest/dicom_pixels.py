"""One frame of a DICOM file: decoded, its colours turned into RGB, its grey values into a picture.

Each transfer syntax has one decoder, named here; nothing is left to what happens to be installed.
The size that a codestream claims is compared with the header before its decoder sees it.
"""

import io
from typing import Any, Final

import gdcm
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from client.ingest.codestream import Claim, read_claim, rle_segments
from client.ingest.dicom_file import UNCOMPRESSED, DicomFile, guard
from client.ingest.dicom_grey import apply_palette, show_grey
from client.ingest.dicom_layout import Layout
from client.ingest.grey import to_bytes
from client.ingest.types import Reason, Rejected, Rules

KINDS: Final[dict[UID, str]] = {
    ImplicitVRLittleEndian: "DICOM uncompressed",
    ExplicitVRLittleEndian: "DICOM uncompressed",
    ExplicitVRBigEndian: "DICOM big endian",
    DeflatedExplicitVRLittleEndian: "DICOM deflated",
    RLELossless: "DICOM RLE",
    JPEGBaseline8Bit: "DICOM JPEG",
    JPEGExtended12Bit: "DICOM JPEG extended",
    JPEGLossless: "DICOM JPEG lossless",
    JPEGLosslessSV1: "DICOM JPEG lossless",
    JPEGLSLossless: "DICOM JPEG-LS",
    JPEGLSNearLossless: "DICOM JPEG-LS",
    JPEG2000Lossless: "DICOM JPEG 2000",
    JPEG2000: "DICOM JPEG 2000",
    HTJ2KLossless: "DICOM HTJ2K",
    HTJ2KLosslessRPCL: "DICOM HTJ2K",
    HTJ2K: "DICOM HTJ2K",
}
"""The transfer syntaxes we decode, and what a report calls them."""

PLUGINS: Final = {
    "DICOM RLE": "pylibjpeg",
    "DICOM JPEG lossless": "gdcm",
    "DICOM JPEG-LS": "pyjpegls",
    "DICOM JPEG 2000": "pylibjpeg",
    "DICOM HTJ2K": "pylibjpeg",
}
"""pydicom's decoding plugins; both kinds of lossy JPEG are decoded below."""


def decode_frame(file: DicomFile, index: int, rules: Rules, modality: str) -> NDArray[np.uint8]:
    """Decode one frame and show it as a person would see it.

    Colour is RGB. Grey values pass the modality LUT or rescale; CT in Hounsfield units is then
    windowed by `rules.ct_window`, anything else by the file's VOI LUT or first window. Without
    either, 8-bit values are kept and deeper ones stretched between robust percentiles. MONOCHROME1
    is inverted after that, padding is black. A radiograph of the chest is turned head up and the
    patient's left to the right where the header says how it lies; other images stay as stored.

    Args:
        file: From `open_dicom`.
        index: Frame, from 0.
        rules: Holds the CT window.
        modality: Of the seven.

    Returns:
        uint8 [H, W] or [H, W, 3].

    Raises:
        Rejected: The pixels cannot be decoded or shown, with the reason.
    """
    values = stored_values(file, index)
    if values.ndim == 3:
        image = _to_8_bits(values, file.layout.stored)
    elif file.layout.photometric == "PALETTE COLOR":
        image = guard(Reason.DAMAGED_HEADER, lambda: apply_palette(values, file))
    else:
        image = guard(
            Reason.DAMAGED_HEADER, lambda: show_grey(values, file, index, rules, modality)
        )
    if modality == "cxr":
        image = guard(
            Reason.DAMAGED_HEADER, lambda: _upright(image, file.dataset.get("PatientOrientation"))
        )
    return np.ascontiguousarray(image)


def stored_values(file: DicomFile, index: int) -> NDArray[Any]:
    """Decode one frame to its stored values, [H, W], or its colours as RGB, [H, W, 3].

    Only this frame is read and decoded.

    Raises:
        Rejected: NO_DECODER, SIZE_LIE or DAMAGED_PIXELS.
    """
    if file.syntax not in KINDS:
        raise Rejected(Reason.NO_DECODER)
    plugin = PLUGINS.get(KINDS[file.syntax])
    if plugin and plugin not in get_decoder(file.syntax).available_plugins:
        raise Rejected(Reason.NO_DECODER)  # not installed: the file is not to blame
    if file.syntax in UNCOMPRESSED:
        file.stream.seek(file.start)
        return guard(Reason.DAMAGED_PIXELS, lambda: _decode(file, file.stream, index))
    return guard(Reason.DAMAGED_PIXELS, lambda: _decompress(file, file.compressed_frame(index)))


def _decode(file: DicomFile, source: Any, index: int, **changes: Any) -> NDArray[Any]:
    """Decode by pydicom, with options from the checked layout instead of the raw header."""
    layout = file.layout
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": layout.frames,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": file.keyword,
        "pixel_vr": file.vr,
    }
    options |= {"decoding_plugin": PLUGINS.get(KINDS[file.syntax], "")} | changes
    values, _ = get_decoder(file.syntax).as_array(source, index=index, **options)
    return values


def _decompress(file: DicomFile, frame: bytes) -> NDArray[Any]:
    layout = file.layout
    changes: dict[str, Any] = {"number_of_frames": 1}
    if file.syntax == RLELossless:
        if rle_segments(frame) != -(-layout.samples * layout.allocated // 8):
            raise Rejected(Reason.SIZE_LIE)
        return _decode(file, encapsulate([frame]), 0, **changes)
    claim = read_claim(frame)
    if (claim.rows, claim.columns) != (layout.rows, layout.columns):
        raise Rejected(Reason.SIZE_LIE)
    if claim.components != layout.samples or claim.bits > layout.allocated:
        raise Rejected(Reason.SIZE_LIE)
    if file.syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
        return _decode_jpeg(frame, claim, layout)
    if claim.tells_colour and KINDS[file.syntax] in ("DICOM JPEG 2000", "DICOM HTJ2K"):
        changes["photometric_interpretation"] = "RGB"
    return _decode(file, encapsulate([frame]), 0, **changes)


def _decode_jpeg(frame: bytes, claim: Claim, layout: Layout) -> NDArray[Any]:
    """Decode JPEG of 8 bits by Pillow, of 12 by GDCM.

    Not by pydicom: it converts colours twice where an Adobe marker made Pillow do so already, and
    lets GDCM decode no 12-bit JPEG although it does so rightly (equal to libjpeg-turbo's).
    """
    if claim.bits == 8:
        image = Image.open(io.BytesIO(frame), formats=("JPEG",))
        if layout.photometric == "RGB" and not claim.tells_colour:
            image.draft("YCbCr", image.size)  # as stored: Pillow would take unmarked RGB for YCbCr
        return np.array(image)
    if claim.components != 1:
        raise Rejected(Reason.NO_DECODER)
    values = _decode_by_gdcm(frame, claim)
    # Lossy values may exceed the bits that the header counts; GDCM would wrap them to black.
    return np.asarray(np.minimum(values, 2**layout.stored - 1), np.uint16)


def _decode_by_gdcm(frame: bytes, claim: Claim) -> NDArray[np.uint16]:
    """Decode grey JPEG of more than 8 bits."""
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((claim.columns, claim.rows, 1))
    image.SetDataElement(element)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    )
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, claim.bits, claim.bits - 1, 0))
    # Its Python binding returns bytes as text.
    data = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(data, "<u2").reshape(claim.rows, claim.columns)


def _to_8_bits(values: NDArray[Any], stored: int) -> NDArray[np.uint8]:
    if values.dtype == np.uint8 and stored == 8:
        return values
    return to_bytes(values, 0, 2.0**stored - 1)


def _upright(image: NDArray[np.uint8], orientation: object) -> NDArray[np.uint8]:
    """Head up, and seen from in front the patient's left on the right, as radiographs are read.

    Args:
        image: [H, W] or [H, W, 3].
        orientation: PatientOrientation: where rows and columns lead, by their first letters
            left L, right R, anterior A, posterior P, head H, foot F.
    """
    if not isinstance(orientation, MultiValue) or len(orientation) != 2:
        return image
    row, column = (str(value)[:1] for value in orientation)
    if row in ("H", "F") and column in ("L", "R", "A", "P"):
        image, row, column = image.swapaxes(0, 1), column, row
    if row in ("L", "R", "A", "P") and column == "H":
        image = image[::-1]
    if row == "R" and column in ("H", "F"):
        image = image[:, ::-1]
    return image
