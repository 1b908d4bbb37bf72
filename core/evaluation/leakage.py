"""What the test images share with the images a model learned from: patients, images, near-copies.

Compared are the splits of each shard and of all shards of one data directory with each other. The
number of a patient means something within its shard only; copies are found across shards.

A near-copy is the same picture saved again, or the next slice of the same patient. Two images of
one modality count as such when their brightness slopes, on a 16 x 16 thumbnail of the whole image
and on one of its middle half, both correlate by at least NEAR. The middle is asked because frames
and round masks make all fundus photographs alike. Measured at 64 pixels on test images with
their 43,000 to 2 million pairs of distinct images: none flagged in X-ray, OCT, fundus, skin and
pathology; in ultrasound 10 of 141 and in CT 69 of 600, which are true neighbours where looked at.
Found again of images copied with JPEG quality 75: 89 % (fundus) to 100 %; with a tenth more
brightness or another gamma 98 to 100 %; shifted, cropped, mirrored or turned ones are missed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import SPLITS, Shard

PATIENT: Final = "patient"
IDENTICAL: Final = "identical image"
NEAR_IDENTICAL: Final = "near-identical image"
NEAR: Final = 0.9
EXAMPLES: Final = 5
CHUNK: Final = 1024
"""Images whose thumbnails, or whose likeness to all others, are computed at once."""
THUMBNAIL_PX: Final = 16

Floats = NDArray[np.float32]
Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    """One way in which two splits overlap.

    Attributes:
        shard: name, or "one + other" where the splits are of two shards.
        kind: "patient", "identical image" or "near-identical image".
        splits: the one learned from, then the one that measures, in the order of `shard`.
        count: patients in both splits, or images of the second split with a copy in the first.
        examples: at most five, as text with the rows in the shards' tables, from 0.
    """

    shard: str
    kind: str
    splits: tuple[str, str]
    count: int
    examples: tuple[str, ...]


def find_leaks(shards: Sequence[Shard]) -> list[Finding]:
    """All overlaps: of patients between any two splits, of images between test and the others.

    Takes a few seconds for 20,000 images.

    Args:
        shards: of one data directory.
    """
    findings = [finding for shard in shards for finding in _patients(shard)]
    images = _Images(shards)
    identical, near = _identical(images), _near_identical(images)
    near = near[~np.isin(images.meeting(near), images.meeting(identical))]
    return [
        *findings,
        *_report(images, IDENTICAL, identical),
        *_report(images, NEAR_IDENTICAL, near),
    ]


def refuse_leaks(findings: Sequence[Finding], *, report_only: bool = False) -> None:
    """Refuse figures of test images that the model may have learned from.

    Near-identical images are never refused: alone they prove nothing.

    Raises:
        UserError: patients or identical images are in two splits, unless `report_only`.
    """
    for finding in findings:
        if finding.kind == NEAR_IDENTICAL or report_only:
            continue
        first, second = finding.splits
        raise UserError(
            f"shard '{finding.shard}': {finding.count} {finding.kind}(s) of '{second}' are also in "
            f"'{first}' ({finding.examples[0]}); take them out of one, or ask to only report leaks"
        )


class _Images:
    """The images of several shards, numbered one after the other."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        sizes = [len(shard.images) for shard in shards]
        self.first = np.cumsum([0, *sizes])
        self.shard = np.repeat(np.arange(len(shards)), sizes)
        self.split = np.concatenate([shard.split for shard in shards])
        self.modality = np.concatenate([shard.modality for shard in shards])
        self.place = self.shard * len(SPLITS)  # and of each split
        for number, split in enumerate(SPLITS):
            self.place[self.split == split] += number

    def describe(self, image: int) -> str:
        shard = self.shard[image]
        return f"{self.split[image]} image {image - self.first[shard]}"

    def meeting(self, pairs: Pairs) -> Pairs:
        """A number for the shard and split of the first image, and the second image."""
        return np.asarray(self.place[pairs[:, 0]] * len(self.split) + pairs[:, 1])

    def once(self, pairs: Pairs) -> Pairs:
        """The first of the pairs of a test image with each shard and split."""
        return pairs[np.unique(self.meeting(pairs), return_index=True)[1]]


