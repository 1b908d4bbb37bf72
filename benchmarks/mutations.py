"""Ways to damage image files: each takes bytes and a generator, and gives other bytes.

Header edits go through pydicom, so that the file stays DICOM and only says what its pixels are not;
everything else damages bytes wherever they are, or where the format keeps lengths.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Final

import pydicom
from numpy.random import Generator
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag

warnings.filterwarnings("ignore", module="pydicom")  # of what the seeds are, and mutations more so

Mutation = Callable[[bytes, Generator], bytes]

EXTREMES: Final = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    2**32 - 1,
)
SHORT_VR: Final = re.compile(rb"(?:CS|DA|DS|IS|LO|PN|SH|TM|UI|US|SS|UL|FD|AT)(?=[\x00-\xff]{2})")
CODESTREAM: Final = re.compile(rb"\xff\xd8\xff|\xff\x4f\xff\x51|\xe0\x7f\x10\x00O[BW]")

SYNTAXES: Final = (
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"),
    *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 100, 201, 203)),
    *("1.2.840.10008.1.2.1.99", "1.2.3.4", "", "x"),
)
PHOTOMETRIC: Final = (
    *("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422"),
    *("YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "ARGB", "", "?"),
)
NUMBERS: Final = (
    "0",
    "-1",
    "1",
    "2",
    "1e308",
    "-1e-320",
    "nan",
    "inf",
    "2147483647",
    "99999999999",
)
NUMBERS_TEXT: Final = (*NUMBERS, "", " ", "abc", "1\\2\\3", "\\" * 50, "0.0000000001")
WORDS: Final = (0, 1, 2, 3, 7, 8, 12, 13, 16, 17, 32, 60, 64, 255, 1024, 32768, 65535)
CT_IMAGE: Final = "1.2.840.10008.5.1.4.1.1.2"

EDITS: Final[tuple[tuple[int, str, Sequence[object]], ...]] = (
    (0x00280010, "US", WORDS),  # Rows
    (0x00280011, "US", WORDS),  # Columns
    (0x00280008, "IS", NUMBERS_TEXT),  # NumberOfFrames
    (0x00280100, "US", WORDS),  # BitsAllocated
    (0x00280101, "US", WORDS),  # BitsStored
    (0x00280102, "US", WORDS),  # HighBit
    (0x00280103, "US", (0, 1, 2, 65535)),  # PixelRepresentation
    (0x00280002, "US", (0, 1, 2, 3, 4, 65535)),  # SamplesPerPixel
    (0x00280006, "US", (0, 1, 2, 65535)),  # PlanarConfiguration
    (0x00280004, "CS", PHOTOMETRIC),
    (0x00280120, "US", WORDS),  # PixelPaddingValue
    (0x00281050, "DS", NUMBERS_TEXT),  # WindowCenter
    (0x00281051, "DS", NUMBERS_TEXT),  # WindowWidth
    (0x00281052, "DS", NUMBERS_TEXT),  # RescaleIntercept
    (0x00281053, "DS", NUMBERS_TEXT),  # RescaleSlope
    (0x00281056, "CS", ("SIGMOID", "LINEAR_EXACT", "", "?")),  # VOILUTFunction
    (0x00281101, "US", (0, 1, 65535)),  # palette descriptor, one value of three
    (0x00281201, "OW", (b"", b"\0", b"\xff" * 7, b"\x01\x00" * 300)),  # red palette
    (0x00080005, "CS", ("ISO_IR 100", "ISO 2022 IR 87", "GB18030", "nonsense", "\\\\\\")),
    (0x00080060, "CS", ("CT", "US", "DX", "OPT", "SM", "XC", "", "nonsense")),
    (0x00080016, "UI", (CT_IMAGE, "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3", "", "a.b")),
    (0x00280301, "CS", ("YES", "NO", "MAYBE")),  # BurnedInAnnotation
    (0x00480006, "UL", (0, 1, 2**31, 2**32 - 1)),  # TotalPixelMatrixColumns
)
FORMATS: Final = {"US": "<H", "UL": "<I"}


def flip(data: bytes, draws: Generator) -> bytes:
    """Change a few bytes, half of the time within the first two kilobytes."""
    changed = bytearray(data)
    reach = min(len(data), 2048) if draws.random() < 0.5 else len(data)
    for at in draws.integers(0, max(reach, 1), int(draws.integers(1, 32))):
        if at < len(changed):
            changed[at] = int(draws.integers(0, 256))
    return bytes(changed)


def truncate(data: bytes, draws: Generator) -> bytes:
    """Cut the end off."""
    return data[: int(draws.integers(0, len(data) + 1))]


def swap(data: bytes, draws: Generator) -> bytes:
    """Exchange two pieces."""
    a, b, c, d = sorted(int(at) for at in draws.integers(0, len(data) + 1, 4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def repeat(data: bytes, draws: Generator) -> bytes:
    """Put a piece in twice, or leave it out."""
    a, b = sorted(int(at) for at in draws.integers(0, len(data) + 1, 2))
    b = min(b, a + 65_536)
    return data[:b] + data[a:] if draws.random() < 0.5 else data[:a] + data[b:]


def length_field(data: bytes, draws: Generator) -> bytes:
    """Write an extreme number where DICOM keeps a short element's length."""
    places = [match.end() for match in SHORT_VR.finditer(data, 128, 65_536)]
    if not places:
        return any_number(data, draws)
    at = places[int(draws.integers(len(places)))]
    number = EXTREMES[int(draws.integers(len(EXTREMES)))] & 0xFFFF
    return data[:at] + struct.pack("<H", number) + data[at + 2 :]


