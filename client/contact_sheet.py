"""A picture of sample images of a shard, to see at a glance that the right thing was prepared."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.checkpoint import write_atomically
from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import Shard

COLUMNS: Final = 12
CLASSES: Final = 12
"""Classes shown of a modality, the first ones."""
UNLABELLED_ROWS: Final = 4
GAP_PX: Final = 2
SMALLEST_PX: Final = 64
"""Smaller images are enlarged to at least this."""
LARGEST_PX: Final = 128
"""Larger ones are shrunk to at most this, so a sheet has a bounded size."""

Row = tuple[str, NDArray[np.int64]]
"""Class name, or empty, and the images to show."""


def write_sheet(path: Path, shard: Shard) -> None:
    """Write a PNG of all modalities, one after the other; see `sheet_rows`.

    Raises:
        UserError: the file cannot be written.
    """
    data = draw_sheet(shard, [row for name in shard.classes for row in sheet_rows(shard, name)])
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error}; give another path") from None


def sheet_rows(shard: Shard, modality: str) -> list[Row]:
    """What to show of a modality: evenly spaced images, one row a class.

    Without classes the images fill up to `UNLABELLED_ROWS` rows.
    """
    of_modality = shard.modality == MODALITIES.index(modality)
    rows: list[Row] = []
    for label, name in [(-1, ""), *enumerate(shard.classes[modality])][: CLASSES + 1]:
        members = np.flatnonzero(of_modality & (shard.label == label))
        count = COLUMNS if shard.classes[modality] else COLUMNS * UNLABELLED_ROWS
        chosen = members[np.linspace(0, len(members) - 1, min(count, len(members))).astype(int)]
        rows += [(name, chosen[i : i + COLUMNS]) for i in range(0, len(chosen), COLUMNS)]
    return rows


def draw_sheet(shard: Shard, rows: Iterable[Row]) -> bytes:
    """Draw rows of images as a PNG; only the images shown are read."""
    rows = list(rows)
    px = shard.images.shape[1]
    shrink, zoom = -(-px // LARGEST_PX), max(1, -(-SMALLEST_PX // px))
    side = -(-px // shrink)
    cell = side + GAP_PX
    sheet = np.zeros((len(rows) * cell - GAP_PX, COLUMNS * cell - GAP_PX, 3), dtype=np.uint8)
    for top, (_, members) in enumerate(rows):
        for left, index in enumerate(members):
            image = np.broadcast_to(shard.images[index], (px, px, 3))
            y, x = top * cell, left * cell
            sheet[y : y + side, x : x + side] = Image.fromarray(image).reduce(shrink)
    data = io.BytesIO()
    Image.fromarray(sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(data, format="PNG")
    return data.getvalue()
