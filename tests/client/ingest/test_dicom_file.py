import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from client.ingest import dicom_file
from client.ingest.dicom_file import guard, open_dicom
from client.ingest.dicom_pixels import stored_values
from client.ingest.types import Reason, Rejected

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

NESTED = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
"""A sequence with an item, both of undefined length; any number may follow each other."""


def check(path):
    with open_dicom(path) as file:
        file.check_length()
        return stored_values(file, 0)


def reason_of(path):
    with pytest.raises(Rejected) as rejected:
        check(path)
    return rejected.value.reason


def meta_end(data):
    """Where the file meta group ends: its length stands at 140."""
    return 144 + struct.unpack("<L", data[140:144])[0]


def encoded(path, implicit, little):
    """The data set of a file alone, encoded anew, without preamble and meta."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit, little
    write_dataset(out, dcmread(path))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"<html><body>Error 404</body></html>" * 9, Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff\xe0" + bytes(300), Reason.NOT_AN_IMAGE),
        (bytes(range(256)) * 8, Reason.NOT_AN_IMAGE),
        (bytes(128) + b"DICM", Reason.DAMAGED_HEADER),
        (bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\x12", Reason.DAMAGED_HEADER),
        (b"\x08\x00\x05\x00", Reason.NOT_AN_IMAGE),
    ],
)
def test_what_is_no_dicom_file_is_named(tmp_path, content, reason):
    (tmp_path / "a.dcm").write_bytes(content)
    assert reason_of(tmp_path / "a.dcm") is reason


def test_a_missing_file_and_a_directory_are_unreadable(tmp_path):
    assert reason_of(tmp_path / "none.dcm") is Reason.UNREADABLE
    assert reason_of(tmp_path) is Reason.UNREADABLE


def test_objects_without_pixels_are_named(write_dicom, ramp):
    assert reason_of(write_dicom(ramp, PixelData=None)) is Reason.NO_PIXELS


def test_a_directory_index_is_named_without_opening_what_it_lists(write_dicom, ramp):
    path = write_dicom(ramp, DirectoryRecordSequence=[], PixelData=None)
    assert reason_of(path) is Reason.DICOMDIR


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_a_data_set_without_preamble_is_read(write_dicom, ramp, tmp_path, implicit, little):
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(encoded(write_dicom(ramp), implicit, little))
    expected = ramp if little else ramp.byteswap()  # the writer leaves the pixels as they are
    assert (check(bare) == expected).all()


def test_implicit_and_big_endian_files_are_read(write_dicom, ramp):
    assert (check(write_dicom(ramp, ImplicitVRLittleEndian)) == ramp).all()
    assert (check(write_dicom(ramp.astype(">u2"), ExplicitVRBigEndian)) == ramp).all()


def test_the_file_is_parsed_even_without_a_transfer_syntax(write_dicom, ramp):
    path = write_dicom(ramp)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x11\x00UI"))
    assert (check(path) == ramp).all()


def deflated(path, content):
    data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    data = data.replace(b"\x02\x00\x10\x00UI\x14\x00", b"\x02\x00\x10\x00UI\x16\x00")
    end = meta_end(data) + 2
    path.write_bytes(data[:end] + content(data[end:]))
    return path


def compress(data):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflater.compress(data) + deflater.flush()


def test_a_deflated_file_is_inflated(write_dicom, ramp):
    path = deflated(write_dicom(ramp), compress)
    with open_dicom(path) as file:
        assert file.syntax == DeflatedExplicitVRLittleEndian
    assert (check(path) == ramp).all()


def test_a_deflate_bomb_is_not_inflated(write_dicom, ramp, monkeypatch):
    path = deflated(write_dicom(ramp), lambda data: compress(data + bytes(64 * 2**20)))
    assert path.stat().st_size < 100_000
    assert reason_of(path) is Reason.TOO_LARGE
    path = deflated(write_dicom(ramp), compress)
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 6000)
    assert reason_of(path) is Reason.TOO_LARGE


def test_a_deflated_file_that_breaks_off_is_truncated(write_dicom, ramp):
    path = deflated(write_dicom(ramp), lambda data: compress(data)[:-20])
    assert reason_of(path) is Reason.TRUNCATED
    path = deflated(write_dicom(ramp), lambda data: b"\xff" * 500)
    assert reason_of(path) is Reason.DAMAGED_HEADER


@pytest.mark.parametrize("depth", [300, 20_000])
def test_sequences_deeper_than_the_stack_are_a_damaged_header(write_dicom, ramp, depth):
    path = write_dicom(ramp)
    data = path.read_bytes()
    path.write_bytes(data[: meta_end(data)] + NESTED * depth + data[meta_end(data) :])
    assert reason_of(path) is Reason.DAMAGED_HEADER


def test_a_false_length_inside_a_sequence_is_truncation_and_takes_no_memory(write_dicom, ramp):
    path = write_dicom(ramp)
    data = path.read_bytes()
    end = meta_end(data)
    value = b"\x08\x00\x50\x11OB\0\0" + struct.pack("<L", 0xF0000000)
    path.write_bytes(data[:end] + NESTED + value + data[end:])
    tracemalloc.start()
    assert reason_of(path) is Reason.TRUNCATED
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_cut_at_any_byte_a_file_has_a_named_reason(write_dicom):
    path = write_dicom(np.arange(256, dtype=np.uint8).reshape(16, 16), PatientName="A^B")
    data = path.read_bytes()
    reasons = set()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        reasons.add(reason_of(path))
    assert reasons == {
        Reason.EMPTY,
        Reason.NOT_AN_IMAGE,
        Reason.DAMAGED_HEADER,
        Reason.NO_PIXELS,
        Reason.TRUNCATED,
    }


def test_a_header_element_longer_than_the_file_is_truncation(write_dicom, ramp):
    path = write_dicom(ramp, PixelData=None, ImageComments="x" * 500)
    path.write_bytes(path.read_bytes()[:-100])
    assert reason_of(path) is Reason.TRUNCATED


def test_a_length_of_gigabytes_inside_a_sequence_takes_no_memory(write_dicom, ramp):
    path = write_dicom(ramp)
    data = path.read_bytes()
    greedy = NESTED + b"\x08\x00\x50\x11UN\0\0" + struct.pack("<L", 4 * 10**9)
    path.write_bytes(data[: meta_end(data)] + greedy + data[meta_end(data) :])
    tracemalloc.start()
    assert reason_of(path) is Reason.TRUNCATED
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"Rows": 65535, "Columns": 65535}, Reason.TOO_LARGE),
        ({"Rows": 4096}, Reason.TRUNCATED),
        ({"NumberOfFrames": 2**31 - 1}, Reason.TRUNCATED),
        ({"NumberOfFrames": -3}, Reason.DAMAGED_HEADER),
        ({"NumberOfFrames": 2}, Reason.TRUNCATED),
        ({"Rows": 0}, Reason.DAMAGED_HEADER),
        ({"Rows": None}, Reason.DAMAGED_HEADER),
        ({"Rows": [64, 64]}, Reason.DAMAGED_HEADER),
        ({"Rows": 15}, Reason.TOO_SMALL),
        ({"BitsAllocated": 13}, Reason.DAMAGED_HEADER),
        ({"BitsStored": 60}, Reason.DAMAGED_HEADER),
        ({"BitsStored": None}, Reason.DAMAGED_HEADER),
        ({"SamplesPerPixel": 4}, Reason.DAMAGED_HEADER),
        ({"SamplesPerPixel": 3}, Reason.DAMAGED_HEADER),
        ({"PixelRepresentation": 7}, Reason.DAMAGED_HEADER),
        ({"PhotometricInterpretation": "RGB"}, Reason.DAMAGED_HEADER),
        ({"PhotometricInterpretation": "HSV"}, Reason.NO_DECODER),
        ({"PhotometricInterpretation": ""}, Reason.NO_DECODER),
    ],
)
def test_an_impossible_layout_is_named(write_dicom, ramp, header, reason):
    assert reason_of(write_dicom(ramp, **header)) is reason


def test_a_value_that_is_no_number_is_a_damaged_header(write_dicom, ramp):
    path = write_dicom(ramp, NumberOfFrames=1)
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x001 ", b"IS\x02\x001A"))
    assert reason_of(path) is Reason.DAMAGED_HEADER


def test_zero_frames_are_one_where_the_pixels_of_one_are_there(write_dicom, ramp):
    assert (check(write_dicom(ramp, NumberOfFrames=0)) == ramp).all()
    assert reason_of(write_dicom(ramp, NumberOfFrames=0, PixelData=b"")) is Reason.TRUNCATED


def test_uncompressed_pixels_without_a_length_are_a_damaged_header(write_dicom):
    path = write_dicom([bytes(4096)], JPEGBaseline8Bit)
    data = path.read_bytes().replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0")
    path.write_bytes(data)
    assert reason_of(path) is Reason.DAMAGED_HEADER


def test_compressed_pixels_that_are_not_in_pieces_are_damaged(write_dicom):
    path = write_dicom(np.zeros((64, 64), np.uint8))
    data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    path.write_bytes(data)
    assert reason_of(path) is Reason.DAMAGED_PIXELS


def test_fewer_pieces_than_frames_are_truncation(write_dicom):
    path = write_dicom([b"a" * 10, b"b" * 10], JPEGBaseline8Bit, NumberOfFrames=3)
    assert reason_of(path) is Reason.TRUNCATED


def test_a_piece_that_is_cut_off_is_truncation(write_dicom):
    path = write_dicom([b"a" * 100], JPEGBaseline8Bit)
    path.write_bytes(path.read_bytes()[:-60])
    assert reason_of(path) is Reason.TRUNCATED


def test_no_pieces_at_all_are_truncation(write_dicom):
    path = write_dicom([b"ab"], JPEGBaseline8Bit)
    data = path.read_bytes()
    start = data.index(b"\xfe\xff\x00\xe0")
    path.write_bytes(data[:start] + b"\xfe\xff\xdd\xe0\0\0\0\0")
    assert reason_of(path) is Reason.TRUNCATED


def test_frames_of_several_pieces_are_joined_by_the_table_of_offsets(write_dicom):
    from pydicom.encaps import encapsulate

    frames = [bytes([number]) * 40 for number in range(3)]
    path = write_dicom(frames, JPEGBaseline8Bit, NumberOfFrames=3, PixelData=encapsulate(frames, 2))
    with open_dicom(path) as file:
        assert len(file.fragments) == 6
        assert [file.compressed_frame(index) for index in range(3)] == frames


def test_all_pieces_of_a_single_frame_are_joined(write_dicom):
    path = write_dicom([b"aaaa", b"bbbb"], JPEGBaseline8Bit, PixelData=None)
    pieces = b"".join(b"\xfe\xff\x00\xe0\x04\0\0\0" + piece for piece in (b"aaaa", b"bbbb"))
    head = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\0\0\0\0"
    # Bytes that look like the end of the sequence may be part of a piece.
    pieces += b"\xfe\xff\x00\xe0\x0a\0\0\0xx\xfe\xff\xdd\xe0xxxx"
    path.write_bytes(path.read_bytes() + head + pieces + b"\xfe\xff\xdd\xe0\0\0\0\0")
    with open_dicom(path) as file:
        assert file.compressed_frame(0) == b"aaaabbbbxx\xfe\xff\xdd\xe0xxxx"


def test_a_guard_names_everything_but_what_is_not_the_files_fault():
    class PanicException(BaseException):
        """As decoders written in Rust raise."""

    def raising(error):
        def step():
            raise error

        return step

    for error in (ValueError("quoted"), RecursionError(), PanicException(), EOFError()):
        with pytest.raises(Rejected, match=Reason.DAMAGED_PIXELS):
            guard(Reason.DAMAGED_PIXELS, raising(error))
    for error in (MemoryError(), KeyboardInterrupt(), SystemExit(), Rejected(Reason.TOO_LARGE)):
        with pytest.raises(type(error)) as same:
            guard(Reason.DAMAGED_PIXELS, raising(error))
        assert same.value is error
