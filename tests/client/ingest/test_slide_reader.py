import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from client.ingest.read import read
from client.ingest.readers.slide import find_tissue, read_slide
from client.ingest.types import Item, Reading, Reason, Rejected, Rules

pytest.importorskip("openslide")
PINK = (200, 90, 160)
GLASS = (243, 241, 244)
TILE = 64
RULES = Rules(px=32, tiles=6)


def write_tiff(
    path: Path,
    pages: Sequence[NDArray[np.uint8]],
    *,
    um_per_px: float = 0.5,
    description: bytes = b"",
    striped: Sequence[NDArray[np.uint8]] = (),
    striped_description: bytes = b"",
) -> Path:
    """A TIFF of uncompressed RGB: pages of tiles, largest first, then pages of one strip."""
    blob = bytearray(b"II*\0\0\0\0\0")
    link = 4

    def put(data: bytes) -> int:
        blob.extend(data + b"\0" * (len(data) % 2))
        return len(blob) - len(data) - len(data) % 2

    def directory(entries: dict[int, tuple[int, Sequence[int] | bytes]]) -> None:
        nonlocal link
        rows = b""
        for tag, (kind, values) in sorted(entries.items()):
            data = values if isinstance(values, bytes) else struct.pack(
                f"<{len(values)}{ {3: 'H', 4: 'I', 5: 'I'}[kind] }", *values
            )  # fmt: skip
            count = len(data) // {2: 1, 3: 2, 4: 4, 5: 8}[kind]
            field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", put(data))
            rows += struct.pack("<HHI", tag, kind, count) + field
        place = put(struct.pack("<H", len(entries)) + rows + bytes(4))
        blob[link : link + 4] = struct.pack("<I", place)
        link = place + 2 + len(rows)

    for number, page in enumerate([*pages, *striped]):
        height, width = page.shape[:2]
        tiled = number < len(pages)
        text = description if tiled else striped_description
        entries: dict[int, tuple[int, Sequence[int] | bytes]] = {
            254: (4, [int(0 < number < len(pages))]),
            256: (4, [width]),
            257: (4, [height]),
            258: (3, [8, 8, 8]),
            259: (3, [1]),
            262: (3, [2]),
            277: (3, [3]),
            282: (5, [round(1e7 / um_per_px), 1000]),
            283: (5, [round(1e7 / um_per_px), 1000]),
            284: (3, [1]),
            296: (3, [3]),  # pixels a centimetre
        }
        if text:
            entries[270] = (2, text + b"\0")
        if tiled:
            padded = np.zeros((-(-height // TILE) * TILE, -(-width // TILE) * TILE, 3), np.uint8)
            padded[:height, :width] = page
            tiles = [
                padded[y : y + TILE, x : x + TILE].tobytes()
                for y in range(0, padded.shape[0], TILE)
                for x in range(0, padded.shape[1], TILE)
            ]
            entries |= {322: (3, [TILE]), 323: (3, [TILE]), 324: (4, [put(t) for t in tiles])}
            entries[325] = (4, [len(t) for t in tiles])
        else:
            entries |= {273: (4, [put(page.tobytes())]), 278: (4, [height])}
            entries[279] = (4, [page.size])
        directory(entries)
    path.write_bytes(blob)
    return path


def levels(image: NDArray[np.uint8], count: int = 3) -> list[NDArray[np.uint8]]:
    return [np.asarray(Image.fromarray(image).reduce(2**level)) for level in range(count)]


def scan(width: int = 512, height: int = 384, seed: int = 0) -> NDArray[np.uint8]:
    """Glass with tissue on its left half: pink, with structure that tells one tile from another."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), GLASS, np.int16) + rng.integers(-3, 4, (height, width, 1))
    structure = rng.integers(-30, 31, (height, width // 2, 1))
    image[:, : width // 2] = np.array(PINK, np.int16) + structure
    return image.astype(np.uint8)


def reading(path: Path, rules: Rules = RULES, modality: str | None = None) -> Reading:
    return read(Item(path, f"0/{path.name}", modality), rules)


def rejection(path: Path, rules: Rules = RULES, modality: str | None = None) -> Reason:
    with pytest.raises(Rejected) as rejected:
        reading(path, rules, modality)
    return rejected.value.reason


def test_tiles_are_cut_from_tissue_alone_and_spread_over_it(tmp_path: Path) -> None:
    image = scan()
    path = write_tiff(tmp_path / "a.tif", levels(image))
    found = reading(path)
    assert (found.kind, found.vendor, found.identity) == ("whole slide", "other", "file:0/a.tif")
    assert {picture.modality for picture in found.pictures} == {"pathology"}
    # Half of 16 columns x 12 rows of cells of 32 px is tissue: 96 cells, of which six are chosen.
    cells = [8, 24, 40, 56, 72, 88]
    for picture, cell in zip(found.pictures, cells, strict=True):
        row, column = divmod(cell, 8)
        expected = image[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        np.testing.assert_array_equal(picture.pixels, expected)
    again = reading(path)
    for one, other in zip(found.pictures, again.pictures, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_all_tiles_are_taken_where_there_are_fewer(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", levels(scan()))
    assert len(reading(path, Rules(px=32)).pictures) == 96


@pytest.mark.parametrize(
    ("um_per_px", "side"),
    [(0.25, 64), (1.0, 16), (264.6, 32)],  # the last is a screen's 96 dpi: taken for 0.5
)
def test_a_tile_covers_the_same_length_whatever_the_scanner_s_pixels(
    tmp_path: Path, um_per_px: float, side: int
) -> None:
    image = scan()
    path = write_tiff(tmp_path / "a.tif", levels(image), um_per_px=um_per_px)
    first = reading(path, Rules(px=32, tiles=10_000)).pictures[0].pixels
    expected = Image.fromarray(image[:side, :side]).resize((32, 32), Image.Resampling.BICUBIC)
    assert abs(first.astype(int) - np.asarray(expected)).mean() < 4


def test_glass_black_and_green_ink_are_not_tissue() -> None:
    overview = np.full((80, 80, 3), GLASS, np.uint8)
    overview[:20] = PINK
    overview[20:30] = (70, 60, 130)  # haematoxylin
    overview[30:40] = (120, 80, 50)  # a brown stain
    overview[50:55] = (0, 0, 0)
    overview[55:60] = (25, 20, 30)
    overview[60:70] = (20, 140, 60)  # a pen
    assert find_tissue(overview)[:40].all()
    assert not find_tissue(overview)[40:].any()


def test_a_pen_does_not_hide_pale_tissue() -> None:
    overview = np.full((80, 80, 3), GLASS, np.uint8)
    overview[:20] = (225, 180, 210)
    overview[40:60] = (0, 200, 40)
    assert find_tissue(overview)[:20].all()


def test_empty_glass_and_a_slide_smaller_than_a_tile_are_refused(tmp_path: Path) -> None:
    glass = scan()
    glass[:, :256] = glass[:, 256:]
    path = write_tiff(tmp_path / "a.tif", levels(glass))
    assert rejection(path) == Reason.NO_TISSUE
    path = write_tiff(tmp_path / "b.tif", levels(scan()))
    assert rejection(path, Rules(px=400)) == Reason.TOO_SMALL


def test_a_tiff_of_tiles_is_a_slide_only_for_pathology_and_with_smaller_copies(
    tmp_path: Path,
) -> None:
    alone = write_tiff(tmp_path / "alone.tif", [scan()])
    pyramid = write_tiff(tmp_path / "pyramid.tif", levels(scan()))
    assert reading(alone, modality="pathology").kind == "TIFF"
    assert reading(pyramid, modality="pathology").kind == "whole slide"
    assert reading(pyramid, modality="dermatology").kind == "TIFF"
    assert len(reading(pyramid, modality="dermatology").pictures) == 1
    assert rejection(alone) == Reason.UNDECIDED


def test_a_slide_whose_smallest_copy_is_huge_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tif", levels(scan()))
    monkeypatch.setattr("client.ingest.readers.slide.MAX_OVERVIEW_PIXELS", 128 * 96 - 1)
    monkeypatch.setattr("openslide.OpenSlide.read_region", lambda *_: pytest.fail("was decoded"))
    assert rejection(path) == Reason.TOO_LARGE


def aperio(path: Path) -> Path:
    """A slide as an Aperio scanner writes it, with pictures of label and glass."""
    label = np.zeros((96, 80, 3), np.uint8)
    label[:] = (255, 0, 0)
    ImageDraw.Draw(picture := Image.fromarray(label)).text((4, 4), "DOE JANE", (255, 255, 255))
    thumbnail = np.asarray(Image.fromarray(scan()).reduce(4))
    return write_tiff(
        path,
        levels(scan()),
        description=b"Aperio Image Library v1\r\n512x384 |AppMag = 20|MPP = 0.5",
        striped=[thumbnail, np.asarray(picture), np.roll(np.asarray(picture), 5, axis=0)],
        striped_description=b"Aperio Image Library v1\r\nlabel 80x96",
    )


def test_pictures_of_the_label_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        pytest.fail("asked for the label")

    monkeypatch.setattr("openslide.OpenSlide.associated_images", property(refuse))
    path = aperio(tmp_path / "a.svs")
    found = reading(path, modality="dermatology")  # a slide all the same
    assert (found.kind, found.vendor) == ("whole slide", "Leica")
    assert len(found.pictures) == 6
    for picture in found.pictures:
        assert picture.pixels[..., 1].min() > 40  # the label's red has no green
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert rejection(path) == Reason.EXTRA_MISSING
    [only] = reading(path, modality="dermatology").pictures
    assert only.pixels[..., 1].min() > 40


def test_without_openslide_slides_are_named_and_other_tiffs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tif", levels(scan()))
    Image.fromarray(scan()).save(tmp_path / "plain.tif")
    Image.fromarray(scan()).save(tmp_path / "mirax.jpg")
    (tmp_path / "mirax.jpg").rename(tmp_path / "a.mrxs")
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert rejection(path, modality="pathology") == Reason.EXTRA_MISSING
    assert rejection(tmp_path / "a.mrxs") == Reason.EXTRA_MISSING
    assert reading(tmp_path / "plain.tif", modality="pathology").kind == "TIFF"
    item = Item(path, "0/a.tif")
    with pytest.raises(Rejected, match=Reason.EXTRA_MISSING):
        read_slide(item, RULES)


def test_a_cut_slide_is_named(tmp_path: Path) -> None:
    path = aperio(tmp_path / "a.svs")
    data = bytearray(path.read_bytes())
    offsets = data.index(struct.pack("<HHI", 324, 4, 48)) + 8
    table = struct.unpack("<I", data[offsets : offsets + 4])[0]
    data[table : table + 4] = struct.pack("<I", len(data) + 1000)  # the first tile's place
    path.write_bytes(data)
    assert rejection(path, Rules(px=32)) == Reason.DAMAGED_PIXELS


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_slide_gives_tiles_or_a_reason(tmp_path: Path, data: Any) -> None:
    path = write_tiff(tmp_path / "a.tif", levels(scan(128, 128), 2))
    mutated = bytearray(path.read_bytes())
    first_directory = struct.unpack("<I", mutated[4:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = first_directory + data.draw(st.integers(0, 200))
        mutated[place] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated)
    try:
        found = reading(path)
    except Rejected:
        return
    assert all(picture.pixels.shape[:2] == (32, 32) for picture in found.pictures)
