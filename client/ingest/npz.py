"""npz files joined in one shard in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from core.console import counting
from core.errors import UserError
from core.import_npz import read_npz
from core.modalities import MODALITIES
from core.shards import Shard


def read_npz_files(
    files: Sequence[Path], name: str, modality: str | None, console: Console
) -> Shard:
    """Read npz files into one shard; see `core.import_npz.read_npz` and `join_shards`.

    Args:
        files: At least one.
        name: The shard's name.
        modality: Modality of all images, or None to read it from the files' names.
        console: Where the progress bar goes.

    Raises:
        UserError: a file cannot be read, or they do not go together.
    """
    shards = []
    with counting(console, "reading npz files", len(files)) as one_done:
        for file in files:
            shards.append(read_npz(file, modality))
            one_done()
    return join_shards(name, shards)


def join_shards(name: str, shards: Sequence[Shard]) -> Shard:
    """Put shards of one pixel size one after the other; classes meet by their names.

    Grey images become colour when another shard is in colour. Patients of different shards are
    different patients.

    Raises:
        UserError: the shards differ in pixel size.
    """
    sizes = {shard.images.shape[1] for shard in shards}
    if len(sizes) > 1:
        found = ", ".join(f"'{s.name}' {s.images.shape[1]} px" for s in shards)
        raise UserError(f"the sources differ in pixel size ({found}); prepare them one by one")
    px, channels = sizes.pop(), max(shard.images.shape[3] for shard in shards)
    classes = {
        modality: tuple(dict.fromkeys(c for s in shards for c in s.classes.get(modality, ())))
        for modality in MODALITIES
        if any(modality in s.classes for s in shards)
    }
    first_patient = np.cumsum([0, *(int(s.patient.max()) + 1 for s in shards)])
    images = [np.broadcast_to(s.images, (len(s.images), px, px, channels)) for s in shards]
    return Shard(
        name=name,
        images=images[0] if len(images) == 1 else np.concatenate(images),
        modality=np.concatenate([s.modality for s in shards]),
        patient=np.concatenate(
            [s.patient + f for s, f in zip(shards, first_patient[:-1], strict=True)]
        ),
        label=np.concatenate([_relabel(s, classes) for s in shards]),
        split=np.concatenate([s.split for s in shards]),
        classes=classes,
    )


def _relabel(shard: Shard, classes: dict[str, tuple[str, ...]]) -> NDArray[np.int64]:
    label = np.full_like(shard.label, -1)
    for modality, names in shard.classes.items():
        for index, name in enumerate(names):
            chosen = (shard.modality == MODALITIES.index(modality)) & (shard.label == index)
            label[chosen] = classes[modality].index(name)
    return label
