"""What a compressed frame claims to be, read from its first markers before anything is decoded.

A decoder believes the codestream, not the DICOM header around it: 64 x 64 pixels may hold a JPEG
that claims 65,500 x 65,500 and takes 16 GB to decode. So the two are compared first. Parsing costs
microseconds, allocates nothing of a claimed size, and never reads past the frame.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from client.ingest.types import Reason, Rejected

JPEG_START: Final = b"\xff\xd8"
J2K_START: Final = b"\xff\x4f\xff\x51"
JP2_START: Final = b"\x00\x00\x00\x0cjP  \r\n\x87\n"

JPEG_FRAMES: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Markers that begin a frame header: all of JPEG, and JPEG-LS."""
SCAN: Final = 0xDA
RGB_IDS: Final = (b"RGB", b"rgb")

SIZE: Final = 0x51
CODING_STYLE: Final = 0x52
TILE: Final = 0x90


@dataclass(frozen=True)
class Claim:
    """Size and depth of a codestream, in its own words."""

    rows: int
    columns: int
    components: int
    bits: int
    """of one sample"""
    tells_colour: bool
    """it says how its colours were transformed, so that a decoder gives RGB of its own accord"""


def read_claim(frame: bytes) -> Claim:
    """Read the claim of a JPEG, JPEG-LS, JPEG 2000 or HTJ2K codestream.

    Args:
        frame: One compressed frame.

    Raises:
        Rejected: DAMAGED_PIXELS where it is none of these, or breaks off before it says its size.
    """
    try:
        if frame.startswith(JPEG_START):
            return _read_jpeg(frame)
        if frame.startswith(JP2_START):
            frame = frame[_find_codestream(frame) :]
        if frame.startswith(J2K_START):
            return _read_j2k(frame)
    except (struct.error, IndexError):
        pass
    raise Rejected(Reason.DAMAGED_PIXELS)


def rle_segments(frame: bytes) -> int:
    """How many byte planes an RLE frame claims to hold.

    Raises:
        Rejected: DAMAGED_PIXELS where the frame is shorter than its header.
    """
    if len(frame) < 64:
        raise Rejected(Reason.DAMAGED_PIXELS)
    return int(struct.unpack_from("<L", frame)[0])


def _segments(frame: bytes, last: int) -> Iterator[tuple[int, bytes]]:
    """Markers and what they hold, from the third byte up to and with the marker `last`."""
    place = 2
    while True:
        if frame[place] != 0xFF:
            raise Rejected(Reason.DAMAGED_PIXELS)
        marker = frame[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        (length,) = struct.unpack_from(">H", frame, place + 2)
        yield marker, frame[place + 4 : place + 2 + length]
        if marker == last:
            return
        place += 2 + length


def _read_jpeg(frame: bytes) -> Claim:
    headers, marked = [], False
    for marker, body in _segments(frame, SCAN):
        if marker in JPEG_FRAMES:
            headers.append(body)
        marked |= marker == 0xE0 and body.startswith(b"JFIF")
        marked |= marker == 0xEE and body.startswith(b"Adobe")
    if len(headers) != 1:  # which of two a decoder would believe is anyone's guess
        raise Rejected(Reason.DAMAGED_PIXELS)
    bits, rows, columns, components = struct.unpack_from(">BHHB", headers[0])
    marked |= headers[0][6:15:3] in RGB_IDS
    return Claim(rows, columns, components, bits, marked)


def _read_j2k(frame: bytes) -> Claim:
    claim = None
    transformed = False
    for marker, body in _segments(frame, TILE):
        if marker == SIZE:
            right, bottom, left, top = struct.unpack_from(">4L", body, 2)
            (components,) = struct.unpack_from(">H", body, 34)
            claim = (bottom - top, right - left, components, (body[36] & 0x7F) + 1)
        elif marker == CODING_STYLE:
            transformed = body[4] == 1
    if claim is None:
        raise Rejected(Reason.DAMAGED_PIXELS)
    return Claim(*claim, transformed)


def _find_codestream(frame: bytes) -> int:
    """Offset of the codestream inside JP2 boxes, which DICOM forbids and files hold."""
    place = 0
    while True:
        length, name = struct.unpack_from(">L4s", frame, place)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", frame, place + 8)
            header = 16
        if name == b"jp2c":
            return place + header
        if length < header:
            raise Rejected(Reason.DAMAGED_PIXELS)
        place += length
