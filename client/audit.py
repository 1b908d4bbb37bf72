"""The audit file: one line for every message in or out, for the hospital's privacy office.

It says what crossed the wire by name, shape, size and digest; it holds no pixel, no patient key
and no path of an image.
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.checkpoint import Arrays, sha256_arrays

FILE = "audit.jsonl"


@dataclass(frozen=True)
class Audit:
    """Appends to `audit.jsonl` in a directory, on behalf of a study and a round (0: none)."""

    directory: Path
    study: str = ""
    round_number: int = 0

    def write(
        self,
        direction: str,
        message: str,
        decision: str,
        *,
        arrays: Arrays | None = None,
        scalars: dict[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Append one line and sync it to disk before the message goes on.

        Args:
            direction: 'in' or 'out'.
            message: 'query', 'train' or 'evaluate'.
            decision: What was done with it, in words.
            arrays: What the message carries, under wire names.
            scalars: Numbers and notes the message carries, under wire names.
            seconds: How long the site worked on it.
        """
        arrays = arrays or {}
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "direction": direction,
            "message": message,
            "study": self.study,
            "round": self.round_number,
            "decision": decision,
            "arrays": {name: list(arrays[name].shape) for name in sorted(arrays)},
            "bytes": sum(array.nbytes for array in arrays.values()),
            "sha256": sha256_arrays(arrays) if arrays else "",
            "scalars": scalars or {},
            "seconds": round(seconds, 3),
        }
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One write on an O_APPEND descriptor: lines of two processes do not mix.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self.directory / FILE, flags, 0o600)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
