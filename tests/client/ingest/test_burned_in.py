import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from client.ingest import burned_in
from client.ingest.burned_in import MAX_WORK_PIXELS, Box, apply_policy, find_text
from client.ingest.types import Reason, Rejected

Pixels = NDArray[np.uint8]
TEXT = "DOE^JANE 1970-01-31"


def tissue(height: int = 300, width: int = 400, seed: int = 0) -> Pixels:
    """Speckle as ultrasound has it: blurred noise of some contrast."""
    noise = np.random.default_rng(seed).normal(size=(height, width))
    smooth = ndimage.gaussian_filter(noise, (2, 4))
    return np.clip(90 + 30 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def write(
    image: Pixels, size: int, colour: tuple[int, ...], at: tuple[int, int] = (20, 30)
) -> tuple[Pixels, NDArray[np.bool_]]:
    """The image with TEXT on it, and where its glyphs are."""
    picture = Image.fromarray(image)
    stencil = Image.new("L", picture.size)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text(at, TEXT, font=font, fill=colour if image.ndim == 3 else colour[0])
    ImageDraw.Draw(stencil).text(at, TEXT, font=font, fill=255)
    return np.asarray(picture), np.asarray(stencil) >= 128


def share_inside(boxes: list[Box], glyphs: NDArray[np.bool_]) -> float:
    mask = np.zeros(glyphs.shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return float(mask[glyphs].mean())


@pytest.mark.parametrize("size", [10, 16, 24, 32])
def test_white_text_on_a_black_banner_is_found_whole(size: int) -> None:
    image, glyphs = write(np.zeros((200, 500), np.uint8), size, (255,))
    assert share_inside(find_text(image), glyphs) > 0.97


@pytest.mark.parametrize("size", [12, 24])
def test_white_text_over_tissue_is_found_whole(size: int) -> None:
    image, glyphs = write(tissue(), size, (255,))
    assert share_inside(find_text(image), glyphs) > 0.97


@pytest.mark.parametrize("colour", [(255, 220, 0), (0, 255, 0), (255, 40, 40), (40, 80, 255)])
def test_coloured_text_over_tissue_is_found(colour: tuple[int, int, int]) -> None:
    image, glyphs = write(np.stack([tissue()] * 3, axis=2), 20, colour)
    assert share_inside(find_text(image), glyphs) > 0.9


def test_black_text_over_bright_tissue_is_found() -> None:
    image, glyphs = write(255 - tissue(), 20, (0,))
    assert share_inside(find_text(image), glyphs) > 0.9


def test_boxes_hold_little_but_the_text() -> None:
    image, glyphs = write(tissue(), 16, (255,))
    rows, columns = np.nonzero(glyphs)
    for x0, y0, x1, y1 in find_text(image):
        assert y0 >= rows.min() - 16
        assert y1 <= rows.max() + 16
        assert x0 >= columns.min() - 16
        assert x1 <= columns.max() + 16


def test_a_short_word_counts_only_beside_a_line_like_it() -> None:
    picture = Image.new("L", (400, 200))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    draw.text((300, 120), "63", font=font, fill=255)
    assert find_text(np.asarray(picture)) == []
    draw.text((20, 20), TEXT, font=font, fill=255)
    assert any(x0 > 280 and y0 > 100 for x0, y0, _, _ in find_text(np.asarray(picture)))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.full((64, 64, 3), 200, np.uint8),
        np.zeros((1, 1), np.uint8),
        np.zeros((3, 500), np.uint8),
        np.tile(np.arange(256, dtype=np.uint8), (64, 1)),
        (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8),
        np.repeat(np.repeat(np.eye(2, dtype=np.uint8) * 255, 100, 0), 100, 1),
    ],
)
def test_plain_images_hold_no_text(image: Pixels) -> None:
    assert find_text(image) == []


@pytest.mark.parametrize("seed", range(8))
def test_speckle_and_noise_hold_no_text(seed: int) -> None:
    assert find_text(tissue(seed=seed)) == []
    noise = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert find_text(noise) == []


def test_a_large_image_is_searched_on_a_small_copy_and_its_boxes_scaled_back() -> None:
    height, width = 3001, 4003
    assert height * width > 4 * MAX_WORK_PIXELS
    image, glyphs = write(np.zeros((height, width), np.uint8), 90, (255,), (2500, 2700))
    start = time.process_time()
    boxes = find_text(image)
    assert time.process_time() - start < 5
    assert share_inside(boxes, glyphs) > 0.97
    assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)


