"""From files as a hospital has them to one shard in memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from core.errors import UserError
from core.import_images import Entry, read_csv, read_folder
from core.import_npz import read_npz
from core.modalities import MODALITIES
from core.shards import Shard


def read_sources(
    sources: Sequence[Path], name: str, px: int, modality: str | None, console: Console
) -> Shard:
    """Read npz files, or one image folder, or one CSV, into a shard.

    Args:
        sources: Files or one folder; several only when all are npz files.
        name: The shard's name.
        px: Side of the images to make; npz files keep theirs.
        modality: Modality of all images, or None to read it from names, folders or the CSV.
        console: Where the progress bar goes.

    Raises:
        UserError: an unknown modality, sources of mixed kinds, or a source that cannot be read.
    """
    if modality is not None and modality not in MODALITIES:
        raise UserError(f"expected --modality {', '.join(MODALITIES)}, found '{modality}'")
    missing = [source for source in sources if not source.exists()]
    if missing:
        raise UserError(f"source '{missing[0]}' does not exist; check the path")
    if all(source.suffix == ".npz" for source in sources):
        bar = track(sources, "reading npz files", console=console)
        return join_shards(name, [read_npz(source, modality) for source in bar])
    if len(sources) > 1:
        raise UserError(
            "expected npz files, or one image folder, or one CSV as source, "
            f"found {len(sources)} mixed ones; prepare them one by one"
        )

    def show_progress(entries: Sequence[Entry]) -> Iterable[Entry]:
        return track(entries, "reading images", console=console)

    source = sources[0]
    if source.is_dir():
        shard = read_folder(source, px, modality, show_progress)
    elif source.suffix == ".csv":
        if modality is not None:
            raise UserError("a CSV names the modality of each image; leave --modality out")
        shard = read_csv(source, px, show_progress)
    else:
        raise UserError(f"source '{source}' is no npz file, folder or CSV; give one of these")
    return join_shards(name, [shard])


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
