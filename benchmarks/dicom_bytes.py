"""DICOM files and codestreams put together byte by byte, where a library would refuse to."""

import struct
from typing import Final

from pydicom.uid import UID, ExplicitVRLittleEndian

CT_IMAGE: Final = "1.2.840.10008.5.1.4.1.1.2"


def element(tag: int, vr: str, value: bytes | int | str) -> bytes:
    """One element in explicit VR little endian."""
    if isinstance(value, int):
        value = struct.pack("<H", value)
    if isinstance(value, str):
        value = value.encode()
    value += (b"\0" if vr in ("UI", "OB", "OW", "UN") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in ("OB", "OW", "SQ", "UN"):
        return head + b"\0\0" + struct.pack("<I", len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def file_meta(syntax: UID, sop_class: str = CT_IMAGE) -> bytes:
    """Preamble and file meta group."""
    meta = (
        element(0x00020002, "UI", sop_class)
        + element(0x00020003, "UI", "1.2.3.4")
        + element(0x00020010, "UI", syntax)
    )
    length = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta))
    return bytes(128) + b"DICM" + length + meta


def dicom(
    pixels: bytes,
    syntax: UID = ExplicitVRLittleEndian,
    *,
    rows: int = 64,
    columns: int = 64,
    bits: int = 16,
    stored: int | None = None,
    frames: str = "",
    early: bytes = b"",
    extra: bytes = b"",
    fragments: bool | None = None,
) -> bytes:
    """A CT file by hand: `early` elements of group 8 first, `extra` ones just before the pixels."""
    stored = bits if stored is None else stored
    fragments = syntax != ExplicitVRLittleEndian if fragments is None else fragments
    body = element(0x00080016, "UI", CT_IMAGE) + element(0x00080060, "CS", "CT") + early
    body += element(0x00100020, "LO", "HOSTILE") + element(0x00280002, "US", 1)
    body += element(0x00280004, "CS", "MONOCHROME2")
    if frames:
        body += element(0x00280008, "IS", frames)
    for tag, value in ((0x10, rows), (0x11, columns), (0x100, bits), (0x101, stored)):
        body += element(0x00280000 + tag, "US", value)
    body += element(0x00280102, "US", max(stored - 1, 0)) + element(0x00280103, "US", 0) + extra
    if fragments:
        item = b"\xfe\xff\x00\xe0"
        pixels += b"\0" * (len(pixels) % 2)
        body += b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + item + bytes(4)
        body += item + struct.pack("<I", len(pixels)) + pixels if pixels else b""
        body += b"\xfe\xff\xdd\xe0\0\0\0\0"
    else:
        body += element(0x7FE00010, "OW", pixels)
    return file_meta(syntax) + body


def jpeg_segments(rows: int, columns: int, *, sof: int, bits: int = 8) -> tuple[bytes, bytes]:
    """A grey JPEG up to its frame header, and what follows: one Huffman code, a scan of zeros."""
    frame = struct.pack(">BBHBHHB", 0xFF, sof, 11, bits, rows, columns, 1) + b"\x01\x11\x00"
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x00" + b"\x01" + bytes(15) + b"\x00"
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00" + bytes(600) + b"\xff\xd9"
    return b"\xff\xd8" + frame, table + scan


def jpeg(rows: int, columns: int, *, sof: int = 0xC0, bits: int = 8) -> bytes:
    """A whole one; baseline gets its quantisation table."""
    head, tail = jpeg_segments(rows, columns, sof=sof, bits=bits)
    quantisation = b"\xff\xdb\x00\x43\x00" + b"\x01" * 64 if sof == 0xC0 else b""
    return head + quantisation + tail


def jpeg2000(rows: int, columns: int, *, high_throughput: bool = False) -> bytes:
    """A codestream with a size, one tile and no data."""
    siz = struct.pack(">H", 0x4000 if high_throughput else 0)
    siz += struct.pack(">IIIIIIII", columns, rows, 0, 0, 512, 512, 0, 0)
    siz += struct.pack(">HBBB", 1, 15, 1, 1)
    cap = b"\xff\x50\x00\x08\x00\x02\x00\x00\x00\x00" if high_throughput else b""
    cod = b"\xff\x52\x00\x0c\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01"
    qcd = b"\xff\x5c\x00\x13\x40" + b"\x40" * 16
    tile = b"\xff\x90\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x01\xff\x93" + bytes(64)
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(siz) + 2) + siz + cap + cod + qcd + tile
