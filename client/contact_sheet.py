"""A picture of sample images of a shard, to see at a glance that the right thing was prepared."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from core.checkpoint import write_atomically
from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import Shard

COLUMNS = 12
GAP_PX = 2
SMALLEST_PX = 64
"""Smaller images are enlarged to at least this."""


def write_sheet(path: Path, shard: Shard) -> None:
    """Write a PNG with one row of evenly spaced samples for each modality and class.

    Raises:
        UserError: the file cannot be written.
    """
    px = shard.images.shape[1]
    rows = []
    for modality, classes in shard.classes.items():
        of_modality = shard.modality == MODALITIES.index(modality)
        for label in range(-1, len(classes)):
            members = np.flatnonzero(of_modality & (shard.label == label))
            if len(members):
                count = min(COLUMNS, len(members))
                rows.append(members[np.linspace(0, len(members) - 1, count).astype(int)])
    cell = px + GAP_PX
    sheet = np.zeros((len(rows) * cell - GAP_PX, COLUMNS * cell - GAP_PX, 3), dtype=np.uint8)
    for top, members in enumerate(rows):
        for left, index in enumerate(members):
            y, x = top * cell, left * cell
            sheet[y : y + px, x : x + px] = shard.images[index]
    zoom = -(-SMALLEST_PX // px)
    picture = Image.fromarray(sheet.repeat(zoom, axis=0).repeat(zoom, axis=1))
    data = io.BytesIO()
    picture.save(data, format="PNG")
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error}; give another path") from None
