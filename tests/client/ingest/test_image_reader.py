import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client.ingest.readers.image import read_image
from client.ingest.types import Item, Reading, Reason, Rejected, Rules

RULES = Rules(px=16, modality="cxr")


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path: Path, rules: Rules = RULES, modality: str | None = None) -> Reading:
    return read_image(Item(path, f"0/{path.name}", modality), rules)


def only(path: Path) -> NDArray[np.uint8]:
    [picture] = read(path).pictures
    return picture.pixels


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def rejection(path: Path) -> Reason:
    with pytest.raises(Rejected) as rejected:
        read(path)
    return rejected.value.reason


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("tiff", "TIFF"), ("bmp", "BMP")])
def test_lossless_formats_are_read_bit_for_bit(tmp_path: Path, suffix: str, kind: str) -> None:
    grey, colour = noise(16, 16), noise(16, 16, 3)
    path = save(tmp_path / f"a.{suffix}", grey)
    np.testing.assert_array_equal(only(path), grey[..., None])
    np.testing.assert_array_equal(only(save(path, colour)), colour)
    reading = read(path, modality="us")
    assert (reading.kind, reading.identity, reading.vendor) == (kind, f"file:0/a.{suffix}", "")
    assert [picture.modality for picture in reading.pictures] == ["us"]


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats_are_read_closely(tmp_path: Path, suffix: str, kind: str) -> None:
    ramp = np.zeros((32, 32, 3), np.uint8)
    ramp[..., 0] = np.arange(32) * 8
    path = save(tmp_path / f"a.{suffix}", ramp, quality=95)
    assert read(path).kind == kind
    expected = ramp.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert abs(only(path)[:, 1:-1] - expected[:, 1:-1]).mean() < 3


def test_colour_that_is_grey_is_one_channel(tmp_path: Path) -> None:
    grey = noise(16, 16)
    path = save(tmp_path / "a.png", np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(only(path), grey[..., None])
    save(path, np.repeat(grey[..., None], 4, axis=2))  # with alpha
    assert only(path).shape == (16, 16, 1)


def test_without_a_modality_nothing_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(16, 16))
    with pytest.raises(Rejected, match=Reason.UNDECIDED):
        read(path, Rules(px=16))


def test_a_csv_s_patient_is_whose_image_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(16, 16))
    assert read_image(Item(path, "0/a.png", "ct", patient="7"), RULES).identity == "csv:7"


def test_orientation_is_applied(tmp_path: Path) -> None:
    left = np.zeros((16, 16), np.uint8)
    left[:, :8] = 255
    image = Image.fromarray(left)
    exif = image.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    for suffix in ("png", "jpg", "webp", "tiff"):
        image.save(tmp_path / f"a.{suffix}", exif=exif)
        assert only(tmp_path / f"a.{suffix}")[0, 15, 0] > 200


def test_deep_grey_is_stretched_between_its_percentiles(tmp_path: Path) -> None:
    deep = np.linspace(1000, 3000, 256).reshape(16, 16)
    deep[0, 0] = 65_535
    for values in (deep.astype(np.uint16), deep.astype(np.int32), deep.astype(np.float32)):
        pixels = only(save(tmp_path / "deep.tiff", values))
        assert (pixels.min(), pixels.max()) == (0, 255)
        assert (np.diff(pixels.ravel()[1:].astype(int)) >= 0).all()
        assert abs(int(pixels[8, 0, 0]) - 128) < 4  # the hot pixel did not squeeze the rest


def test_deep_grey_whose_zero_is_white_is_inverted(tmp_path: Path) -> None:
    deep = np.linspace(0, 65_535, 256).reshape(16, 16).astype(np.uint16)
    path = save(tmp_path / "deep.tiff", deep, tiffinfo={262: 0})
    assert only(path)[0, 0, 0] == 255
    path = save(tmp_path / "flat.tiff", (deep // 256).astype(np.uint8))
    assert only(path)[0, 0, 0] == 0


def test_nan_is_background_and_nothing_else_is_refused(tmp_path: Path) -> None:
    values = np.linspace(-5, 5, 256, dtype=np.float32).reshape(16, 16)
    values[15, 15] = np.nan
    assert only(save(tmp_path / "a.tiff", values))[15, 15, 0] == 0
    assert rejection(save(tmp_path / "a.tiff", values * np.nan)) == Reason.NOT_FINITE


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    pixels[..., 3] = 255
    pixels[4:8, :, 3] = 0  # a name wiped out by an editor is still in the colours
    found = only(save(tmp_path / "a.png", pixels))
    assert not found[4:8].any()
    np.testing.assert_array_equal(found[8:], pixels[8:, :, :3])
    grey = Image.fromarray(pixels[..., 0])
    grey.putalpha(Image.fromarray(pixels[..., 3]))
    grey.save(tmp_path / "a.png")
    np.testing.assert_array_equal(only(tmp_path / "a.png")[8:, :, 0], pixels[8:, :, 0])
    assert not only(tmp_path / "a.png")[4:8].any()


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "LAB", "1"])
def test_other_ways_to_store_pixels_become_grey_or_colour(tmp_path: Path, mode: str) -> None:
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:8, :, 0], colours[8:, :, 2] = 255, 255
    image = Image.fromarray(colours)
    if mode == "LAB":
        image = Image.merge("LAB", Image.fromarray(colours).split())
    image.convert(mode).save(tmp_path / "a.tiff")
    pixels = only(tmp_path / "a.tiff")
    if mode == "1":
        assert pixels.shape == (16, 16, 1)
    elif mode != "LAB":
        assert abs(pixels.astype(int) - colours).max() < 3


