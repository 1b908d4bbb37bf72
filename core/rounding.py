"""Tensors in fewer bits, each with one float32 scale: float16, or whole numbers of eight bits.

HALF    float16; the scale is a power of two.
EIGHT   int8 from -127 to 127; the scale is a 127th of the tensor's largest number. A scale for each
        row or block of 256 would take a third from the error of a site's change late in a study and
        nothing early, .8 % of its length at most (benchmarks/README.md): not worth its bytes.

Error of HALF, for each element x of a tensor: at most |x| * 2^-11, or max|tensor| * 2^-39 where
that is more. Error of EIGHT: at most max|tensor| / 253, or 2^-127 where that is more. In both, zero
stays zero and nothing up to 2^127 overflows; in HALF no tensor vanishes, however small it is.
What is not finite stays so: in EIGHT, which has no number for it, with its whole tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

RELATIVE_ERROR: Final = 2.0**-11
FLOOR: Final = 2.0**-39
"""Largest error of one element in HALF, in units of its own size and of its tensor's largest."""
TOP_EXPONENT: Final = 15
"""Scaled tensors lie within 2^15: rounding up cannot reach float16's end at 65,504."""
SMALLEST_EXPONENT: Final = -126
"""Of a normal float32; with it even the smallest subnormal is a float16."""

LEVELS: Final = 127
TENSOR_ERROR: Final = 1 / 253
"""Largest error of one element in EIGHT, in units of its tensor's largest: half of one of 127
steps, and what float32 takes from scale and product."""
TENSOR_FLOOR: Final = 2.0**-127
"""Half of the smallest scale."""


@dataclass(frozen=True)
class Rounding:
    """A way to write tensors."""

    dtype: np.dtype[Any]
    encode: Callable[[NDArray[Any]], tuple[NDArray[Any], float]]
    """A float32 tensor -> the same shape in `dtype`, and its scale."""
    carries_nan: bool
    """Whether a tensor that is not finite has a finite scale."""


def decode(array: NDArray[Any], scale: np.float32) -> NDArray[np.float32]:
    """What was encoded, up to the stated error."""
    decoded: NDArray[np.float32] = array.astype(np.float32) * scale
    return np.asarray(decoded)  # a scalar tensor's product is no array


def _half(tensor: NDArray[Any]) -> tuple[NDArray[Any], float]:
    largest, scale = float(np.abs(tensor).max(initial=0)), 1.0
    if largest != 0 and np.isfinite(largest):
        exponent = int(np.frexp(largest)[1]) - TOP_EXPONENT
        scale = float(2.0 ** max(exponent, SMALLEST_EXPONENT))
    return np.asarray(tensor / np.float32(scale), np.float16), scale


def _eight(tensor: NDArray[Any]) -> tuple[NDArray[Any], float]:
    largest = float(np.abs(tensor).max(initial=0))
    if largest == 0 or not np.isfinite(largest):
        return np.zeros(tensor.shape, np.int8), 1.0 if largest == 0 else float("nan")
    scale = np.float32(max(largest / LEVELS, 2.0**SMALLEST_EXPONENT))
    codes = np.rint(tensor / scale)
    return np.asarray(np.clip(codes, -LEVELS, LEVELS), np.int8), float(scale)


HALF: Final = Rounding(np.dtype(np.float16), _half, carries_nan=True)
EIGHT: Final = Rounding(np.dtype(np.int8), _eight, carries_nan=False)
