"""Open a DICOM file without trusting it: its header as a data set, its pixels left on the disk.

Nothing is decoded here. Sizes that the header claims are checked against the file, deflated files
are inflated under a limit, and whatever a parser raises becomes a named reason.
"""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final, TypeVar, cast

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from client.ingest.dicom_layout import Layout, read_layout
from client.ingest.types import Reason, Rejected

T = TypeVar("T")

HEAD_BYTES: Final = 132
UNREAD_BYTES: Final = 64 * 2**20
"""Larger elements stay on the disk: private raw data, not the header of an image."""
MIN_CHECKED: Final = 64 * 2**10
"""Reads of less need no check: they cost no memory."""
READ_AT_ONCE: Final = 2**20
MAX_INFLATED: Final = 512 * 2**20
INFLATED_FREE: Final = 16 * 2**20
MAX_RATIO: Final = 200
"""Real images deflate to a hundredth at most; zlib's bombs reach a thousand."""
MAX_FRAGMENTS: Final = 1_000_000

PIXEL_KEYWORDS: Final = {
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
    0x7FE00010: "PixelData",
}
DIRECTORY_RECORDS: Final = frozenset({0x00041220})
UNDEFINED: Final = 0xFFFFFFFF
ITEM: Final = b"\xfe\xff\x00\xe0"
SEQUENCE_END: Final = b"\xfe\xff\xdd\xe0"

VALUE_TYPES: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT OB OW PN SH SL SQ SS ST TM "
                               b"UC UI UL UN UR US UT".split())  # fmt: skip
UNCOMPRESSED: Final = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)


@dataclass(frozen=True)
class DicomFile:
    """An open DICOM file that has pixels."""

    dataset: Dataset
    """everything before the pixels"""
    stream: BinaryIO
    syntax: UID
    keyword: str
    """of the pixel element"""
    vr: str | None
    start: int
    """where its value begins in the stream"""
    length: int
    """as it says, or UNDEFINED"""
    size: int
    """bytes of the stream"""

    @cached_property
    def layout(self) -> Layout:
        """The layout of its pixels.

        Raises:
            Rejected: DAMAGED_HEADER, TOO_LARGE or TOO_SMALL; NO_DECODER for colours that we do not
                know.
        """
        return guard(Reason.DAMAGED_HEADER, lambda: read_layout(self.dataset, self.keyword))

    @cached_property
    def fragments(self) -> list[tuple[int, int]]:
        """Where the pieces of compressed pixels begin, and their lengths.

        Raises:
            Rejected: TRUNCATED where one is cut off or there are fewer than frames; DAMAGED_PIXELS
                where there are no pieces at all, but other bytes; TOO_LARGE for millions of them.
        """
        place, pieces = self.start, []
        while place < self.size:
            head = self._read(place, 8)
            if head[:4] == SEQUENCE_END:
                break
            if len(head) == 8 and head[:4] != ITEM:
                raise Rejected(Reason.DAMAGED_PIXELS)
            pieces.append((place + 8, int.from_bytes(head[4:], "little")))
            place += 8 + pieces[-1][1]
            if len(pieces) > MAX_FRAGMENTS:
                raise Rejected(Reason.TOO_LARGE)
        pieces = pieces[1:]  # the first holds a table of offsets
        if place > self.size or len(pieces) < self.layout.frames:
            raise Rejected(Reason.TRUNCATED)
        return pieces

    def check_length(self) -> None:
        """See that the pixels are all there.

        Raises:
            Rejected: TRUNCATED where they are not; DAMAGED_HEADER where uncompressed pixels have no
                length.
        """
        if self.syntax not in UNCOMPRESSED:
            _ = self.fragments
            return
        if self.length == UNDEFINED:
            raise Rejected(Reason.DAMAGED_HEADER)
        have = min(self.length, self.size - self.start)
        if have * 8 < self.layout.frame_bits * self.layout.frames:
            raise Rejected(Reason.TRUNCATED)

    def compressed_frame(self, index: int) -> bytes:
        """One frame of compressed pixels, its pieces joined."""
        pieces = self.fragments
        if self.layout.frames == 1:
            return b"".join(self._read(*piece) for piece in pieces)
        if len(pieces) == self.layout.frames:
            return self._read(*pieces[index])
        tables = [self.dataset.get(f"ExtendedOffsetTable{end}") for end in ("", "Lengths")]
        self.stream.seek(self.start)
        return get_frame(
            self.stream,
            index,
            number_of_frames=self.layout.frames,
            extended_offsets=(tables[0], tables[1]) if all(tables) else None,
        )

    def _read(self, place: int, length: int) -> bytes:
        self.stream.seek(place)
        return self.stream.read(length)