def any_number(data: bytes, draws: Generator) -> bytes:
    """Write an extreme number of 2 or 4 bytes anywhere, in either order of bytes."""
    number = EXTREMES[int(draws.integers(len(EXTREMES)))]
    order = "<" if draws.random() < 0.5 else ">"
    field = struct.pack(order + "H", number & 0xFFFF)
    if draws.random() < 0.5:
        field = struct.pack(order + "I", number)
    reach = min(len(data), 1024) if draws.random() < 0.7 else len(data)
    at = int(draws.integers(0, max(reach, 1)))
    return data[:at] + field + data[at + len(field) :]


def codestream(data: bytes, draws: Generator) -> bytes:
    """Change bytes where a compressed image begins, where its tables are."""
    starts = [match.start() for match in CODESTREAM.finditer(data)]
    if not starts:
        return flip(data, draws)
    start = starts[int(draws.integers(len(starts)))]
    changed = bytearray(data)
    for offset in draws.integers(2, 700, int(draws.integers(1, 8))):
        if start + offset < len(changed):
            changed[start + offset] = int(draws.integers(0, 256))
    return bytes(changed)


def edit_header(data: bytes, draws: Generator) -> bytes:
    """Let one to three elements of a DICOM header say something else than the pixels."""
    edits = []
    for _ in range(int(draws.integers(1, 4))):
        tag, vr, values = EDITS[int(draws.integers(len(EDITS)))]
        value = values[int(draws.integers(len(values)))]
        edits.append((tag, _encoded(vr, value), vr))
    return edited(data, edits) or flip(data, draws)


def other_syntax(data: bytes, draws: Generator) -> bytes:
    """Name another transfer syntax than the pixels are in, without touching anything else."""
    found = re.search(rb"\x02\x00\x10\x00UI(..)", data[:4096], re.DOTALL)
    if found is None:
        return flip(data, draws)
    value = SYNTAXES[int(draws.integers(len(SYNTAXES)))].encode()
    value += b"\0" * (len(value) % 2)
    end = found.end() + struct.unpack("<H", found[1])[0]
    return data[: found.end() - 2] + struct.pack("<H", len(value)) + value + data[end:]


MUTATIONS: Final[tuple[Mutation, ...]] = (
    *(flip, truncate, swap, repeat, length_field, any_number, codestream),
    *(codestream, edit_header, edit_header, edit_header, other_syntax),
)
"""In the shares in which they are drawn."""


def splice(first: bytes, second: bytes, draws: Generator) -> bytes:
    """The beginning of one file and the end of another."""
    cut = int(draws.integers(0, len(first) + 1))
    return first[:cut] + second[int(draws.integers(0, len(second) + 1)) :]


def mutate(seeds: Sequence[bytes], number: int, draws: Generator) -> bytes:
    """A damaged copy of one seed; every fifth has been damaged twice, every tenth is a splice."""
    data = seeds[number]
    if draws.random() < 0.1:
        return splice(data, seeds[int(draws.integers(len(seeds)))], draws)
    for _ in range(1 + (draws.random() < 0.2)):
        data = MUTATIONS[int(draws.integers(len(MUTATIONS)))](data, draws)
    return data


def edited(data: bytes, edits: Sequence[tuple[int, bytes, str]]) -> bytes | None:
    """A DICOM file with some elements replaced as they are, or None where it cannot be written."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        implicit, little = dataset.original_encoding
        for tag, value, vr in edits:
            where: BaseTag = Tag(tag)
            dataset[where] = RawDataElement(
                where, vr, len(value), value, 0, bool(implicit), bool(little), True
            )
        out = io.BytesIO()
        pydicom.dcmwrite(out, dataset)
        return out.getvalue()
    except Exception:  # the seed is damaged itself, in any way there is
        return None


def _encoded(vr: str, value: object) -> bytes:
    if isinstance(value, int):
        return struct.pack(FORMATS[vr], value)
    data = value if isinstance(value, bytes) else str(value).encode()
    return data + (b"\0" if vr in ("UI", "OW") else b" ") * (len(data) % 2)
