import io
import struct

import numpy as np
import pytest
from openjpeg.utils import encode_array
from PIL import Image

from client.ingest.codestream import Claim, read_claim, rle_segments
from client.ingest.types import Reason, Rejected


def jpeg(mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 40), 50).convert(mode).save(out, "JPEG")
    return out.getvalue()


def header(marker: int, bits: int, rows: int, columns: int, ids: bytes) -> bytes:
    """A frame header by hand, as JPEG and JPEG-LS share it."""
    parts = b"".join(bytes([name]) + b"\x11\x00" for name in ids)
    body = struct.pack(">BHHB", bits, rows, columns, len(ids)) + parts
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def by_hand(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xda\x00\x02"


def j2k(colour: bool, transform: bool = False, signed: bool = False, bits: int = 8) -> bytes:
    shape = (40, 64, 3) if colour else (40, 64)
    values = np.random.default_rng(0).integers(0, 100, shape)
    array = values.astype(("i" if signed else "u") + ("1" if bits == 8 else "2"))
    photometric = 1 if colour else 2
    return encode_array(array, bits, photometric_interpretation=photometric, use_mct=transform)


def test_a_jpeg_claims_rows_columns_components_and_bits():
    assert read_claim(jpeg()) == Claim(40, 64, 3, 8, tells_colour=True)
    assert read_claim(jpeg("L")) == Claim(40, 64, 1, 8, tells_colour=True)


def test_a_jpeg_without_markers_does_not_tell_its_colours():
    assert read_claim(by_hand(header(0xC1, 12, 2487, 2048, b"\1\2\3"))) == Claim(
        2487, 2048, 3, 12, tells_colour=False
    )


@pytest.mark.parametrize(
    "marker",
    [b"\xff\xe0\x00\x06JFIF", b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\1"],
    ids=["JFIF", "Adobe"],
)
def test_a_marker_tells_colours(marker):
    assert read_claim(by_hand(marker, header(0xC0, 8, 9, 9, b"\1\2\3"))).tells_colour


def test_component_names_tell_colours():
    assert read_claim(by_hand(header(0xC0, 8, 9, 9, b"RGB"))).tells_colour


def test_jpeg_ls_and_jpeg_lossless_claim_their_size_too():
    assert read_claim(by_hand(header(0xF7, 16, 512, 300, b"\1"))) == Claim(512, 300, 1, 16, False)
    assert read_claim(by_hand(header(0xC3, 15, 512, 300, b"\1"))) == Claim(512, 300, 1, 15, False)


def test_fill_bytes_between_markers_are_passed_over():
    assert read_claim(by_hand(b"\xff\xff", header(0xC0, 8, 7, 9, b"\1"))).rows == 7


def test_a_huffman_table_is_no_frame_header():
    table = b"\xff\xc4\x00\x0a" + bytes(8)
    assert read_claim(by_hand(table, header(0xC0, 8, 7, 9, b"\1"))).rows == 7


def test_two_frame_headers_are_damage():
    twice = by_hand(header(0xC0, 8, 64, 64, b"\1"), header(0xC0, 8, 65500, 65500, b"\1"))
    with pytest.raises(Rejected, match=Reason.DAMAGED_PIXELS):
        read_claim(twice)


def test_jpeg_2000_claims_size_depth_and_colour_transform():
    assert read_claim(j2k(False)) == Claim(40, 64, 1, 8, tells_colour=False)
    assert read_claim(j2k(False, signed=True, bits=16)) == Claim(40, 64, 1, 16, False)
    assert read_claim(j2k(True, transform=True)) == Claim(40, 64, 3, 8, tells_colour=True)
    assert read_claim(j2k(True, transform=False)) == Claim(40, 64, 3, 8, tells_colour=False)


def test_the_offset_of_a_jpeg_2000_image_is_not_part_of_it():
    moved = bytearray(j2k(False))
    moved[8:24] = struct.pack(">4L", 69, 46, 5, 6)  # right, bottom, left, top
    assert read_claim(bytes(moved)).rows == 40
    assert read_claim(bytes(moved)).columns == 64


def test_a_codestream_is_found_inside_jp2_boxes():
    stream = j2k(True, transform=True)
    start = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
    plain = struct.pack(">L4s", len(stream) + 8, b"jp2c") + stream
    long = struct.pack(">L4sQ", 1, b"jp2c", len(stream) + 16) + stream
    other = struct.pack(">L4s", 12, b"ftyp") + b"jp2 "
    for boxes in (plain, other + plain, other + long):
        assert read_claim(start + boxes) == Claim(40, 64, 3, 8, tells_colour=True)


def test_a_box_of_no_length_ends_the_search():
    with pytest.raises(Rejected, match=Reason.DAMAGED_PIXELS):
        read_claim(b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64))


@pytest.mark.parametrize("frame", [jpeg(), j2k(True, True)], ids=["JPEG", "JPEG 2000"])
def test_cut_anywhere_it_is_read_or_named_damaged(frame):
    whole, outcomes = read_claim(frame), []
    for length in range(900):
        try:
            outcomes.append(read_claim(frame[:length]))
        except Rejected as rejected:
            outcomes.append(rejected.reason)
    told = outcomes.index(whole)
    assert 0 < told < 900
    assert outcomes == [Reason.DAMAGED_PIXELS] * told + [whole] * (900 - told)


@pytest.mark.parametrize("frame", [b"", b"\0" * 100, b"<html>", b"\xff\xd8" + b"\0" * 50])
def test_anything_else_is_damaged(frame):
    with pytest.raises(Rejected, match=Reason.DAMAGED_PIXELS):
        read_claim(frame)


def test_rle_claims_its_byte_planes():
    assert rle_segments(struct.pack("<L", 6) + bytes(60)) == 6
    with pytest.raises(Rejected, match=Reason.DAMAGED_PIXELS):
        rle_segments(b"\1\0\0\0")
