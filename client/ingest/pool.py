"""Worker processes that may hang, crash or be killed, fed with one file at a time.

Each worker has a pipe of its own. A death is therefore always that of one known file, and a worker
killed in the middle of an answer spoils nobody else's: pools that share one result queue (pebble's
was tried) wait for ever on its lock then, and call innocent files' workers dead.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Final, Self

from client.ingest.types import Item, Outcome, Reason
from client.ingest.worker import Setup, serve
from core.errors import UserError

PRELOAD: Final = ["client.ingest.worker", "client.ingest.read", "client.__main__"]
"""Imported once, in the process that every worker is forked from."""
MAX_WAITING: Final = 4096
"""Files handed out or read while an earlier one is not done yet."""
MAX_WAITING_BYTES: Final = 256 * 1024**2
"""Pictures kept in memory until an earlier file is done."""
MAX_FILES: Final = 1000
"""A worker is replaced after so many: whatever its decoders leak goes with it."""
START_SECONDS: Final = 120.0
MAX_FAILED_STARTS: Final = 3


@dataclass
class _Task:
    item: Item
    outcome: Outcome | None = None


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    deadline: float
    ready: bool = False
    files: int = 0
    """read so far"""
    task: _Task | None = None


class Pool:
    """Reads items in worker processes; gives their outcomes in the order of the items.

    **Guarantees**: every item gets one outcome, whatever its file does to the process that reads
    it. A file is blamed for a death or for lack of memory only where it was the first file of its
    worker: after others it is tried once more in a new one. At most `MAX_WAITING` items are in
    memory, and no process is left after the pool is closed.
    """

    def __init__(self, setup: Setup, jobs: int) -> None:
        assert jobs >= 1
        self._setup = setup
        self._context = multiprocessing.get_context("forkserver")
        self._failed_starts = 0
        self._waiting_bytes = 0
        _start_forkserver()
        self._workers: list[_Worker] = []
        try:
            for _ in range(jobs):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(1.0)  # one stuck in a dead network share cannot be waited for
        self._workers = []

    def outcomes(self, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
        """Read items, each as soon as a worker is free, and yield (item, outcome) in their order.

        Raises:
            UserError: workers cannot start.
        """
        source = iter(items)
        waiting: deque[_Task] = deque()
        more = True
        while True:
            while more and self._has_room(waiting) and (worker := self._idle()):
                item = next(source, None)
                if item is None:
                    more = False
                    break
                task = _Task(item, Outcome(reason=item.reason) if item.reason else None)
                waiting.append(task)
                if task.outcome is None:
                    self._give(worker, task)
            if not waiting:
                return
            self._wait(block=waiting[0].outcome is None)
            if outcome := waiting[0].outcome:
                self._waiting_bytes -= _size(outcome)
                yield waiting.popleft().item, outcome

    def _has_room(self, waiting: deque[_Task]) -> bool:
        return len(waiting) < MAX_WAITING and self._waiting_bytes < MAX_WAITING_BYTES

    def _idle(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.task is None), None)

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        if worker.ready:
            worker.deadline = time.monotonic() + self._setup.timeout_s
        with contextlib.suppress(OSError):  # it is dead, which its end of the pipe will say
            worker.pipe.send(task.item)

    def _wait(self, *, block: bool) -> None:
        """Deal with workers that answer, die, or have taken too long; wait for one if asked to."""
        patience = 0.0
        if block:
            first = min(w.deadline for w in self._workers if w.task or not w.ready)
            patience = max(0.0, first - time.monotonic())
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in connection.wait(list(pipes), patience):
            self._receive(pipes[pipe])  # type: ignore[index]
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.task or not worker.ready) and worker.deadline <= now:
                self._expire(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except Exception:  # closed, cut short, or not what a sound worker would send
            self._bury(worker)
            return
        if message is None:
            worker.ready = True
            worker.deadline = time.monotonic() + self._setup.timeout_s
            self._failed_starts = 0
            return
        assert isinstance(message, Outcome)
        assert worker.task is not None
        worker.files += 1
        if message.reason is Reason.TOO_MUCH_MEMORY:
            self._blame(worker, Reason.TOO_MUCH_MEMORY)
            return
        self._settle(worker.task, message)
        worker.task = None
        if worker.files >= MAX_FILES:
            self._replace(worker)

    def _bury(self, worker: _Worker) -> None:
        """Replace a worker that died."""
        worker.process.join(5.0)
        status = worker.process.exitcode
        if not worker.ready:
            self._count_failed_start(status)
            fresh = self._replace(worker)
            if worker.task:
                self._give(fresh, worker.task)
            return
        worker.files += 1
        self._blame(worker, _DEATHS.get(status or 0, Reason.WORKER_DIED))

    def _blame(self, worker: _Worker, reason: Reason) -> None:
        """Settle the task of a worker that is of no use any more, or try it in a new one."""
        fresh = self._replace(worker)
        if worker.task is None:
            return
        if worker.files > 1:
            self._give(fresh, worker.task)
        else:
            self._settle(worker.task, Outcome(reason=reason))

    def _expire(self, worker: _Worker) -> None:
        if not worker.ready:
            worker.process.kill()
            self._bury(worker)
            return
        assert worker.task is not None
        self._settle(worker.task, Outcome(reason=Reason.TIMED_OUT))
        self._replace(worker)

    def _settle(self, task: _Task, outcome: Outcome) -> None:
        task.outcome = outcome
        self._waiting_bytes += _size(outcome)

    def _count_failed_start(self, status: int | None) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            gib = self._setup.memory_bytes / 1024**3
            raise UserError(
                f"processes that read files do not start (exit status {status}, with at most "
                f"{gib:g} GiB each); raise --memory, or install this program again"
            )

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._setup), daemon=True)
        process.start()
        theirs.close()  # else the pipe would not end with the worker
        return _Worker(process, ours, time.monotonic() + START_SECONDS)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.process.kill()
        worker.pipe.close()
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        return fresh


_DEATHS: Final = {
    -signal.SIGKILL: Reason.TOO_MUCH_MEMORY,  # sent by the system when it has no memory left
    -signal.SIGALRM: Reason.TIMED_OUT,
}


def _size(outcome: Outcome) -> int:
    return sum(picture.pixels.nbytes for picture in outcome.pictures)


def _start_forkserver() -> None:
    """Start the process that workers are forked from; libraries there make no threads."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
