"""The spool: arrays of the round's admitted updates, on disk instead of in memory.

A site's weight depends on the images of all admitted sites, and the order of a sum must not depend
on who answers first: both are known only when the round closes. Until then arrays wait in a file
without a name, which the system takes back with the process, however that ends.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.wire import SiteUpdate


class Spool:
    """One round's file, gone when the context is left.

    Args:
        directory: A directory on a disk with room for all updates of a round.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 lives as long as we do

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, update: SiteUpdate) -> SiteUpdate:
        """The same update with its student and teacher on disk.

        Raises:
            UserError: the disk is full or broken.
        """
        try:
            student, teacher = self._write(update.student), self._write(update.teacher)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"'{self._directory}' cannot hold the updates of a round: {error}; it needs room "
                "for one update of each site; make room and run again: the study resumes"
            ) from None
        return replace(update, student=student, teacher=teacher)

    def _write(self, arrays: Mapping[str, NDArray[Any]]) -> "SpooledArrays":
        places: dict[str, _Place] = {}
        for name, array in arrays.items():
            places[name] = _Place(self._file.tell(), array.dtype, array.shape)
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return SpooledArrays(self._file, places)


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class SpooledArrays(Mapping[str, NDArray[Any]]):
    """Named arrays in a file; each is read anew whenever it is asked for."""

    def __init__(self, file: IO[bytes], places: Mapping[str, _Place]) -> None:
        self._file = file
        self._places = places

    def __getitem__(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        count = int(np.prod(place.shape, dtype=np.int64))
        return self.part(name, slice(0, count)).reshape(place.shape)

    def part(self, name: str, part: slice) -> NDArray[Any]:
        """Numbers of an array, in C order."""
        place, count = self._places[name], part.stop - part.start
        self._file.seek(place.offset + part.start * place.dtype.itemsize)
        # Read, not mapped: pages of a map would count as memory of this process.
        array = np.fromfile(self._file, place.dtype, count)
        assert array.size == count, "the spool is shorter than what was written"
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_part(arrays: Mapping[str, NDArray[Any]], name: str, part: slice) -> NDArray[Any]:
    """Numbers of a named array in C order; of a spooled one, no more than they are read."""
    if isinstance(arrays, SpooledArrays):
        return arrays.part(name, part)
    return arrays[name].reshape(-1)[part]
