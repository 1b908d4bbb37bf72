"""From grey values of any depth to the 256 of a picture."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.ingest.types import Reason, Rejected

PERCENTILES: Final = (0.5, 99.5)
SAMPLES: Final = 1_000_000
"""About so many values decide the percentiles: the whole of a large volume is not sorted."""


def robust_range(values: NDArray[np.generic]) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles: a hot pixel or a marker does not squeeze the rest.

    Args:
        values: Integers or floats of one image or volume, of any shape but an empty one; NaN and
            infinities do not count.

    Returns:
        Low and high; the extremes where the percentiles are equal.

    Raises:
        Rejected: NOT_FINITE when there is no finite value.
    """
    step = max(1, math.ceil((values.size / SAMPLES) ** (1 / max(values.ndim, 1))))
    sample = values[(slice(None, None, step),) * values.ndim].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise Rejected(Reason.NOT_FINITE)
    low, high = np.percentile(sample, PERCENTILES)
    if low == high:
        low, high = sample.min(), sample.max()
    return float(low), float(high)


def to_bytes(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """Map low..high to 0..255, rounded; what lies outside is clipped, NaN is 0 (background)."""
    with np.errstate(all="ignore"):
        scaled = values.astype(np.float32)
        scaled -= np.float32(low)
        scaled *= np.float32(255.0 / (high - low) if high > low else 0.0)
        np.clip(scaled, 0.0, 255.0, out=scaled)
    scaled[np.isnan(scaled)] = 0.0
    return np.rint(scaled, out=scaled).astype(np.uint8)
