"""A strict reader of numpy's file format, for bytes that come from outside."""

import io
import math
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MOST_HEADER_CHARACTERS: Final = 1024
"""Of what is parsed; numpy's own headers of plain arrays have about a hundred."""
VERSIONS: Final = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NotAnArray(ValueError):
    """Bytes that are not one plain array; the text says why and repeats none of them."""


def read_npy(data: bytes) -> NDArray[Any]:
    """The array that numpy.save wrote; it shares the bytes, and cannot be written to.

    Args:
        data: The whole file.

    Raises:
        NotAnArray: it is anything else.

    **Guarantees**, for any bytes:
        - Nothing is unpickled: only whole and floating-point numbers of at most 8 bytes are read.
        - No memory is taken for what a header claims: the bytes must be there.
        - Bytes that do not fit the header, too few or too many, are refused.
    """
    file = io.BytesIO(data)
    try:
        read_header = VERSIONS[npy.read_magic(file)]
        shape, fortran, dtype = read_header(file, max_header_size=MOST_HEADER_CHARACTERS)
    except Exception as error:  # whatever hostile bytes make the parser raise
        raise NotAnArray(f"no header of a numpy array ({type(error).__name__})") from None
    if dtype.kind not in "fiu" or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise NotAnArray("not an array of plain numbers")
    if any(type(side) is not int or side < 0 for side in shape):
        raise NotAnArray("a side of its shape is not a whole number")
    if (found := len(data) - file.tell()) != math.prod(shape) * dtype.itemsize:
        raise NotAnArray(f"{found} bytes of numbers are not what its shape needs")
    numbers = np.frombuffer(data, dtype, offset=file.tell())
    return numbers.reshape(shape[::-1]).T if fortran else numbers.reshape(shape)
