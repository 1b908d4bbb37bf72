"""Files made to break a reader, each with the outcomes that are right for it.

Codestreams that claim 65,500 x 65,500 pixels, bombs of every compression, decoders that abort or
panic, headers without end, links and pipes that never finish, and names that are no names.
"""

import os
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from dicom_bytes import dicom, element, file_meta, jpeg, jpeg2000, jpeg_segments
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

PICTURE: Final = ""
"""Stands for a file that gives pictures, among the reasons why others give none."""
MEBIBYTE: Final = b"\0" * 2**20

SIZE: Final = ("SIZE_LIE", "TOO_LARGE")
PIXELS: Final = ("DAMAGED_PIXELS", "SIZE_LIE", "TRUNCATED", "NO_DECODER")
CRASH: Final = (*PIXELS, "WORKER_DIED", "READER_FAILED")
HEADER: Final = ("DAMAGED_HEADER", "NO_PIXELS", "TOO_SMALL", *PIXELS, "TOO_LARGE")
BOMB: Final = ("TOO_LARGE", "TOO_MUCH_MEMORY", "TIMED_OUT", *PIXELS, "DAMAGED_HEADER")
ANY: Final = (PICTURE, "CONSTANT", "NOT_FINITE", "READER_FAILED", "WORKER_DIED", *HEADER, *BOMB)
UNKNOWN: Final = ("NOT_AN_IMAGE", "DAMAGED_HEADER", "NO_PIXELS")

Crafted = dict[str, tuple[bytes, tuple[str, ...]]]
"""Name -> content, and the names of the reasons that are right."""


def write_hostile(directory: Path) -> dict[str, tuple[str, ...]]:
    """Write them all; path relative to the directory -> names of the reasons that are right."""
    files = {**decoders(), **bombs(), **headers(), **strangers()}
    for name, (data, _) in files.items():
        (directory / name).write_bytes(data)
    return {name: right for name, (_, right) in files.items()} | write_special(directory)


def good_pixels() -> bytes:
    """A 64 x 64 image of 16 bits that is worth a picture."""
    return np.random.default_rng(0).integers(900, 1300, (64, 64)).astype("<u2").tobytes()


def decoders() -> Crafted:
    """Codestreams that make a decoder take all memory, abort, or panic."""
    vast = 65_500
    head, tail = jpeg_segments(64, 64, sof=0xC3)
    rows = b"\x81\x00" * 32
    one_run_too_many = struct.pack("<16I", 2, 64, 130, *([0] * 13)) + rows + b"\x81\x00" + rows
    offsets = struct.pack("<16I", 15, *([0x7FFFFFFF] * 15)) + bytes(64)
    jpeg_ls = jpeg(vast, vast, sof=0xF7, bits=8)
    return {
        "jpeg-65500.dcm": (dicom(jpeg(vast, vast), JPEGBaseline8Bit, bits=8), SIZE),
        "jpeg-lossless-65500.dcm": (
            dicom(jpeg(vast, vast, sof=0xC3), JPEGLosslessSV1, bits=8),
            SIZE,
        ),
        "jpeg-ls-65500.dcm": (dicom(jpeg_ls, JPEGLSLossless, bits=8), SIZE),
        "jpeg2000-65500.dcm": (dicom(jpeg2000(vast, vast), JPEG2000Lossless), SIZE),
        "htj2k-65500.dcm": (
            dicom(jpeg2000(vast, vast, high_throughput=True), HTJ2KLossless),
            SIZE,
        ),
        "jpeg-65500-in-both.dcm": (
            dicom(jpeg(vast, vast), JPEGBaseline8Bit, bits=8, rows=vast, columns=vast),
            SIZE,
        ),
        # GDCM aborts where a marker lost its first byte or turned into a restart, and reads past
        # its tables (a segmentation fault) at an impossible depth.
        "jpeg-lossless-marker.dcm": (
            dicom(head + b"\x87" + tail[1:], JPEGLosslessSV1, bits=8),
            CRASH,
        ),
        "jpeg-lossless-restart.dcm": (
            dicom(head + b"\xff\xd4" + tail[2:], JPEGLosslessSV1, bits=8),
            CRASH,
        ),
        "jpeg-lossless-depth.dcm": (
            dicom(jpeg(64, 64, sof=0xC3, bits=0xC2), JPEGLosslessSV1, bits=8),
            CRASH,
        ),
        "rle-panic.dcm": (dicom(one_run_too_many, RLELossless), CRASH),
        "rle-offsets.dcm": (dicom(offsets, RLELossless), CRASH),
        "no-fragment.dcm": (dicom(b"", JPEGBaseline8Bit, bits=8), (*CRASH, "NO_PIXELS")),
    }


