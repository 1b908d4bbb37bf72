"""Several processes of one site that train together, each on a device of its own.

Every rank holds the same networks, moments and memory, takes some of a step's images, and adds its
sums to those of the others: torch.distributed, by hand. Its wrappers average over ranks and expect
one backward pass a step; here a step has several, and what is added up are parts of one mean.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(Exception):
    """Another rank is gone or does not answer: what ails it, it says itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    """The first reports, measures and saves."""
    count: int = 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks: the same bits on all of them.

        Raises:
            RankLost: the others cannot be reached.
        """
        if self.count == 1:
            return
        try:
            # All at once: many of them are small, and their latencies then overlap.
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise RankLost(str(error)) from error

    def gather(self, own: Tensor, first: int, total: int) -> Tensor:
        """Rows of all ranks [V, total, D], of which this one has `own` [V, b, D] from `first` on.

        A sum of zeros and rows: the ranks may have different numbers of rows, and no bit changes.
        """
        if self.count == 1:
            return own
        whole = own.new_zeros((len(own), total, own.shape[2]))
        whole[:, first : first + own.shape[1]] = own
        self.add([whole])
        return whole


ALONE = Ranks()


@contextmanager
def join_ranks(
    meet: Path, rank: int, count: int, device: torch.device, seconds: float
) -> Iterator[Ranks]:
    """Meet the other ranks, on one machine; leave them at the end.

    Args:
        meet: a file that the ranks alone know; it must not exist before the first comes.
        rank: of this process, from 0.
        count: of all.
        device: where the tensors are that will be added.
        seconds: how long to wait for the others, each time.

    Raises:
        RankLost: not all came.
    """
    place = device if device.type == "cuda" else None
    if place is not None:
        torch.cuda.set_device(place)
    try:
        dist.init_process_group(
            "nccl" if place is not None else "gloo",
            store=dist.FileStore(str(meet), count),  # type: ignore[attr-defined]
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=seconds),
            device_id=place,
        )
    except RuntimeError as error:
        raise RankLost(str(error)) from error
    try:
        yield Ranks(rank, count)
    finally:
        dist.destroy_process_group()
