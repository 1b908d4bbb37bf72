"""Modality-balanced batches as a pure function of the step."""

import numpy as np
from numpy.typing import NDArray

from core.randomness import numpy_generator


def batch_share(modalities: int, index: int, batch_size: int, step: int) -> tuple[int, int]:
    """Where modality `index` of `modalities` stands in its stream, and how many images it takes.

    A batch is split evenly; what is left over goes to other modalities in turn as steps go by, so
    over `modalities` steps all take the same.

    Returns:
        Images taken in all earlier steps, and images of this step.
    """
    base, left = divmod(batch_size, modalities)
    turns, rest = divmod(step, modalities)
    extra = turns * left + sum((index - s) % modalities < left for s in range(rest))
    return step * base + extra, base + ((index - step) % modalities < left)


def draw(pool: NDArray[np.int64], start: int, count: int, *key: int | str) -> NDArray[np.int64]:
    """Entries start..start+count-1 of an endless stream of reshuffled passes over `pool`.

    A small pool is thus repeated and a large one cut, as in MerMED-FM's sampler; the stream has no
    state, so any step can be drawn after a restart.

    Args:
        pool: candidate indices [n], n >= 1.
        start: how many entries earlier steps have taken.
        count: entries to take; may exceed n.
        key: what the stream is for (seed, site, modality).

    Returns:
        Indices [count].
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, len(pool))
        order = numpy_generator(*key, epoch).permutation(len(pool))
        part = order[offset : offset + count]
        parts.append(pool[part])
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)