def deflated(chunks: Iterable[bytes], bits: int = -15) -> bytes:
    """Compress a stream that is never whole in memory."""
    packer = zlib.compressobj(9, zlib.DEFLATED, bits)
    return b"".join([packer.compress(chunk) for chunk in chunks]) + packer.flush()


def zeros(mebibytes: int, first: bytes = b"") -> Iterator[bytes]:
    """A head, and then so much of nothing."""
    yield first
    for _ in range(mebibytes):
        yield MEBIBYTE


def bombs() -> Crafted:
    """Few bytes that inflate to hundreds of megabytes."""
    header = dicom(b"")[len(file_meta(ExplicitVRLittleEndian)) : -12]
    huge = header + b"\x11\x00\x10\x00UN\0\0" + struct.pack("<I", 400 * 2**20)
    small, large = struct.pack(">II", 64, 64), struct.pack(">II", 50_000, 50_000)
    grey, bilevel = b"\x08\x00\x00\x00\x00", b"\x01\x00\x00\x00\x00"
    nothing = deflated(zeros(300), 15)
    fine = zlib.compress(b"".join(b"\0" + bytes(range(64)) for _ in range(64)))
    text = b"comment\0\0" + nothing
    start, end = b"\x89PNG\r\n\x1a\n", _chunk(b"IEND", b"")
    return {
        "deflate-400-MiB.dcm": (
            file_meta(DeflatedExplicitVRLittleEndian) + deflated(zeros(400, huge)),
            BOMB,
        ),
        "size-50000.png": (
            start + _chunk(b"IHDR", large + bilevel) + _chunk(b"IDAT", nothing) + end,
            BOMB,
        ),
        "data-300-MiB.png": (
            start + _chunk(b"IHDR", small + grey) + _chunk(b"IDAT", nothing) + end,
            (*BOMB, "CONSTANT"),
        ),
        "text-300-MiB.png": (
            start
            + _chunk(b"IHDR", small + grey)
            + _chunk(b"zTXt", text)
            + _chunk(b"IDAT", fine)
            + end,
            (*BOMB, PICTURE),
        ),
        "size-65500.jpg": (jpeg(65_500, 65_500), BOMB),
        "size-60000.tif": (_tiff(60_000, next_directory=0), BOMB),
        "directory-loop.tif": (_tiff(64, next_directory=8), (*ANY, "NOT_AN_IMAGE")),
        "volume-600-MiB.nii.gz": (_nifti_gz((512, 512, 1200), 600), (*BOMB, "CONSTANT")),
        "volume-32767.nii.gz": (_nifti_gz((32_767,) * 3, 8), BOMB),
        "not-a-volume.gz": (deflated(zeros(64), 31), (*BOMB, *UNKNOWN)),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _tiff(side: int, next_directory: int) -> bytes:
    entries = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 200), (277, 3, 1), (278, 4, side), (279, 4, side * side)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + table
    head += struct.pack("<I", next_directory)
    return head.ljust(200, b"\0") + bytes(range(64)) * 64


