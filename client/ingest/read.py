"""Look at a file's first bytes and read it with the reader of its kind.

Suffixes decide nothing but between a slide and the JPEG some slides begin with: exports name files
as they like.
"""

import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from client.ingest.dicom_file import looks_like_dicom
from client.ingest.readers.dicom import read_dicom
from client.ingest.readers.image import read_image
from client.ingest.readers.nifti import read_nifti
from client.ingest.readers.slide import SLIDE_SUFFIXES, is_slide, read_slide
from client.ingest.types import Item, Reading, Reason, Rejected, Rules

HEAD_BYTES: Final = 4096
TIFF_MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BMP_HEADERS: Final = tuple(bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124))

Reader = Callable[[Item, Rules], Reading]


def read(item: Item, rules: Rules) -> Reading:
    """Read one file.

    Args:
        item: From `client.ingest.sources.list_sources`.
        rules: How files become pictures.

    Raises:
        Rejected: it gives no picture, with the reason. Readers of damaged files may raise anything
            else as well; whoever isolates them counts that.
    """
    if item.reason is not None:
        raise Rejected(item.reason)
    return _reader_of(_head(item.path), item, rules)(item, rules)


def _head(path: Path) -> bytes:
    try:
        # A CSV may name a pipe, which would wait for ever when opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise Rejected(Reason.SPECIAL)
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):  # ValueError: a CSV's path holds a zero byte
        raise Rejected(Reason.UNREADABLE) from None
    if not head:
        raise Rejected(Reason.EMPTY)
    return head


def _reader_of(head: bytes, item: Item, rules: Rules) -> Reader:
    if looks_like_dicom(head):
        return read_dicom
    may_be_slide = head.startswith(TIFF_MAGIC) or item.path.suffix.lower() in SLIDE_SUFFIXES
    if may_be_slide and is_slide(item.path, item.modality or rules.modality):
        return read_slide
    if _is_image(head):
        return read_image
    if _is_nifti(head):
        return read_nifti
    raise Rejected(Reason.NOT_AN_IMAGE)


def _is_image(head: bytes) -> bool:
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *TIFF_MAGIC))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        # "BM" alone begins many a text; the size of its second header tells a BMP.
        or (head[:2] == b"BM" and head[14:18] in BMP_HEADERS)
    )


def _is_nifti(head: bytes) -> bool:
    if head.startswith(b"\x1f\x8b"):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:12] == b"n+2\0\r\n\x1a\n"
