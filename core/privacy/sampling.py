"""Whose images take part in a step: patients by Poisson sampling, then a few images of each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.privacy.noise import PrivateRandom
from core.shards import Shard

Rows = NDArray[np.int64]
Kind = tuple[int, tuple[int, ...]]


class Patients:
    """The training images of a site by patient, the unit of privacy.

    **Guarantees**:
        - All training images of a patient are in one unit, over all modalities and shards, wherever
          the tables call the patient by the same key. Patients that a table only numbers are kept
          apart from those of other shards.
        - An image is in one unit; validation and test images are in none.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._first = np.cumsum([0, *(len(shard.images) for shard in shards)])
        rows = np.flatnonzero(np.concatenate([shard.split == "train" for shard in shards]))
        modality = np.concatenate([shard.modality for shard in shards])[rows]
        self.modalities = [int(m) for m in np.unique(modality)]
        unit = _identities(shards)[rows]
        order = np.argsort(unit, kind="stable")
        self._rows: Rows = rows[order]  # images, those of a patient together
        self._starts = np.append(np.unique(unit[order], return_index=True)[1], len(rows))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def images_of(self, patient: int) -> Rows:
        """Training images of a patient, numbered over all shards."""
        return self._rows[self._starts[patient] : self._starts[patient + 1]]

    def kind_of(self, image: int) -> Kind:
        """Modality and shape [H, W, C] of an image: what images share that can be stacked."""
        shard, row = self._locate(image)
        return int(shard.modality[row]), shard.images.shape[1:]

    def pixels_of(self, image: int) -> NDArray[np.uint8]:
        """An image [H, W, C]."""
        shard, row = self._locate(image)
        return np.asarray(shard.images[row])

    def _locate(self, image: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._first, image, side="right")) - 1
        return self.shards[number], image - int(self._first[number])


def draw_patients(
    patients: Patients, rate: float, most_images: int, random: PrivateRandom
) -> list[Rows]:
    """One step's patients, each with at most `most_images` of its images.

    **Guarantees**:
        - Every patient is drawn with probability `rate`, independently of all others and of other
          steps. The number drawn varies, and may be 0.
        - Which images stand for a patient depends on no other patient.

    Args:
        patients: of the site.
        rate: a constant of the recipe, never computed from the number of patients.
        most_images: of a patient in a step.
        random: the source of all draws.

    Returns:
        Image numbers of each patient that was drawn, at least one each.
    """
    drawn = np.flatnonzero(random.uniform(len(patients)) < rate)
    return [_some(patients.images_of(int(patient)), most_images, random) for patient in drawn]


def _some(rows: Rows, most: int, random: PrivateRandom) -> Rows:
    if len(rows) <= most:
        return rows
    return rows[np.argsort(random.uniform(len(rows)))[:most]]


def _identities(shards: Sequence[Shard]) -> Rows:
    """A number for the patient of each image [N], the same where tables use the same key."""
    keys = [_keys(shard) for shard in shards]
    _, named = np.unique(np.concatenate(keys), return_inverse=True)
    nobody = np.concatenate(keys) == b""
    identity = np.where(nobody, len(named) + np.arange(len(named)), named)  # [P over all shards]
    first = np.cumsum([0, *map(len, keys)])
    return np.concatenate(
        [identity[start + shard.patient] for start, shard in zip(first, shards, strict=False)]
    )


def _keys(shard: Shard) -> NDArray[np.bytes_]:
    if shard.keys is not None:
        return shard.keys
    return np.zeros(int(shard.patient.max()) + 1, dtype="S1")