def test_pages_like_the_first_are_frames_and_others_are_not(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(20, 20, seed=seed)) for seed in range(5)]
    label = Image.fromarray(noise(30, 20, seed=9))
    first, *others = [pages[0], label, *pages[1:], label]
    first.save(tmp_path / "a.tiff", save_all=True, append_images=others)
    rules = Rules(px=20, modality="oct", frames=16)
    found = [picture.pixels[..., 0] for picture in read(tmp_path / "a.tiff", rules).pictures]
    np.testing.assert_array_equal(found, [np.asarray(page) for page in pages])
    few = read(tmp_path / "a.tiff", Rules(px=20, modality="oct", frames=1)).pictures
    np.testing.assert_array_equal([picture.pixels[..., 0] for picture in few], [found[2]])


def test_pages_of_one_value_are_left_out(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 20), 7), Image.fromarray(noise(20, 20))]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    assert len(read(tmp_path / "a.tiff").pictures) == 1
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=[pages[0]])
    assert rejection(tmp_path / "a.tiff") == Reason.CONSTANT


def test_a_large_jpeg_decoded_small_is_the_same_picture(tmp_path: Path) -> None:
    small = noise(30, 40, 3, seed=1)
    Image.fromarray(small).resize((800, 600)).save(tmp_path / "a.jpg", quality=90)
    accepted = only(tmp_path / "a.jpg")
    looked_at = read(tmp_path / "a.jpg", modality="dermatology").pictures[0].pixels
    assert abs(accepted.astype(int) - looked_at).max() <= 2
    thin = save(tmp_path / "b.jpg", noise(20, 900))  # nothing to gain, nothing lost
    assert only(thin).shape == (16, 16, 1)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_is_no_image(tmp_path: Path, suffix: str) -> None:
    first, *others = (Image.fromarray(noise(20, 20, 3, seed=seed)) for seed in range(3))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    assert rejection(tmp_path / f"a.{suffix}") == Reason.NOT_AN_IMAGE


def test_the_first_picture_of_a_phone_s_jpeg_is_the_photo(tmp_path: Path) -> None:
    photo, depth = (Image.fromarray(noise(20, 20, 3, seed=seed)) for seed in range(2))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[depth])
    photo.save(tmp_path / "b.jpg")
    assert read(tmp_path / "a.jpg").kind == "JPEG"
    np.testing.assert_array_equal(only(tmp_path / "a.jpg"), only(tmp_path / "b.jpg"))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one black line."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(width * 3 + 1))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(12_500, 12_500), (60_000, 60_000)])
def test_a_frame_beyond_the_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(*size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("was decoded"))
    assert rejection(tmp_path / "bomb.png") == Reason.TOO_LARGE


def test_a_cut_file_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "bmp", "tiff"):
        path = save(tmp_path / f"a.{suffix}", noise(64, 64, 3))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert rejection(path) in {Reason.TRUNCATED, Reason.DAMAGED_PIXELS, Reason.DAMAGED_HEADER}
        path.write_bytes(data[:4] + b"nothing of an image")
        assert rejection(path) in {Reason.TRUNCATED, Reason.DAMAGED_HEADER}
    path = save(tmp_path / "a.png", noise(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert rejection(path) == Reason.TRUNCATED
    path.write_bytes(data[:50] + bytes(20) + data[70:])
    assert rejection(path) == Reason.DAMAGED_PIXELS


def test_a_small_image_is_refused(tmp_path: Path) -> None:
    assert rejection(save(tmp_path / "a.png", noise(15, 90))) == Reason.TOO_SMALL


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n",
        b"GIF89a" + bytes(40),
        b"\x00\x00\x01\x00\x01\x00" + bytes(40),
        b"P5 20 20 255\n" + bytes(400),
    ],
)
def test_formats_beyond_the_five_are_never_tried(tmp_path: Path, data: bytes) -> None:
    for name in ("a.png", "a.eps"):
        (tmp_path / name).write_bytes(data)
        assert rejection(tmp_path / name) == Reason.DAMAGED_HEADER


def test_a_disk_that_fails_is_no_damage_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", noise(20, 20))

    def failing(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
    assert rejection(path) == Reason.UNREADABLE


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "tiff", "bmp", "webp"]))
def test_a_mutated_file_gives_pictures_or_a_reason(
    tmp_path: Path, data: st.DataObject, suffix: str
) -> None:
    path = save(tmp_path / f"a.{suffix}", noise(24, 24, 3))
    mutated = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated[: data.draw(st.integers(1, len(mutated)))])
    try:
        reading = read(path)
    except Rejected:
        return
    assert all(picture.pixels.shape[:2] == (16, 16) for picture in reading.pictures)
