"""Text burned into the pixels: where it seems to be, and what a policy does about it.

A heuristic for printed characters on banners and over tissue; it reads nothing. Measured in
benchmarks/burned_in.py. It misses small, faint, vertical and handwritten text, and knows nothing
of faces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from client.ingest.types import MIN_SIDE_PX, Policy, Reason, Rejected

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; column x1 and row y1 lie outside"""

MAX_WORK_PIXELS: Final = 2_000_000
"""Larger images are searched on a smaller copy, which bounds the time."""

MAX_STROKE_PX: Final = 14
"""Whatever is thicker both ways is background."""

MIN_CONTRAST: Final = 40
"""Levels by which a stroke must differ from its background in one colour channel."""

GLYPH_HEIGHT_PX: Final = (4, 64)

MIN_SHARPNESS: Final = 0.35
"""Printed edges drop by most of their contrast over one pixel; enlarged tissue does not."""

UNREST_A_GLYPH, MAX_UNREST = 0.05, 0.4
"""Median contrast in and around a line, as a share of its own: noise has peaks everywhere, so there
a line counts only when it is long."""


@dataclass(frozen=True)
class Glyphs:
    """Connected strokes that may be characters, or words where those touch."""

    box: NDArray[np.int64]  # [N, 4]
    ink: NDArray[np.float64]  # [N], mean contrast in levels
    sharpness: NDArray[np.float64]  # [N], drop over one pixel at the rim, as a share of ink
    stroke: NDArray[np.float64]  # [N], about its width in pixels

    @property
    def width(self) -> NDArray[np.int64]:
        """[N] in pixels."""
        return self.box[:, 2] - self.box[:, 0]

    @property
    def height(self) -> NDArray[np.int64]:
        """[N] in pixels."""
        return self.box[:, 3] - self.box[:, 1]

    def take(self, which: NDArray[np.bool_]) -> "Glyphs":
        """Those with True in `which`, [N]."""
        return Glyphs(self.box[which], self.ink[which], self.sharpness[which], self.stroke[which])


def _windows(plane: Image, choose: Callable[[Image, Image], Image], side: int) -> Image:
    """Least or greatest value of every side x side window, in log(side) passes."""
    for _ in "yx":
        have = 1
        while have < side:
            step = min(have, side - have)
            plane = choose(plane[:-step], plane[step:])
            have += step
        plane = plane.T
    return plane  # [H - side + 1, W - side + 1]


def _ink(plane: Image) -> Image:
    """By how much bright strokes stand out of their background (a white top-hat)."""
    padded = np.pad(plane, MAX_STROKE_PX, mode="edge")
    eroded = _windows(padded, np.minimum, MAX_STROKE_PX + 1)
    return plane - _windows(eroded, np.maximum, MAX_STROKE_PX + 1)


