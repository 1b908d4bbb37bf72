"""The audit file: one line for every message in or out, for the hospital's privacy office.

It says what crossed the wire by name, shape, size and digest; it holds no pixel, no patient key
and no path of an image. Each line holds the digest of those before it (client.chain).

**Guarantees**, against who changes the file and not `audit.head` beside it:
    - A changed line is found, the last one too.
    - A removed line is found, at the end too.
    - A line put in another place is found.
    - An inserted line is found, at the end too.
    - Such a fault is still found after the site has written more lines.

For a site whose processes die at any instant, of which several may be at work:
    - A line cut short is no fault; it stays, and the next to be written is preceded by its record.
    - Lines of all studies and processes form one chain.
    - Nothing leaves before the line that tells of it is on the disk.
    - Lines from before lines held digests can be read, are told apart, and cannot be changed
      unseen once a line with a digest follows.

**Not guaranteed:** who can write both files can write a new chain, or delete all and begin one;
only a digest noted elsewhere shows that. When a process died while it wrote a line, the removal of
that line passes for an earlier death. A message that comes while the site file cannot be read has
no line: that file says where lines go.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.chain import append
from core.checkpoint import Arrays, sha256_arrays


@dataclass(frozen=True)
class Audit:
    """Appends to `audit.jsonl` in a directory, on behalf of a study and a round (0: none)."""

    directory: Path
    study: str = ""
    round_number: int = 0
    bundle: str = ""
    """sha256 of the app bundle that the run was submitted with; empty where it is not known."""

    def write(
        self,
        direction: str,
        message: str,
        decision: str,
        *,
        arrays: Arrays | None = None,
        scalars: dict[str, Any] | None = None,
        epsilon: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Append one line and sync it to disk before the message goes on.

        Args:
            direction: 'in' or 'out'.
            message: 'query', 'train' or 'evaluate'.
            decision: What was done with it, in words.
            arrays: What the message carries, under wire names.
            scalars: Numbers and notes the message carries, under wire names.
            epsilon: What the study has spent with this message, at the recipe's delta; None: it
                has no record privacy.
            seconds: How long the site worked on it.
        """
        arrays = arrays or {}
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "direction": direction,
            "message": message,
            "study": self.study,
            "round": self.round_number,
            "bundle": self.bundle,
            "decision": decision,
            "arrays": {name: list(arrays[name].shape) for name in sorted(arrays)},
            "bytes": sum(array.nbytes for array in arrays.values()),
            "sha256": sha256_arrays(arrays) if arrays else "",
            "scalars": scalars or {},
            "epsilon": epsilon,
            "seconds": round(seconds, 3),
        }
        append(self.directory, line)
