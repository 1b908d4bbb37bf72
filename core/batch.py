"""The images of a step: a batch of each modality, and the parts that go through the networks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from torch import Tensor


class Images(Protocol):
    """Images that are read when they are sliced: a tensor, or files of which a rank needs some."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """uint8 [B, C, H, W]."""
        ...


@dataclass
class Batch:
    """Images of one modality."""

    modality: int
    images: Images
    patients: Tensor  # int64 [B]


@dataclass(frozen=True)
class Part:
    """Images of a step that go through the networks together."""

    first: int
    """Place of the first among all the step's images, batch after batch."""
    rows: Sequence[tuple[int, slice]]
    """Number of a batch, and which of its images."""


def cut_parts(sizes: Sequence[int], count: int) -> list[Part]:
    """Cut the images of batches of these sizes, in order, into parts that differ by at most one."""
    starts = [0, *accumulate(sizes)]
    edges = [starts[-1] * number // count for number in range(count + 1)]
    parts = []
    for low, high in pairwise(edges):
        rows = [
            (number, slice(max(low - start, 0), min(high - start, size)))
            for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
            if low < start + size and start < high
        ]
        parts.append(Part(low, rows))
    return parts
