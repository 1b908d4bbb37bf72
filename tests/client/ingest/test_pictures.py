import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from client.ingest.pictures import make_pictures
from client.ingest.types import BURNED_IN_DEFAULTS, Policy, Reason, Rejected, Rules


def photo(text: str = "") -> NDArray[np.uint8]:
    y, x = np.mgrid[:300, :400]
    image = Image.fromarray(np.stack([x // 8, y // 4, x // 8 + y // 8], 2).astype(np.uint8))
    ImageDraw.Draw(image).text((20, 20), text, (255, 255, 255), ImageFont.load_default(24))
    return np.asarray(image)


def rules(**policies: Policy) -> Rules:
    return Rules(px=32, burned_in=BURNED_IN_DEFAULTS | policies)


NAME = photo("DOE JANE 19620411")


@pytest.mark.parametrize(
    ("modality", "text_class"),
    [("us", "ultrasound"), ("cfp", "photo"), ("dermatology", "photo"), ("cxr", "other")],
)
def test_each_modality_has_the_policy_of_its_class(modality: str, text_class: str) -> None:
    others: dict[str, Policy] = dict.fromkeys(BURNED_IN_DEFAULTS, "accept")
    with pytest.raises(Rejected, match=Reason.BURNED_IN):
        make_pictures([NAME], modality, rules(**{**others, text_class: "skip"}))
    _, text = make_pictures([NAME], modality, rules(**{**others, text_class: "mask"}))
    assert text == "masked"
    skipping: dict[str, Policy] = dict.fromkeys(BURNED_IN_DEFAULTS, "skip")
    [picture], text = make_pictures([NAME], modality, rules(**{**skipping, text_class: "accept"}))
    assert text == ""
    assert picture.modality == modality


def test_text_is_masked_at_full_size_before_the_picture_is_made() -> None:
    [masked], _ = make_pictures([NAME], "cfp", rules(photo="mask"))
    [clean], _ = make_pictures([photo()], "cfp", rules(photo="mask"))
    [named], _ = make_pictures([NAME], "cfp", rules(photo="accept"))
    assert abs(masked.pixels.astype(int) - clean.pixels).max() < 50
    assert abs(named.pixels.astype(int) - clean.pixels).max() > 80


def test_one_frame_with_text_marks_the_file() -> None:
    pictures, text = make_pictures([photo(), NAME, photo()], "cfp", rules())
    assert len(pictures) == 3
    assert text == "masked"


def test_frames_of_one_value_are_left_out_and_alone_are_refused() -> None:
    flat = np.full((40, 40), 9, np.uint8)
    assert len(make_pictures([flat, photo(), flat], "ct", rules())[0]) == 1
    with pytest.raises(Rejected, match=Reason.CONSTANT):
        make_pictures([flat, flat], "ct", rules())
    with pytest.raises(Rejected, match=Reason.TOO_SMALL):
        make_pictures([flat[:9]], "ct", rules())


def test_colour_whose_channels_agree_is_grey() -> None:
    grey = photo()[..., 0]
    [picture], _ = make_pictures([np.repeat(grey[..., None], 3, axis=2)], "ct", rules())
    [expected], _ = make_pictures([grey], "ct", rules())
    assert picture.pixels.shape == (32, 32, 1)
    np.testing.assert_array_equal(picture.pixels, expected.pixels)
