"""From stored DICOM values to the grey a person would see, and from palettes to their colours.

Everything is computed once a level, not once a pixel: an image of millions of pixels has at most
65,536 different values, and usually a few thousand.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import ExplicitVRBigEndian

from client.ingest.dicom_file import DicomFile
from client.ingest.grey import robust_range, to_bytes
from client.ingest.types import Reason, Rejected, Rules

Levels = NDArray[np.float64]
HOUNSFIELD: Final = ("", "HU")
"""RescaleType of CT in Hounsfield units; the standard lets it be absent."""
MAX_LEVELS: Final = 65_536


def show_grey(
    values: NDArray[Any], file: DicomFile, index: int, rules: Rules, modality: str
) -> NDArray[np.uint8]:
    """Show one frame of grey values.

    Args:
        values: As stored, [H, W].
        file: Where they are from; its header says how to show them.
        index: Frame they are of.
        rules: Holds the CT window.
        modality: Of the seven.

    Raises:
        Rejected: NOT_FINITE where values or their rescale are not; DAMAGED_HEADER.
    """
    levels, places = _levels(values)
    padding = _is_padding(levels, file)
    shown, is_rescaled, is_hounsfield = _rescale(levels, file, index)
    if not np.isfinite(shown).all():
        raise Rejected(Reason.NOT_FINITE)
    voi = _group(file.dataset, index, "FrameVOILUTSequence")
    window = _window(voi)
    if modality == "ct" and is_hounsfield:
        centre, width = rules.ct_window
        grey = to_bytes(shown, centre - width / 2, centre + width / 2)
    elif voi.get("VOILUTSequence"):
        table, first, bits = _lut(voi.VOILUTSequence[0], "LUTDescriptor", "LUTData", file)
        grey = to_bytes(_look_up(table, first, np.rint(shown)), 0, 2.0**bits - 1)
    elif window:
        grey = _apply_window(shown, *window)
    elif file.layout.stored == 8 and not file.layout.signed and not is_rescaled:
        grey = to_bytes(shown, 0, 255)
    else:
        seen = places if not padding.any() else places[~padding[places]]
        grey = to_bytes(shown, *(robust_range(shown[seen]) if seen.size else (0, 0)))
    if file.layout.photometric == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return np.asarray(grey[places])


def apply_palette(values: NDArray[Any], file: DicomFile) -> NDArray[np.uint8]:
    """Turn indices [H, W] into the colours of the file's palette, [H, W, 3]."""
    levels, places = _levels(values)
    colours = np.empty((levels.size, 3), np.uint8)
    for channel, name in enumerate(("Red", "Green", "Blue")):
        descriptor = f"{name}PaletteColorLookupTableDescriptor"
        data = f"{name}PaletteColorLookupTableData"
        if f"Segmented{data}" in file.dataset:
            data = f"Segmented{data}"
        table, first, _ = _lut(file.dataset, descriptor, data, file)
        # Entries of 16 bits; some files keep 8 bits in them all the same.
        table = table // 256 if table.max() > 255 else table
        colours[:, channel] = _look_up(table, first, levels)
    return np.asarray(colours[places])


def _levels(values: NDArray[Any]) -> tuple[Levels, NDArray[Any]]:
    """The different values in rising order, and which of them each pixel has."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if high - low < MAX_LEVELS:
            # Differences below 2^16 survive arithmetic modulo 2^16, whatever the sign and depth.
            places = values.astype(np.uint16) - np.uint16(low % MAX_LEVELS)
            return np.arange(low, high + 1, dtype=np.float64), places
    different, numbers = np.unique(values, return_inverse=True)
    return different.astype(np.float64), numbers.reshape(values.shape)


def _is_padding(levels: Levels, file: DicomFile) -> NDArray[np.bool_]:
    """Levels that only fill the rectangle around the image."""
    value, limit = (
        _signed(file.dataset.get(keyword), file)
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    if value is None:
        return np.zeros(levels.shape, np.bool_)
    limit = value if limit is None else limit
    return (levels >= min(value, limit)) & (levels <= max(value, limit))


def _signed(value: Any, file: DicomFile) -> int | None:
    """A stored value from the header, which some files write unsigned beside signed pixels."""
    if value is None or value == "":
        return None
    return _with_sign(int(value), file)


def _with_sign(value: int, file: DicomFile) -> int:
    half = 1 << (file.layout.allocated - 1)
    return value - 2 * half if file.layout.signed and value >= half else value


def _group(dataset: Dataset, index: int, name: str) -> Any:
    """What a frame of an enhanced object says, or all its frames share, or the data set itself."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (frames[index : index + 1], shared[:1]):
        for group in groups:
            if items := group.get(name):
                return items[0]
    return dataset


