"""From full frames to pictures: burned-in text first, then the size."""

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from client.ingest.burned_in import Box, apply_policy
from client.ingest.resize import square
from client.ingest.types import Picture, Policy, Reason, Rejected, Rules

TEXT_CLASS: Final = {"us": "ultrasound", "cfp": "photo", "dermatology": "photo"}
"""Class of the burned-in policy for files without a header that tells more; others are 'other'."""

Text = Literal["", "found", "masked"]


def policy_of(modality: str, rules: Rules) -> Policy:
    """What to do about burned-in text in a file without a header that tells more."""
    return rules.burned_in[TEXT_CLASS.get(modality, "other")]


def make_pictures(
    frames: Iterable[NDArray[np.uint8]],
    modality: str,
    rules: Rules,
    text_class: str | None = None,
    regions: Sequence[Box] = (),
) -> tuple[tuple[Picture, ...], Text]:
    """Make the pictures of one file.

    Args:
        frames: Full-size images, uint8 [H, W] or [H, W, 3], of this one file; read one by one.
        modality: Of all of them.
        rules: Size, and what to do about burned-in text.
        text_class: Class of its burned-in policy; by default that of the modality.
        regions: Parts of an ultrasound image that show the body.

    Returns:
        The pictures, grey where all three channels agree, without those of one value; and what was
        found of text.

    Raises:
        Rejected: BURNED_IN by policy, TOO_SMALL, or CONSTANT when no frame shows anything.
    """
    policy = rules.burned_in[text_class or TEXT_CLASS.get(modality, "other")]
    pictures: list[Picture] = []
    text: Text = ""
    for frame in frames:
        clean, found, masked = apply_policy(frame, policy, regions)
        text = "masked" if masked or text == "masked" else "found" if found else text
        try:
            pixels = square(clean, rules.px)
        except Rejected as rejected:
            # The first slices of a volume may be air alone.
            if rejected.reason is not Reason.CONSTANT:
                raise
            continue
        if (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        pictures.append(Picture(pixels, modality))
    if not pictures:
        raise Rejected(Reason.CONSTANT)
    return tuple(pictures), text