def _glyphs(ink: Image) -> Glyphs:
    """Connected strokes of the size, thickness and sharpness of characters."""
    peak = _windows(np.pad(ink, MAX_STROKE_PX // 2), np.maximum, MAX_STROKE_PX // 2 * 2 + 1)
    mask = (ink >= MIN_CONTRAST) & (ink >= peak // 2)
    labels, number = ndimage.label(mask, np.ones((3, 3)))
    sides = [(slice(1, -1), slice(None, -2)), (slice(1, -1), slice(2, None))]
    sides += [(columns, rows) for rows, columns in sides]
    inside, around = np.pad(mask, 1, mode="edge"), np.pad(ink, 1, mode="edge")
    rim = mask & ~np.logical_and.reduce([inside[side] for side in sides])
    drop = ink - np.minimum(ink, np.minimum.reduce([around[side] for side in sides]))
    pixels = np.flatnonzero(mask)
    at_rim = rim.ravel()[pixels]
    label = labels.ravel()[pixels] - 1
    rim_label, rim_drop = label[at_rim], drop.ravel()[pixels[at_rim]]
    area = np.bincount(label, minlength=number)
    perimeter = np.bincount(rim_label, minlength=number)
    contrast = np.bincount(label, ink.ravel()[pixels], number) / area
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    glyphs = Glyphs(
        np.array(boxes, dtype=np.int64).reshape(-1, 4),
        contrast,
        np.bincount(rim_label, rim_drop, number) / perimeter / contrast,
        2 * area / perimeter,
    )
    low, high = GLYPH_HEIGHT_PX
    height, width = glyphs.height, glyphs.width
    return glyphs.take(
        (height >= low)
        & (height <= high)
        & (width <= 10 * height)
        & (area >= 0.12 * width * height)
        & (glyphs.stroke <= np.maximum(0.45 * height, 3))
        & (glyphs.sharpness >= MIN_SHARPNESS)
    )


def _neighbours(glyphs: Glyphs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs side by side on one base line, alike in height, contrast and stroke."""
    order = np.argsort(glyphs.box[:, 3], kind="stable")
    base = glyphs.box[order, 3]
    last = np.searchsorted(base, base + 1 + 0.06 * glyphs.height[order], side="right")
    count = last - np.arange(len(base)) - 1
    first = np.repeat(np.arange(len(base)), count)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    a, b = order[first], order[second]

    def ratio(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.maximum(values[a], values[b]) / np.minimum(values[a], values[b]))

    tall = np.maximum(glyphs.height[a], glyphs.height[b])
    gap = np.maximum(glyphs.box[a, 0], glyphs.box[b, 0])
    gap = gap - np.minimum(glyphs.box[a, 2], glyphs.box[b, 2])
    near = (gap <= 1.2 * tall) & (gap >= -0.2 * tall)
    alike = (ratio(glyphs.height) <= 1.8) & (ratio(glyphs.ink) <= 1.6)
    alike &= ratio(glyphs.stroke) <= 2
    return a[near & alike], b[near & alike]


def _lines(plane: Image) -> list[Box]:
    """Boxes of bright lines of at least four characters, and of shorter ones like those."""
    ink = _ink(plane)
    glyphs = _glyphs(ink)
    a, b = _neighbours(glyphs)
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(glyphs.ink),) * 2)
    _, line = connected_components(graph, directed=False)
    count = np.bincount(line)

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(line, values) / count

    height, contrast, sharpness = map(mean, (glyphs.height, glyphs.ink, glyphs.sharpness))
    letters = np.bincount(line, np.maximum(1, glyphs.width / (0.8 * height[line])))

    def grown(number: int, above: float) -> Box:
        box, tall = glyphs.box[line == number], height[number]
        margin = round(tall) + 1, round(above * tall) + 1
        x0, y0 = np.maximum(box[:, :2].min(0) - margin, 0)
        x1, y1 = box[:, 2:].max(0) + margin
        return int(x0), int(y0), min(int(x1), ink.shape[1]), min(int(y1), ink.shape[0])

    def is_quiet(number: int) -> bool:
        x0, y0, x1, y1 = grown(number, 1)
        limit = min(UNREST_A_GLYPH * count[number], MAX_UNREST)
        return bool(np.median(ink[y0:y1, x0:x1]) <= limit * contrast[number])

    many = np.flatnonzero((count >= 3) & (letters >= 4)).tolist()
    long = [number for number in many if is_quiet(number)]
    if not long:
        return []
    alike = sharpness >= 0.6
    for values, factor in ((height, 1.3), (contrast, 1.2)):
        alike &= values >= values[long].min() / factor
        alike &= values <= values[long].max() * factor
    alike[long] = False
    short = [number for number in np.flatnonzero(alike).tolist() if is_quiet(number)]
    return [grown(number, 0.4) for number in long + short]


def _shrink(image: Image) -> tuple[Image, int]:
    """The image, or means of its factor x factor blocks, within MAX_WORK_PIXELS."""
    height, width = image.shape[:2]
    factor = int(np.ceil(np.sqrt(height * width / MAX_WORK_PIXELS)))
    if factor <= 1:
        return image, 1
    rows, columns = height // factor, width // factor
    small = np.empty((rows, columns, *image.shape[2:]), np.uint8)
    step = max(1, MAX_WORK_PIXELS // (factor * width))
    for top in range(0, rows, step):  # strips of blocks: constant memory
        part = small[top : top + step]
        strip = image[top * factor :, : columns * factor][: len(part) * factor]
        sums = strip.reshape(len(part), factor, -1).sum(1, dtype=np.uint32)
        sums = sums.reshape(len(part), columns, factor, -1).sum(2)
        part[:] = (sums // factor**2).reshape(part.shape)
    return small, factor


def find_text(image: Image) -> list[Box]:
    """Boxes around what looks like lines of printed text; they may overlap.

    Args:
        image: [H, W] or [H, W, 3].
    """
    height, width = image.shape[:2]
    small, factor = _shrink(image)
    if min(small.shape[:2]) < GLYPH_HEIGHT_PX[0]:
        return []
    planes: list[Image] = []
    for plane in np.moveaxis(np.atleast_3d(small), 2, 0):
        if all((np.maximum(plane, old) - np.minimum(plane, old)).max() > 16 for old in planes):
            planes.append(np.ascontiguousarray(plane))
    boxes = {
        (x0 * factor, y0 * factor, min(x1 * factor, width), min(y1 * factor, height))
        for plane in planes
        for bright in (plane, 255 - plane)
        for x0, y0, x1, y1 in _lines(bright)
    }
    return sorted(boxes)


def _crop(image: Image, regions: Sequence[Box]) -> Image:
    """Cut to what surrounds the regions that can be meant.

    A region that lies largely outside was written for an image of another size, and is ignored.
    """
    height, width = image.shape[:2]
    kept = []
    for x0, y0, x1, y1 in regions:
        box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        sides = box[2] - box[0], box[3] - box[1]
        if min(sides) >= MIN_SIDE_PX and sides[0] * sides[1] >= 0.9 * (x1 - x0) * (y1 - y0):
            kept.append(box)
    if not kept:
        return image
    (left, top), (right, bottom) = np.min(kept, 0)[:2], np.max(kept, 0)[2:]
    return image[top:bottom, left:right]


def apply_policy(
    image: Image, policy: Policy, regions: Sequence[Box] = ()
) -> tuple[Image, bool, bool]:
    """What may be learned from an image that may have text burned in.

    Args:
        image: [H, W] or [H, W, 3]; not changed.
        policy: skip refuses an image with text; mask makes each box of text one colour, its
            median, and cuts the image to its regions; accept does not look.
        regions: where the header says that the picture lies (SequenceOfUltrasoundRegions);
            banners lie outside.

    Returns:
        The image; whether text was found, anywhere in it; whether that was masked or cut off.

    Raises:
        Rejected: BURNED_IN, where the policy is skip and text was found.
    """
    if policy == "accept":
        return image, False, False
    boxes = find_text(image)
    if policy == "skip":
        if boxes:
            raise Rejected(Reason.BURNED_IN)
        return image, False, False
    if boxes:
        masked = image.copy()
        for x0, y0, x1, y1 in boxes:
            masked[y0:y1, x0:x1] = np.median(image[y0:y1, x0:x1], axis=(0, 1))
        image = masked
    return _crop(image, regions), bool(boxes), bool(boxes)