def test_text_is_found_at_the_edges_and_boxes_stay_inside() -> None:
    image, glyphs = write(np.zeros((60, 250), np.uint8), 16, (255,), (0, -2))
    boxes = find_text(image)
    assert share_inside(boxes, glyphs) > 0.9
    assert all(0 <= x0 < x1 <= 250 and 0 <= y0 < y1 <= 60 for x0, y0, x1, y1 in boxes)


def test_skip_refuses_an_image_with_text_and_passes_one_without() -> None:
    image, _ = write(tissue(), 16, (255,))
    with pytest.raises(Rejected, match="text burned into the pixels") as caught:
        apply_policy(image, "skip")
    assert caught.value.reason is Reason.BURNED_IN
    clean = tissue()
    same, found, masked = apply_policy(clean, "skip")
    assert same is clean
    assert (found, masked) == (False, False)


def test_accept_returns_the_image_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burned_in, "find_text", None)
    image, _ = write(tissue(), 16, (255,))
    same, found, masked = apply_policy(image, "accept", [(10, 10, 100, 100)])
    assert same is image
    assert (found, masked) == (False, False)


@pytest.mark.parametrize("channels", [1, 3])
def test_mask_blanks_the_text_and_nothing_else(channels: int) -> None:
    background = tissue() if channels == 1 else np.stack([tissue(seed=s) for s in range(3)], axis=2)
    image, glyphs = write(background, 16, (255, 255, 255))
    before = image.copy()
    masked, found, was_masked = apply_policy(image, "mask")
    assert (found, was_masked) == (True, True)
    assert (image == before).all()
    assert masked.dtype == np.uint8
    changed = (masked != image).reshape(*glyphs.shape, -1).any(2)
    assert changed[glyphs].mean() > 0.97
    assert changed.mean() < 0.1
    assert find_text(masked) == []


def test_mask_leaves_an_image_without_text_as_it_is() -> None:
    image = tissue()
    same, found, masked = apply_policy(image, "mask")
    assert same is image
    assert (found, masked) == (False, False)


def test_mask_cuts_to_the_box_around_all_regions() -> None:
    image = tissue()
    cut, _, _ = apply_policy(image, "mask", [(40, 50, 200, 150), (100, 120, 300, 250)])
    assert (cut == image[50:250, 40:300]).all()


def test_text_outside_the_regions_is_cut_off_and_counts_as_masked() -> None:
    image = np.concatenate([np.zeros((60, 400), np.uint8), tissue()])
    image, _ = write(image, 20, (255,), (10, 10))
    cut, found, masked = apply_policy(image, "mask", [(0, 70, 400, 360)])
    assert (found, masked) == (True, True)
    assert (cut == image[70:360]).all()


@pytest.mark.parametrize(
    "region",
    [
        (84, 31, 595, 414),  # of an image of twice the size
        (-300, 0, 100, 200),
        (500, 500, 700, 700),
        (200, 50, 100, 150),
        (0, 0, 0, 0),
        (10, 10, 20, 200),  # thinner than an image may be
        (0, 0, 2**32, 2**32),
    ],
)
def test_a_region_that_cannot_be_meant_is_ignored(region: Box) -> None:
    image = tissue()
    assert apply_policy(image, "mask", [region])[0] is image
    cut, _, _ = apply_policy(image, "mask", [region, (20, 30, 220, 230)])
    assert (cut == image[30:230, 20:220]).all()


def test_a_region_that_sticks_out_a_little_is_clamped() -> None:
    image = tissue()
    cut, _, _ = apply_policy(image, "mask", [(-2, 40, 402, 301)])
    assert (cut == image[40:]).all()


def test_real_banners_are_found_and_real_images_without_text_pass(real_data: Path) -> None:
    from client.ingest.dicom_file import open_dicom
    from client.ingest.dicom_pixels import decode_frame
    from client.ingest.types import Rules

    def read(name: str, modality: str) -> Pixels:
        with open_dicom(real_data / "dicom" / "real" / name) as file:
            return decode_frame(file, 0, Rules(), modality)

    ultrasound = read("US1_UNCR.dcm", "us")
    masked, found, _ = apply_policy(ultrasound, "mask")
    assert found
    for x0, y0, x1, y1 in [(19, 25, 170, 40), (19, 42, 90, 56), (499, 25, 620, 40)]:
        assert (ultrasound[y0:y1, x0:x1] > 200).any()
        assert (masked[y0:y1, x0:x1] < 50).all()
    for name, modality in {"CT1_RLE": "ct", "693_J2KR.dcm": "ct", "RG1_J2KI": "cxr"}.items():
        assert find_text(read(name, modality)) == []