def _patients(shard: Shard) -> Iterator[Finding]:
    members = {split: np.unique(shard.patient[shard.split == split]) for split in SPLITS}
    for first, second in (("train", "test"), ("val", "test"), ("train", "val")):
        both = np.intersect1d(members[first], members[second])
        if len(both):
            examples = tuple(f"patient number {number}" for number in both[:EXAMPLES])
            yield Finding(shard.name, PATIENT, (first, second), len(both), examples)


def _report(images: _Images, kind: str, pairs: Pairs) -> Iterator[Finding]:
    """A finding for each two places; pairs are (image learned from, test image), as `once`."""
    sign = "=" if kind == IDENTICAL else "~"
    learned_from, measured = images.place[pairs[:, 0]], images.shard[pairs[:, 1]]
    for place, other in np.unique(np.stack([learned_from, measured], 1), axis=0).tolist():
        found = pairs[(learned_from == place) & (measured == other)]
        one = place // len(SPLITS)
        names = [images.shards[number].name for number in (one, other)]
        yield Finding(
            shard=names[0] if one == other else " + ".join(names),
            kind=kind,
            splits=(SPLITS[place % len(SPLITS)], "test"),
            count=len(found),
            examples=tuple(
                f"{images.describe(learned)} {sign} {images.describe(test)}"
                for learned, test in found[:EXAMPLES].tolist()
            ),
        )


def _identical(images: _Images) -> Pairs:
    """Pairs (image learned from, test image) with the same pixels, by their hash."""
    digest = [
        hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.shape).encode()).digest()
        for shard in images.shards
        for image in shard.images
    ]
    tests = np.flatnonzero(images.split == "test").tolist()
    first: dict[bytes, dict[int, int]] = {digest[test]: {} for test in tests}
    for image in np.flatnonzero(images.split != "test").tolist():
        if digest[image] in first:
            first[digest[image]].setdefault(int(images.place[image]), image)
    pairs = [(image, test) for test in tests for image in first[digest[test]].values()]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _near_identical(images: _Images) -> Pairs:
    """Pairs (image learned from, test image) of one modality that look the same."""
    parts = [_fingerprints(shard) for shard in images.shards]
    prints = [np.concatenate(part) for part in zip(*parts, strict=True)]
    pairs = [np.empty((0, 2), np.int64)]
    for modality in range(len(MODALITIES)):
        same = images.modality == modality
        learned = np.flatnonzero(same & (images.split != "test"))
        tests = np.flatnonzero(same & (images.split == "test"))
        for start in range(0, len(tests), CHUNK):
            some = tests[start : start + CHUNK]
            near = np.logical_and(*(part[some] @ part[learned].T >= NEAR for part in prints))
            test, image = np.nonzero(near)
            pairs.append(images.once(np.stack([learned[image], some[test]], 1)))
    return np.concatenate(pairs)


def _fingerprints(shard: Shard) -> tuple[Floats, Floats]:
    """Brightness slopes [N, 480] of the whole images and of their middle half, of unit length."""
    px = shard.images.shape[1]
    edge = px // 4
    whole, middle = [], []
    for start in range(0, len(shard.images), CHUNK):
        grey = shard.images[start : start + CHUNK].mean(3, dtype=np.float32)  # [n, px, px]
        whole.append(_slopes(grey))
        middle.append(_slopes(grey[:, edge : px - edge, edge : px - edge]))
    return np.concatenate(whole), np.concatenate(middle)


def _slopes(grey: Floats) -> Floats:
    shrink = _box_filter(grey.shape[1], THUMBNAIL_PX)
    small = shrink @ grey @ shrink.T  # [n, 16, 16]
    slopes = np.concatenate(
        [np.diff(small, axis=axis).reshape(len(small), -1) for axis in (1, 2)], axis=1
    )
    slopes -= slopes.mean(1, keepdims=True)
    length = np.linalg.norm(slopes, axis=1, keepdims=True)
    # An image of one brightness has no slopes and resembles nothing.
    return np.where(length > 1e-3, slopes / np.maximum(length, 1e-3), 0)


def _box_filter(px: int, to: int) -> Floats:
    """Matrix [to, px] that averages a line of pixels into `to` equal stretches."""
    edges = np.linspace(0, px, to + 1)
    pixel = np.arange(px)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (covered.clip(0) * to / px).astype(np.float32)
