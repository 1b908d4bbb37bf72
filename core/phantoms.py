"""Labelled phantoms of all seven modalities, drawn here: a first run needs no download.

They look like the real thing at a glance and teach nothing medical. A patient's images share the
anatomy and differ by pose, exposure and noise; exposure varies enough that mean brightness does not
tell the classes apart.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.random import Generator

from core.errors import UserError
from core.modalities import MODALITIES
from core.phantoms_colour import cfp, dermatology, pathology
from core.phantoms_draw import new_canvas
from core.phantoms_layers import oct_scan, us
from core.phantoms_radiology import Draw, ct, cxr
from core.shards import Shard

CLASSES: Final[dict[str, tuple[str, ...]]] = {
    "ct": ("head", "chest", "abdomen"),
    "cxr": ("normal", "opacity"),
    "us": ("normal", "benign", "malignant"),
    "pathology": ("glands", "crowded", "atypical"),
    "cfp": ("normal", "lesions"),
    "oct": ("normal", "fluid", "drusen"),
    "dermatology": ("regular", "irregular"),
}
PATIENTS: Final[dict[str, Callable[[str, Generator], Draw]]] = {
    "ct": ct,
    "cxr": cxr,
    "us": us,
    "pathology": pathology,
    "cfp": cfp,
    "oct": oct_scan,
    "dermatology": dermatology,
}
SPLIT_CYCLE: Final = ("train", "test", "val", "train", "train", "train", "train")
"""Splits of a class's patients in turn: five of seven train, and few patients still fill all."""


def make_phantoms(
    modality: str, *, patients: int, images_per_patient: int, px: int, seed: int
) -> Shard:
    """Draw a labelled shard of one modality.

    The same arguments give the same bits; more patients or images extend what fewer give.

    Args:
        modality: One of MODALITIES.
        patients: How many; the classes take turns, so all are equally frequent.
        images_per_patient: Images of each, all in one split.
        px: Side of the square images in pixels.
        seed: Any number of 0 or more.

    Raises:
        UserError: unknown modality, or a count or size that is too small.
    """
    if modality not in MODALITIES:
        raise UserError(f"expected a modality of {', '.join(MODALITIES)}, found '{modality}'")
    if patients < 1 or images_per_patient < 1 or px < 16 or seed < 0:
        raise UserError(
            "phantoms need at least 1 patient, 1 image each, 16 px and a seed of 0 or more; found "
            f"{patients} patients, {images_per_patient} images, {px} px, seed {seed}"
        )
    index = MODALITIES.index(modality)
    classes = CLASSES[modality]
    canvas = new_canvas(px)
    images = []
    for patient in range(patients):
        key = [seed, index, patient]
        draw = PATIENTS[modality](classes[patient % len(classes)], np.random.default_rng(key))
        for image in range(images_per_patient):
            drawn = draw(canvas, np.random.default_rng([*key, 1 + image]))
            images.append(np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8))
    numbers = np.repeat(np.arange(patients), images_per_patient)
    return Shard(
        name=f"phantoms-{modality}",
        images=np.stack(images).reshape(len(images), px, px, -1),
        modality=np.full(len(images), index, dtype=np.int16),
        patient=numbers,
        label=numbers % len(classes),
        split=np.array(SPLIT_CYCLE)[numbers // len(classes) % len(SPLIT_CYCLE)],
        classes={modality: classes},
    )
