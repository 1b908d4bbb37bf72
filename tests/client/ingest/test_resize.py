import numpy as np
import pytest

from client.ingest.resize import square
from client.ingest.types import Reason, Rejected


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    image = np.zeros((32, 64), np.uint8)
    image[:, 16:48] = 200  # the centre square
    image[:, 31] = 180
    picture = square(image, 16)
    assert picture.shape == (16, 16, 1)
    assert (picture[:, 9:-2] == 200).all()
    assert picture.min() > 150  # bicubic weights reach over the crop's edge
    np.testing.assert_array_equal(square(image.T, 16), picture.swapaxes(0, 1))


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::2] = 255
    picture = square(stripes, 16).astype(int)
    assert abs(picture - 127).max() < 20  # point sampling would give 0 or 255


def test_an_image_of_the_right_size_is_kept_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    colour = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(square(grey, 16), grey[..., None])
    np.testing.assert_array_equal(square(colour[:, ::-1], 16), colour[:, ::-1])


def test_a_small_image_is_enlarged() -> None:
    image = np.tile(np.arange(20, dtype=np.uint8), (16, 1))
    assert square(image, 64).shape == (64, 64, 1)


@pytest.mark.parametrize("shape", [(15, 400), (400, 15), (1, 1, 3), (0, 5)])
def test_a_side_below_the_least_is_too_small(shape: tuple[int, ...]) -> None:
    with pytest.raises(Rejected, match=Reason.TOO_SMALL):
        square(np.zeros(shape, np.uint8), 16)


def test_equal_pixels_are_refused_in_grey_and_in_one_colour() -> None:
    for image in (np.full((20, 30), 7, np.uint8), np.full((20, 30, 3), (9, 0, 0), np.uint8)):
        with pytest.raises(Rejected, match=Reason.CONSTANT):
            square(image, 16)


def test_a_picture_whose_centre_alone_is_flat_is_refused() -> None:
    image = np.zeros((64, 512), np.uint8)
    image[:, :8] = 255
    with pytest.raises(Rejected, match=Reason.CONSTANT):
        square(image, 16)
