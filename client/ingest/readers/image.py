"""Plain image files: PNG, JPEG, TIFF (pages are frames), BMP and WebP, by Pillow."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Imported by name, so that Pillow loads none of its other forty formats.
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from client.ingest.frames import pick_frames
from client.ingest.grey import robust_range, to_bytes
from client.ingest.pictures import make_pictures, policy_of
from client.ingest.sources import identity_of
from client.ingest.types import MAX_FRAME_PIXELS, Item, Reading, Reason, Rejected, Rules

FORMATS: Final = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
        WebPImagePlugin.WebPImageFile,
    )
)
DISK_ERRORS: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""A damaged file has its own, such as EINVAL for a place that no file has."""

PHOTOMETRIC: Final = 262
MIN_IS_WHITE: Final = 0


def read_image(item: Item, rules: Rules) -> Reading:
    """Read a plain image file; nothing in it but its pixels and its orientation is used.

    Grey of more than 8 bits is stretched between its 0.5 and 99.5 percentiles. What is transparent
    is black: it may have been erased that way. A TIFF's further pages are frames where they have
    the size and depth of the first; others are thumbnails, or a slide's label. Animations are no
    images; of the several pictures in a phone's JPEG the first is the photo.

    Raises:
        Rejected: with the reason, also when neither item nor rules name the modality.
    """
    modality = item.modality or rules.modality
    if modality is None:
        raise Rejected(Reason.UNDECIDED)
    with _damage(Reason.DAMAGED_HEADER):
        image = Image.open(item.path, formats=FORMATS)
    # Unless text is searched in it, a JPEG may be decoded at an eighth, a quarter or half its size:
    # seven times the speed for twelve million pixels, and no pixel of a picture off by more than 2.
    least_px = 2 * rules.px if policy_of(modality, rules) == "accept" else None
    with image:
        pictures, text = make_pictures(_frames(image, rules.frames, least_px), modality, rules)
        kind = "JPEG" if image.format == "MPO" else str(image.format)
    return Reading(pictures, identity_of(item, rules), kind, text=text)


def _frames(image: Image.Image, most: int, least_px: int | None) -> Iterator[NDArray[np.uint8]]:
    pages = [0]
    if image.format == "TIFF":
        with _damage(Reason.DAMAGED_HEADER):
            pages = _pages_like_the_first(image)
    elif image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Rejected(Reason.NOT_AN_IMAGE)
    if image.width * image.height > MAX_FRAME_PIXELS:
        raise Rejected(Reason.TOO_LARGE)
    if least_px is not None:
        image.draft(None, (least_px, least_px))
    for index in pick_frames(len(pages), most):
        with _damage(Reason.DAMAGED_PIXELS):
            image.seek(pages[index])
            inverted = _is_inverted(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
        yield _to_uint8(upright, inverted=inverted)


def _pages_like_the_first(image: Image.Image) -> list[int]:
    first, alike = (image.size, image.mode), [0]
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        if (image.size, image.mode) == first:
            alike.append(page)
    image.seek(0)
    return alike


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white; Pillow inverts 8 bits itself, and leaves deeper values as they are."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(PHOTOMETRIC) == MIN_IS_WHITE


def _to_uint8(image: Image.Image, *, inverted: bool) -> NDArray[np.uint8]:
    """[H, W] for grey, [H, W, 3] for all else."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = to_bytes(values, *robust_range(values))
        return 255 - grey if inverted else grey
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


@contextmanager
def _damage(reason: Reason) -> Iterator[None]:
    """Name what Pillow raises; on damaged files that is nearly any exception there is."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Rejected(Reason.TOO_LARGE) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise Rejected(Reason.UNREADABLE) from None
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Rejected(Reason.TRUNCATED if cut else reason) from None
