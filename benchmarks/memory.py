"""Memory and processor time of a command and all below it, read from /proc while it runs."""

import os
import time
from pathlib import Path


class Watch:
    """Peak resident memory of a process and, apart, of the largest of its descendants.

    `getrusage` would not do: it knows nothing of processes that others than their parent started.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.parent_mib = 0.0
        self.worker_mib = 0.0
        self._seen: dict[int, str] = {}
        """Descendant -> when it started: a pid alone may belong to another one later."""
        self._ticks: dict[int, int] = {}

    def look(self) -> None:
        """Read the peaks so far; the kernel keeps them, so little is lost between two looks."""
        self.parent_mib = max(self.parent_mib, _peak_mib(self.pid))
        descendants = self._descendants()
        for pid in (self.pid, *descendants):
            if fields := _stat(pid):
                self._ticks[pid] = int(fields[11]) + int(fields[12])
        for pid in descendants:
            self._seen.setdefault(pid, _started(pid))
            self.worker_mib = max(self.worker_mib, _peak_mib(pid))

    @property
    def processor_seconds(self) -> float:
        """Of all of them, up to the last look."""
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def left(self, patience_s: float = 5.0) -> list[int]:
        """Descendants that are still alive, some seconds after they should have ended."""
        end = time.monotonic() + patience_s
        while self._alive() and time.monotonic() < end:
            time.sleep(0.05)
        return self._alive()

    def _alive(self) -> list[int]:
        return [pid for pid, started in self._seen.items() if started and _started(pid) == started]

    def _descendants(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (fields := _stat(int(name))):
                children.setdefault(int(fields[1]), []).append(int(name))
        found, todo = [], [self.pid]
        while todo:
            below = children.get(todo.pop(), [])
            found += below
            todo += below
        return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command's name: state, parent, ...; empty if it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _peak_mib(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, UnicodeDecodeError):
        pass  # it ended meanwhile
    return 0.0