def _nifti_gz(shape: tuple[int, int, int], mebibytes: int) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i8h", header, 0, 348, *[0] * 8)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    # A gzip file may be several in a row.
    return deflated([bytes(header)], 31) + deflated(zeros(8), 31) * (mebibytes // 8)


def nested(depth: int) -> bytes:
    """Sequences inside sequences, of undefined length."""
    opening = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    return opening * depth + closing * depth


def headers() -> Crafted:
    """DICOM headers that lie about size and number, or have no end."""
    good, most = good_pixels(), "2147483647"
    tiny = b"".join(element(0x00110000 + at, "LO", "") for at in range(0x1000, 0xFFFF)) * 8
    window = element(0x00281050, "DS", "nan") + element(0x00281051, "DS", "-0")
    slope = element(0x00281052, "DS", "1e308") + element(0x00281053, "DS", "1e308")
    many = element(0x00280030, "UN", b"1\\" * 3_000_000)
    return {
        "frames-most.dcm": (dicom(good, frames=most), (*HEADER, PICTURE)),
        "frames-most-jpeg.dcm": (
            dicom(jpeg(64, 64), JPEGBaseline8Bit, bits=8, frames=most),
            (*HEADER, *CRASH, "CONSTANT", PICTURE),
        ),
        "frames-zero.dcm": (dicom(good, frames="0"), (*HEADER, PICTURE)),
        "frames-negative.dcm": (dicom(good, frames="-5"), (*HEADER, PICTURE)),
        "size-65535.dcm": (dicom(good, rows=65_535, columns=65_535), SIZE + PIXELS),
        "size-zero.dcm": (dicom(good, rows=0), HEADER),
        "bits-13.dcm": (dicom(good, bits=13), HEADER),
        "bits-stored-60.dcm": (dicom(good, stored=60), HEADER),
        "pixels-empty.dcm": (dicom(b""), HEADER),
        "sequences-1000.dcm": (dicom(good, early=nested(1_000)), ANY),
        "sequences-50000.dcm": (dicom(good, early=nested(50_000)), ANY),
        "elements-500000.dcm": (dicom(good, extra=tiny), ANY),
        "values-3000000.dcm": (dicom(good, extra=many), ANY),
        "window-nan.dcm": (dicom(good, extra=window), ANY),
        "slope-1e308.dcm": (dicom(good, extra=slope), ANY),
        "good.dcm": (dicom(good), (PICTURE,)),
    }


def strangers() -> Crafted:
    """What else lies in an export folder."""
    noise = np.random.default_rng(1).bytes(4096)
    page = b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>"
    return {
        "page.dcm": (page, UNKNOWN),
        "archive.zip": (b"PK\x03\x04" + noise, UNKNOWN),
        "noise.dcm": (noise, UNKNOWN),
        "empty.dcm": (b"", ("EMPTY",)),
        "preamble.dcm": (bytes(128) + b"DICM", (*UNKNOWN, "EMPTY")),
        "DICOMDIR": (
            file_meta(ExplicitVRLittleEndian, "1.2.840.10008.1.3.10"),
            ("DICOMDIR", "NO_PIXELS", "DAMAGED_HEADER"),
        ),
        "meta-only.dcm": (file_meta(ExplicitVRLittleEndian), UNKNOWN),
        "core": (b"\x7fELF" + noise, UNKNOWN),
    }


def write_special(directory: Path) -> dict[str, tuple[str, ...]]:
    """Pipes, devices, sockets, loops, files nobody may read, and odd names of good files."""
    os.mkfifo(directory / "pipe.dcm")
    (directory / "device.dcm").symlink_to("/dev/zero")
    (directory / "nowhere.dcm").symlink_to("missing")
    (directory / "circle.dcm").symlink_to("circle.dcm")
    (directory / "deep").mkdir()
    (directory / "deep" / "loop").symlink_to(directory, target_is_directory=True)
    descriptor = os.open(directory, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as ears:
        ears.bind(f"/proc/self/fd/{descriptor}/socket.dcm")  # a whole path may be too long
    os.close(descriptor)
    good = dicom(good_pixels())
    right = {
        "pipe.dcm": ("SPECIAL",),
        "device.dcm": ("SPECIAL",),
        "nowhere.dcm": ("UNREADABLE", "LINK", "SPECIAL"),
        "circle.dcm": ("UNREADABLE", "LINK", "SPECIAL"),
        "deep/loop": ("LINK",),
        "socket.dcm": ("SPECIAL",),
    }
    if os.geteuid() != 0:  # root may read everything
        (directory / "secret.dcm").write_bytes(good)
        (directory / "secret.dcm").chmod(0)
        right["secret.dcm"] = ("UNREADABLE",)
    odd = [b"caf\xe9.dcm", b"new\nline.dcm", b"<script>alert(1)<.dcm", b"=1+1.dcm", b"\x1b[2J.dcm"]
    for name in (*odd, b"x" * 251 + b".dcm", b"[bold]markup[.dcm", b"'; DROP TABLE items;--.dcm"):
        (directory / os.fsdecode(name)).write_bytes(good)
        right[os.fsdecode(name)] = (PICTURE,)
    return right
