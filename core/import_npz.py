"""Read npz files with MedMNIST's keys into shards.

Keys: `<split>_images` uint8 [N, px, px] or [N, px, px, 3] for at least one split of train, val,
test; optional `<split>_labels` integers [N] or [N, 1], `<split>_groups` patient keys [N], and
`class_names`. Other keys are ignored.
"""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.medmnist import SETS
from core.modalities import MODALITIES
from core.shards import SPLITS, Shard, check_shard, number_patients

PREFIXES: Final[dict[str, str]] = {
    **{modality: modality for modality in MODALITIES},
    "path": "pathology",
    "derm": "dermatology",
    **{name: facts.modality for name, facts in SETS.items()},
}
"""First word of a file name -> modality."""

MAX_CLASSES: Final = 1000
"""A label at or above it, in a file without class_names, is taken for damage."""

DAMAGE: Final = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy and zipfile raise for a file that is cut, altered, encrypted or not an npz at all."""


def modality_of_file(path: Path) -> str:
    """The modality that a file's name begins with.

    Raises:
        UserError: the first word of the name is neither a modality nor a MedMNIST set.
    """
    word = _first_word(path)
    if word not in PREFIXES:
        raise UserError(
            f"'{path}': the name must begin with its modality (one of {', '.join(PREFIXES)}); "
            "rename the file, or prepare it with --modality"
        )
    return PREFIXES[word]


def read_npz(path: Path, modality: str | None = None) -> Shard:
    """Read an npz file into memory.

    Args:
        path: The file. Nothing in it is unpickled.
        modality: One of MODALITIES; by default the file's name says it.

    Returns:
        A shard named by the file. Without groups every image is its own patient; without
        class names the classes are those of the MedMNIST set named by the file, else '0', '1', ...

    Raises:
        UserError: the file is damaged, lacks images, or holds a wrong dtype, shape, count or label.
    """
    modality = modality or modality_of_file(path)
    arrays = _read_arrays(path)
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    if not splits:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(
            f"'{path}': expected at least one of train_images, val_images, test_images, "
            f"found {found}; use MedMNIST's key names"
        )
    images = [_images(path, split, arrays) for split in splits]
    if len({part.shape[1:] for part in images}) > 1:
        raise UserError(f"'{path}': the splits differ in image shape; make them equal")
    names = _class_names(path, arrays)
    counts = [(split, len(part)) for split, part in zip(splits, images, strict=True)]
    label = np.concatenate([_labels(path, s, arrays, names, n) for s, n in counts])
    highest = int(label.max(initial=-1))
    shard = Shard(
        name=path.stem,
        images=np.concatenate(images),
        modality=np.full(len(label), MODALITIES.index(modality), dtype=np.int16),
        patient=number_patients(key for s, n in counts for key in _groups(path, s, arrays, n)),
        label=label,
        split=np.concatenate([np.full(n, s) for s, n in counts]),
        classes={modality: () if highest < 0 else names or tuple(map(str, range(highest + 1)))},
    )
    check_shard(shard)
    return shard


def _first_word(path: Path) -> str:
    match = re.match(r"[a-z]*", path.name.lower())
    return match.group() if match else ""


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; check the path")
    wanted = {f"{s}_{what}" for s in SPLITS for what in ("images", "labels", "groups")}
    wanted.add("class_names")
    try:
        # np.load is given the open file: a path of its own it would not close after an error.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an npz archive")
            return {key: archive[key] for key in archive.files if key in wanted}
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"'{path}' is not a whole npz file: {reason}; copy it again") from None


def _images(path: Path, split: str, arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    images = arrays[f"{split}_images"]
    shape = images.shape
    fits = images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits or shape[1] != shape[2]:
        raise UserError(
            f"'{path}': '{split}_images': expected uint8 [N, px, px] or [N, px, px, 3], "
            f"found {images.dtype} {list(shape)}; convert it"
        )
    return images[..., None] if images.ndim == 3 else images  # [N, px, px, C]


def _labels(
    path: Path, split: str, arrays: dict[str, NDArray[Any]], names: tuple[str, ...], count: int
) -> NDArray[np.int64]:
    """Labels [N], checked against the class names; -1 throughout where the split has none."""
    key = f"{split}_labels"
    if key not in arrays:
        return np.full(count, -1, dtype=np.int64)
    labels = arrays[key]
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise UserError(
            f"'{path}': '{key}': expected one integer for each of {count} images, "
            f"found {labels.dtype} {list(labels.shape)}; convert it"
        )
    labels = labels.reshape(count)
    limit = len(names) if names else MAX_CLASSES
    if count and (labels.min() < 0 or labels.max() >= limit):
        raise UserError(
            f"'{path}': '{key}': expected labels 0 to {limit - 1}, "
            f"found {labels.min()} to {labels.max()}; correct the labels or class_names"
        )
    return labels.astype(np.int64)


def _groups(path: Path, split: str, arrays: dict[str, NDArray[Any]], count: int) -> list[Any]:
    """Patient keys [N]; a key of its own for each image where the split has none."""
    key = f"{split}_groups"
    if key not in arrays:
        return [(split, index) for index in range(count)]
    groups = arrays[key]
    if groups.dtype.kind not in "iuUS" or groups.shape not in ((count,), (count, 1)):
        raise UserError(
            f"'{path}': '{key}': expected one number or text for each of {count} images, "
            f"found {groups.dtype} {list(groups.shape)}; convert it"
        )
    keys: list[Any] = groups.reshape(count).tolist()
    return keys


def _class_names(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    """The file's own class names, or those of the MedMNIST set it is named by, or none."""
    if "class_names" not in arrays:
        known = SETS.get(_first_word(path))
        return known.classes if known else ()
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names):
        raise UserError(f"'{path}': 'class_names' must be a list of distinct texts; correct it")
    return tuple(names.tolist())