def _rescale(levels: Levels, file: DicomFile, index: int) -> tuple[Levels, bool, bool]:
    """Modality LUT or rescale; whether there was one; whether it gave Hounsfield units."""
    if items := file.dataset.get("ModalityLUTSequence"):
        table, first, _ = _lut(items[0], "LUTDescriptor", "LUTData", file)
        return _look_up(table, first, levels).astype(np.float64), True, False
    group = _group(file.dataset, index, "PixelValueTransformationSequence")
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    if slope is None or intercept is None:
        return levels, False, False
    kind = str(group.get("RescaleType") or "").strip().upper()
    with np.errstate(over="ignore", invalid="ignore"):
        return levels * float(slope) + float(intercept), True, kind in HOUNSFIELD


def _window(voi: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window; none where it shows nothing."""
    pair = []
    for keyword in ("WindowCenter", "WindowWidth"):
        value = voi.get(keyword)
        if isinstance(value, MultiValue):
            value = value[0] if len(value) else None
        if value is None:
            return None
        pair.append(float(value))
    function = str(voi.get("VOILUTFunction") or "LINEAR").strip().upper()
    centre, width = pair
    return (centre, width, function) if width >= (function == "LINEAR") and width > 0 else None


def _apply_window(levels: Levels, centre: float, width: float, function: str) -> NDArray[np.uint8]:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0..255."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return to_bytes(1 / (1 + np.exp(-4 * (levels - centre) / width)), 0, 1)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise Rejected(Reason.DAMAGED_HEADER)
    if width == 0:  # a threshold
        return np.where(levels > centre, 255, 0).astype(np.uint8)
    return to_bytes(levels, centre - width / 2, centre + width / 2)


def _look_up(table: NDArray[np.int64], first: int, levels: Levels) -> NDArray[np.int64]:
    """Entries of a table whose first one is for `first`; its ends hold for what lies outside."""
    return table[np.clip(levels - first, 0, len(table) - 1).astype(np.int64)]


def _lut(
    holder: Dataset, descriptor: str, data: str, file: DicomFile
) -> tuple[NDArray[np.int64], int, int]:
    """A lookup table of the header: its entries, the value of the first, bits of an entry."""
    entries, first, bits = (int(value) for value in holder[descriptor].value)
    entries = entries % MAX_LEVELS or MAX_LEVELS  # 65,536 is written as 0
    if not 1 <= bits <= 16:
        raise Rejected(Reason.DAMAGED_HEADER)
    value = holder[data].value
    order = ">" if file.syntax == ExplicitVRBigEndian else "<"
    if not isinstance(value, bytes):  # read as numbers already
        value, order = np.atleast_1d(np.asarray(value)).astype("<u2").tobytes(), "<"
    wide = bits > 8 if data.startswith("Segmented") else len(value) >= 2 * entries
    words = np.frombuffer(value, f"{order}u2" if wide else "u1", count=len(value) // (1 + wide))
    table = words.astype(np.int64)
    if data.startswith("Segmented"):
        table = _expand(table, entries, wide)
    return table[:entries], _with_sign(first % MAX_LEVELS, file), bits


def _expand(words: NDArray[np.int64], entries: int, wide: bool) -> NDArray[np.int64]:
    """Expand the segments of a palette, DICOM PS3.3 C.7.9.2, to no more than its entries."""
    table: list[int] = []

    def segment(place: int, nested: bool) -> int:
        """Append one segment and return where the next begins."""
        code, length = (int(word) for word in words[place : place + 2])
        place += 2
        if code == 0:
            table.extend(words[place : place + length].tolist())
            return place + length
        if code == 1:
            ramp = np.linspace(table[-1], int(words[place]), length + 1)[1:]
            table.extend(np.rint(ramp).astype(int).tolist())
            return place + 1
        if code != 2 or nested:
            raise Rejected(Reason.DAMAGED_HEADER)
        size = 2 if wide else 4  # words of a byte offset, least significant first
        parts = words[place : place + size].tolist()
        target = sum(part << (32 // size * power) for power, part in enumerate(parts)) // (1 + wide)
        for _ in range(length):
            target = segment(target, nested=True) if len(table) < entries else target
        return place + size

    place = 0
    while place + 1 < len(words) and len(table) < entries:
        place = segment(place, nested=False)
    return np.array(table, np.int64)
