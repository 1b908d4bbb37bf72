"""Labelled phantoms of all seven modalities, drawn here: a first run needs no download.

They look like the real thing at a glance and teach nothing medical. A patient's images share the
anatomy and differ by pose, exposure and noise; exposure varies enough that mean brightness does not
tell the classes apart.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

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

WORTH_A_PROCESS: Final = 1500
"""Pictures for which a process of its own pays: drawing these takes some 7 seconds."""
PART: Final = 100
"""Pictures of a modality that one draws at a time."""


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
    images = _draw(modality, range(patients), images_per_patient, px, seed)
    numbers = np.repeat(np.arange(patients), images_per_patient)
    return Shard(
        name=f"phantoms-{modality}",
        images=images,
        modality=np.full(len(images), index, dtype=np.int16),
        patient=numbers,
        label=numbers % len(classes),
        split=np.array(SPLIT_CYCLE)[numbers // len(classes) % len(SPLIT_CYCLE)],
        classes={modality: classes},
    )


def draw_pictures(count: int, *, px: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Modality -> pictures [count, px, px, C], a patient each, by all processors that we may use.

    They are those of `make_phantoms` with that many patients, whoever draws them. Each process
    imports the program's main module: one that imports torch first costs more than this saves.
    """
    processors = min(len(os.sched_getaffinity(0)), count * len(MODALITIES) // WORTH_A_PROCESS)
    if processors < 2:
        return {name: _draw(name, range(count), 1, px, seed) for name in MODALITIES}
    parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half
    with ProcessPoolExecutor(processors, spawn, _end_with, (os.getpid(),)) as pool:
        tasks = {
            name: [pool.submit(_draw, name, part, 1, px, seed) for part in parts]
            for name in MODALITIES
        }
        return {name: np.concatenate([t.result() for t in asked]) for name, asked in tasks.items()}


def _draw(modality: str, patients: range, each: int, px: int, seed: int) -> NDArray[np.uint8]:
    """Pictures [N * each, px, px, C] of some patients."""
    index, classes, canvas = MODALITIES.index(modality), CLASSES[modality], new_canvas(px)
    images = []
    for patient in patients:
        key = [seed, index, patient]
        draw = PATIENTS[modality](classes[patient % len(classes)], np.random.default_rng(key))
        for image in range(each):
            drawn = draw(canvas, np.random.default_rng([*key, 1 + image]))
            images.append(np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8))
    return np.stack(images).reshape(len(images), px, px, -1)


def _end_with(parent: int) -> None:
    """A worker waits for tasks for ever, also when who gives them was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before
        os._exit(1)
