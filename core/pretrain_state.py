"""What a pretraining that was killed goes on from: a file, written now and then."""

import time
from pathlib import Path
from typing import Final

import torch

from core.backbone import Network
from core.checkpoint import load_arrays, save_arrays
from core.optimizer import load_moments, moment_arrays
from core.train import load_network, network_arrays
from core.wire import take

KEPT_SECONDS: Final = 60.0


class PretrainState:
    """Networks and moments of a pretraining, and the file that has them as they were.

    Args:
        file: The file. It is not removed at the end: only who has written the result may do that.
        of: Names what is pretrained, and how. A file of another name counts for nothing.
        network: The network that learns.
        averaged: The average of its weights.
        optimizer: With its moments.
    """

    def __init__(
        self,
        file: Path,
        of: str,
        network: Network,
        averaged: Network,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._file, self._of = file, of
        self._network, self._averaged, self._optimizer = network, averaged, optimizer
        self._written = time.monotonic()

    def load(self) -> int:
        """Put everything back as it was; returns the steps that are done.

        Raises:
            UserError: the file is damaged.
        """
        if not self._file.exists():
            return 0
        arrays, facts = load_arrays(self._file)
        if facts.get("of") != self._of:
            return 0
        load_network(self._network, take(arrays, "network/"))
        load_network(self._averaged, take(arrays, "averaged/"))
        load_moments(self._optimizer, self._network, arrays)
        return int(facts["steps"])

    def save(self, done: int, *, last: bool) -> None:
        """Write it, if that is a while ago or there is no more to come."""
        if not last and time.monotonic() - self._written < KEPT_SECONDS:
            return
        arrays = moment_arrays(self._optimizer, self._network)
        for prefix, network in (("network/", self._network), ("averaged/", self._averaged)):
            arrays |= {f"{prefix}{name}": a for name, a in network_arrays(network).items()}
        save_arrays(self._file, arrays, {"of": self._of, "steps": str(done)})
        self._written = time.monotonic()
