"""From a frame of any size to the square picture of a shard."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.ingest.types import MIN_SIDE_PX, Reason, Rejected


def square(image: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """Resize the shorter side to `px`, antialiased, and keep the centre.

    Args:
        image: uint8 [H, W] in grey or [H, W, 3] in colour.
        px: Side of the picture; an image of this size already is kept bit for bit.

    Returns:
        uint8 [px, px, C] with C 1 for grey and 3 for colour.

    Raises:
        Rejected: TOO_SMALL below `MIN_SIDE_PX`; CONSTANT where all pixels of the picture are equal.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if side < MIN_SIDE_PX:
        raise Rejected(Reason.TOO_SMALL)
    left, top = (width - side) / 2, (height - side) / 2
    small = Image.fromarray(np.ascontiguousarray(image)).resize(
        (px, px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    picture = np.asarray(small, dtype=np.uint8).reshape(px, px, -1)
    if (picture == picture[0, 0]).all():
        raise Rejected(Reason.CONSTANT)
    return picture