class _Reader(io.BufferedReader):
    """A file that is not asked for more than it holds.

    Python sets memory aside for all that is asked for, and a damaged length asks for 4 GB.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size and size > READ_AT_ONCE and size > os.fstat(self.fileno()).st_size - self.tell():
            raise Rejected(Reason.TRUNCATED)
        return super().read(size)


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes are those of a DICOM file, with or without its preamble."""
    if head[128:132] == b"DICM":
        return True
    explicit = head[4:6] in VALUE_TYPES
    if head[:2] == b"\0\x08":  # big endian
        return explicit
    short = int.from_bytes(head[4:8], "little") <= 256
    return head[:2] in (b"\x02\0", b"\x08\0") and len(head) > 8 and (explicit or short)


@contextmanager
def open_dicom(path: Path) -> Iterator[DicomFile]:
    """Open a DICOM file for as long as the context lasts.

    Args:
        path: Any file at all.

    Raises:
        Rejected: with the reason why it has no pixels to read. Layout and length of the pixels are
            checked on request, so that a file which its header rules out costs no more.
    """
    with guard(Reason.UNREADABLE, lambda: _Reader(io.FileIO(path))) as file:
        yield guard(Reason.DAMAGED_HEADER, lambda: _open(file))


def guard(reason: Reason, step: Callable[[], T]) -> T:
    """Do a step on damaged bytes, which may raise anything, and name what it raises.

    Raises:
        Rejected: `reason`, or what the step itself rejected.
        MemoryError: The step's; what needs too much memory may be sound.
    """
    try:
        return step()
    except (Rejected, MemoryError):
        raise
    except BaseException as error:
        # A panic of a decoder written in Rust is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise Rejected(reason) from None  # their texts quote values
        raise


def _open(file: BinaryIO) -> DicomFile:
    head = file.read(HEAD_BYTES)
    if not head:
        raise Rejected(Reason.EMPTY)
    if not looks_like_dicom(head):
        raise Rejected(Reason.NOT_AN_IMAGE)
    if head[128:] != b"DICM":
        file.seek(0)
    meta = read_dataset(
        _bounded(file), False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2
    )
    syntax = meta.get("TransferSyntaxUID")
    stream: BinaryIO = file
    if syntax == DeflatedExplicitVRLittleEndian:
        stream = io.BytesIO(_inflate(file.read()))
    if not syntax:
        syntax = _guess_syntax(stream)
    size = _size(stream)
    found: list[tuple[int, str | None, int, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        place = stream.tell()
        if tag in PIXEL_KEYWORDS:
            found.append((tag, vr, length, place))
            return True
        if tag in DIRECTORY_RECORDS:  # comparing tags is slow, looking them up is not
            raise Rejected(Reason.DICOMDIR)
        if length != UNDEFINED and place + length > size:
            raise Rejected(Reason.TRUNCATED)
        return False

    dataset = read_dataset(
        _bounded(stream),
        syntax == ImplicitVRLittleEndian,
        syntax != ExplicitVRBigEndian,
        stop_when=at_pixels,
        defer_size=UNREAD_BYTES,
    )
    if not found:
        raise Rejected(Reason.NO_PIXELS if "SOPClassUID" in dataset else Reason.DAMAGED_HEADER)
    dataset.file_meta = FileMetaDataset(meta)
    tag, vr, length, start = found[-1]
    return DicomFile(dataset, stream, UID(syntax), PIXEL_KEYWORDS[tag], vr, start, length, size)


class _Bounded:
    """Refuses to read what lies behind the end.

    pydicom believes the lengths inside sequences, and Python sets memory aside before it reads.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.tell, self.seek = stream.tell, stream.seek
        self._stream, self._size = stream, _size(stream)

    def read(self, length: int = -1) -> bytes:
        if length > MIN_CHECKED and length > self._size - self.tell():
            raise Rejected(Reason.TRUNCATED)
        return self._stream.read(length)


def _bounded(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _Bounded(stream))


def _size(stream: BinaryIO) -> int:
    place = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(place)
    return size


def _inflate(data: bytes) -> bytes:
    """Inflate a data set, but not a bomb."""
    limit = min(MAX_INFLATED, INFLATED_FREE + MAX_RATIO * len(data))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, limit)
    if inflater.unconsumed_tail and not inflater.eof:
        raise Rejected(Reason.TOO_LARGE)
    if not inflater.eof:
        raise Rejected(Reason.TRUNCATED)
    return inflated


def _guess_syntax(stream: BinaryIO) -> UID:
    """How a data set is encoded that does not say: it can only be uncompressed."""
    head = stream.read(6)
    stream.seek(-len(head), os.SEEK_CUR)
    if head[4:6] not in VALUE_TYPES:
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if head[0] == 0 else ExplicitVRLittleEndian
