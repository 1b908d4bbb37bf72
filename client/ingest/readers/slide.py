"""Whole slides as tiles of tissue, by openslide.

Only the scan itself is read, never the pictures of the label and of the whole glass beside it:
they show names.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from client.ingest.frames import pick_frames
from client.ingest.pictures import make_pictures
from client.ingest.sources import identity_of
from client.ingest.types import Item, Reading, Reason, Rejected, Rules
from client.ingest.vendors import vendor_of

SLIDE_SUFFIXES: Final = (".mrxs", ".vms", ".vmu", ".svslide", ".czi")
"""Slides that do not begin as a TIFF does; openslide then looks at their content."""

GENERIC: Final = "generic-tiff"
"""What openslide calls any TIFF of tiles that no slide scanner wrote."""

TILE_WIDTH: Final = 322
MIN_SLIDE_PIXELS: Final = 2**24
"""A larger TIFF of tiles is a slide even without smaller copies of itself."""

OVERVIEW_PX: Final = 2048
MAX_OVERVIEW_PIXELS: Final = 2**26
"""A slide without a smaller copy than this is refused: finding its tissue would decode it all."""

DEFAULT_UM_PER_PX: Final = 0.5
"""Taken (an objective of 20x) where a slide does not tell, or tells what no scanner does."""

PLAUSIBLE_UM_PER_PX: Final = (0.05, 8.0)
MIN_TISSUE: Final = 0.5
"""Share of a tile that must be tissue."""

SATURATION: Final = (15, 50)
"""Otsu's threshold is kept within: glass stays below, and a pen does not lift it over tissue."""

DARKEST: Final = 40
"""Black is the scanner's filling or a pen."""


def is_slide(path: Path, modality: str | None) -> bool:
    """Whether a file is to be read as a slide.

    A TIFF of tiles that no slide scanner wrote is one unless the modality says otherwise, if it
    holds smaller copies of itself or is large.

    Raises:
        Rejected: EXTRA_MISSING where it may be one and openslide is not installed.
    """
    pathology = modality in (None, "pathology")
    try:
        openslide = _openslide()
    except Rejected:
        if path.suffix.lower() in SLIDE_SUFFIXES or (pathology and _has_tiles(path)):
            raise
        return False
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor != GENERIC or not pathology:
        return vendor not in (None, GENERIC)
    try:
        with openslide.OpenSlide(path) as slide:
            width, height = slide.dimensions
            return bool(slide.level_count > 1 or width * height > MIN_SLIDE_PIXELS)
    except openslide.OpenSlideError:
        return False


def read_slide(item: Item, rules: Rules) -> Reading:
    """Read tiles of tissue, spread evenly over all there is of it in the slide.

    Tissue is what has colour, by Otsu's threshold on the saturation; black and green (pens) are
    not. A tile covers `rules.px` pixels at `rules.tile_um_per_px`. Slides are pathology, whatever
    folder or rules say.

    Raises:
        Rejected: with the reason; NO_TISSUE for empty glass.
    """
    openslide = _openslide()
    try:
        with openslide.OpenSlide(item.path) as slide:
            tiles = _tiles(slide, rules)
            pictures, text = make_pictures(tiles, "pathology", rules)
            vendor = vendor_of(slide.properties.get(openslide.PROPERTY_NAME_VENDOR, ""))
    except openslide.OpenSlideUnsupportedFormatError:
        raise Rejected(Reason.NOT_AN_IMAGE) from None
    except openslide.OpenSlideError:
        raise Rejected(Reason.DAMAGED_PIXELS) from None
    return Reading(pictures, identity_of(item, rules), "whole slide", vendor, text)


def find_tissue(overview: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where an overview of a slide shows tissue.

    Args:
        overview: uint8 [H, W, 3].

    Returns:
        [H, W], true for tissue.
    """
    red, green, blue = (overview[..., channel].astype(np.int16) for channel in range(3))
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    saturation = (255 * (highest - lowest) // np.maximum(highest, 1)).astype(np.uint8)
    threshold = np.clip(_otsu(saturation), *SATURATION)
    stained = green < np.maximum(red, blue)
    return np.asarray((saturation > threshold) & (highest > DARKEST) & stained)


def _otsu(values: NDArray[np.uint8]) -> int:
    """The level that separates two groups best: greatest variance between them (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    total = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below))
    return int(np.nan_to_num(between, nan=0.0, posinf=0.0).argmax())


def _openslide() -> ModuleType:
    try:
        import openslide
    except (ImportError, OSError):  # OSError: the Python part without its library
        raise Rejected(Reason.EXTRA_MISSING) from None
    return openslide


def _has_tiles(path: Path) -> bool:
    """Whether a TIFF is stored in tiles, as all slides are and few other images."""
    try:
        with Image.open(path, formats=[TiffImagePlugin.TiffImageFile.format]) as image:
            return TILE_WIDTH in getattr(image, "tag_v2", ())
    except Exception:  # Pillow raises whatever a damaged file makes its parser meet
        return False


def _tiles(slide: Any, rules: Rules) -> Iterator[NDArray[np.uint8]]:
    """Tiles of tissue, in full resolution."""
    um_per_px = _um_per_px(slide)
    side = rules.px * rules.tile_um_per_px / um_per_px  # in pixels of level 0
    level = slide.get_best_level_for_downsample(rules.tile_um_per_px / um_per_px * 1.01)
    level_side = max(1, round(side / slide.level_downsamples[level]))
    cells = _tissue_cells(slide, side)
    for index in pick_frames(len(cells), rules.tiles):
        row, column = cells[index]
        corner = (round(column * side), round(row * side))
        yield _on_white(slide.read_region(corner, level, (level_side, level_side)))


def _um_per_px(slide: Any) -> float:
    low, high = PLAUSIBLE_UM_PER_PX
    try:
        found = float(slide.properties["openslide.mpp-x"])
    except (KeyError, ValueError):
        return DEFAULT_UM_PER_PX
    return found if low <= found <= high else DEFAULT_UM_PER_PX


def _tissue_cells(slide: Any, side: float) -> NDArray[np.int64]:
    """Row and column of each cell of the grid that is mostly tissue, from top left, [N, 2]."""
    width, height = slide.dimensions
    columns, rows = int(width / side), int(height / side)
    if not columns or not rows:
        raise Rejected(Reason.TOO_SMALL)
    level = slide.get_best_level_for_downsample(max(width, height) / OVERVIEW_PX)
    level_width, level_height = slide.level_dimensions[level]
    if level_width * level_height > MAX_OVERVIEW_PIXELS:
        raise Rejected(Reason.TOO_LARGE)
    overview = _on_white(slide.read_region((0, 0), level, (level_width, level_height)))
    factor = max(1, max(level_width, level_height) // OVERVIEW_PX)
    small = np.asarray(Image.fromarray(overview).reduce(factor))
    tissue = Image.fromarray(find_tissue(small).astype(np.float32))
    # Shares of tissue by cell: one averaged pixel a cell.
    reach = (columns * side / width * tissue.width, rows * side / height * tissue.height)
    share = tissue.resize((columns, rows), Image.Resampling.BOX, box=(0, 0, *reach))
    cells = np.argwhere(np.asarray(share) >= MIN_TISSUE)
    if not len(cells):
        raise Rejected(Reason.NO_TISSUE)
    return cells


def _on_white(region: Image.Image) -> NDArray[np.uint8]:
    """Parts that were never scanned are transparent, and look like glass then."""
    glass = Image.new("RGB", region.size, (255, 255, 255))
    glass.paste(region, mask=region.getchannel("A"))
    return np.asarray(glass)
