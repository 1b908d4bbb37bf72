"""A parcel: the small arrays of a record in one, for a transport that asks for each on its own.

Flower fetches every array of a message by two requests, each signed, checked and written to a
database, on each of the six ways between server and site: a network of a hundred small tensors pays
that a hundredfold. Large arrays travel alone, as they always have.

**Guarantees**, for any bytes that come as a parcel:
    - What `open_parcel` puts into the record are plain arrays of numbers, none under a name that
      was there already.
    - What cannot be read as a parcel, to its last byte, stays closed under its own name, which no
      list of what may be sent has: whoever takes the record refuses it.
    - No more arrays are made than `MOST_ARRAYS`.
"""

import struct
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.npy import NotAnArray, read_npy

PARCEL: Final = "parcel"
SMALL_BYTES: Final = 1_048_576
"""Sending so much takes as long as the requests that it costs."""
MOST_ARRAYS: Final = 4096
ENTRY: Final = struct.Struct("<HI")
"""Before each array: bytes of its name, bytes of its file."""


class Held(Protocol):
    """What a record holds: an array as Flower has it."""

    stype: str
    data: bytes


Kind = TypeVar("Kind", bound=Held)


def close_parcel(record: MutableMapping[str, Kind], make: Callable[[NDArray[Any]], Kind]) -> None:
    """Put the small arrays of a record into one; without two of them, or closed, it stays as it is.

    Args:
        record: Name -> array in numpy's file format.
        make: Makes what a record holds.
    """
    small = [name for name, array in record.items() if len(array.data) <= SMALL_BYTES][:MOST_ARRAYS]
    if PARCEL in record or len(small) < 2:
        return
    parts: list[bytes] = []
    for name in small:
        data, written = record.pop(name).data, name.encode()
        parts += [ENTRY.pack(len(written), len(data)), written, data]
    record[PARCEL] = make(np.frombuffer(b"".join(parts), np.uint8))


def open_parcel(record: MutableMapping[str, Kind], make: Callable[[NDArray[Any]], Kind]) -> None:
    """Put the arrays of a parcel back into their record.

    Args:
        record: As it came, with a parcel or without.
        make: Makes what a record holds.
    """
    if PARCEL not in record:
        return
    try:
        arrays = _unpack(read_npy(record[PARCEL].data))
    except NotAnArray:
        return
    if record.keys().isdisjoint(arrays):
        del record[PARCEL]
        for name, array in arrays.items():
            record[name] = make(array)


def _unpack(parcel: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Name -> array.

    Raises:
        NotAnArray: it is no parcel.
    """
    if parcel.ndim != 1 or parcel.dtype != np.uint8:
        raise NotAnArray("no row of bytes")
    if not parcel.size:
        raise NotAnArray("no arrays")
    data, place = parcel.tobytes(), 0
    arrays: dict[str, NDArray[Any]] = {}
    while place < len(data):
        try:
            name_bytes, array_bytes = ENTRY.unpack_from(data, place)
            place += ENTRY.size
            name = data[place : place + name_bytes].decode()
        except (struct.error, UnicodeDecodeError):
            raise NotAnArray("an entry without a name") from None
        place += name_bytes + array_bytes
        if place > len(data) or array_bytes > SMALL_BYTES or name in arrays or name == PARCEL:
            raise NotAnArray("an entry that does not fit")
        if len(arrays) == MOST_ARRAYS:
            raise NotAnArray("too many arrays")
        arrays[name] = read_npy(data[place - array_bytes : place])
    return arrays
