"""What the hostile site of benchmarks/hostile_updates.py makes of its replies."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, Message

from core.wire import COUNTS, PROTOTYPES, STUDENT, TEACHER


class Fault:
    """Changes replies from round 2 on; the first is kept for later."""

    def __init__(self, change: Callable[["Fault"], None]) -> None:
        self.change = change
        self.first: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.sent: dict[str, Any] = {}
        self.rng = np.random.default_rng(0)

    def __call__(self, sent: Message, reply: Message) -> Message:
        """Change a reply to what was sent."""
        self.arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        self.metrics = dict(reply.content["metrics"])
        self.sent = {n: a.numpy() for n, a in sent.content["arrays"].items()}
        if sent.content["config"]["round"] == 1:
            self.first = {"arrays": self.arrays, "metrics": self.metrics}
            return reply
        self.change(self)
        for record, values in (("arrays", self.arrays), ("metrics", self.metrics)):
            reply.content[record].clear()
            for name, value in values.items():
                whole = Array(value) if isinstance(value, np.ndarray) else value
                reply.content[record][name] = whole
        return reply

    def scale(self, factor: float) -> None:
        """Stretch the change of student and teacher."""
        for name in [n for n in self.arrays if n.startswith((STUDENT, TEACHER))]:
            start = self.sent[name]
            moved = start + np.float64(factor) * (self.arrays[name].astype(np.float64) - start)
            self.arrays[name] = moved.astype(np.float32)

    def flood(self, count: float) -> None:
        """Fill every slot with a random direction."""
        for name in [n for n in self.arrays if n.startswith(PROTOTYPES)]:
            rows = self.rng.normal(size=(8, 32))
            self.arrays[name] = (rows / np.linalg.norm(rows, axis=1)[:, None]).astype(np.float32)
            counts = np.full(8, count, np.float32)
            self.arrays[COUNTS + name.removeprefix(PROTOTYPES)] = counts


def nan(fault: Fault) -> None:
    name = next(n for n in fault.arrays if n.startswith(STUDENT))
    fault.arrays[name] = fault.arrays[name].copy()
    fault.arrays[name].flat[0] = np.nan


def replay(fault: Fault) -> None:
    now = fault.metrics["round"]
    fault.arrays, fault.metrics = dict(fault.first["arrays"]), dict(fault.first["metrics"])
    fault.metrics["round"] = now


def old_round(fault: Fault) -> None:
    fault.arrays, fault.metrics = dict(fault.first["arrays"]), dict(fault.first["metrics"])


def oversized(fault: Fault) -> None:
    for number in range(8):
        for name in [n for n in fault.sent if n.startswith(STUDENT)]:
            fault.arrays[f"student/{number}/{name}"] = fault.sent[name]


def malformed(fault: Fault) -> None:
    name = next(n for n in fault.arrays if n.startswith(STUDENT))
    whole = Array(fault.arrays[name])
    fault.arrays[name] = Array("float32", whole.shape, whole.stype, whole.data[:-4])


def weight_grab(fault: Fault) -> None:
    for name in [n for n in fault.metrics if n.startswith("num_examples/")]:
        fault.metrics[name] = 100_000_000


KINDS: dict[str, tuple[str, Callable[[Fault], None]]] = {
    "nan": ("a NaN", nan),
    "replay": ("replay of its round 1 under the new number", replay),
    "old_round": ("its round 1 again, as it was", old_round),
    "oversized": ("nine students in one reply", oversized),
    "malformed": ("an array of the wrong length", malformed),
    "scaled": ("scaled x 100", lambda fault: fault.scale(100)),
    "flipped": ("sign flipped", lambda fault: fault.scale(-1)),
    "flipped_10": ("sign flipped, x 10", lambda fault: fault.scale(-10)),
    "within": ("scaled x 2.5, within the bound", lambda fault: fault.scale(2.5)),
    "flood": ("8 random prototypes, counts of 1e8", lambda fault: fault.flood(1e8)),
    "flood_16": ("8 random prototypes, counts admissible", lambda fault: fault.flood(16)),
    "weight": ("claims 1e8 images a modality", weight_grab),
}
