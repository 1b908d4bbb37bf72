"""The part of a site that trains: takes tasks of its SuperNode, and has a process work on each.

It is Flower's own `flower-superexec`, which asks the SuperNode for tasks, with one thing replaced:
what it starts. A task of another kind than a ClientApp's is neither asked for nor started.

    python -P -m client.trainer SITE.toml <arguments of flower-superexec>
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.retry import http_retry
from flwr.supercore.superexec import run_superexec as flower
from flwr.supercore.superexec.executor import (
    ExecutionSpec,
    LaunchResult,
    SubprocessExecutor,
)
from flwr.supernode.runtime import run_clientapp

from client.guard import replace_in
from client.launcher import READY, Order, Task, check_own_code
from client.parts import QUIET, python_path
from core.errors import UserError

RETRY_SECONDS: Final = 2
"""Longest pause between looks for a SuperNode that is away: it is near, and Flower's 20 s long."""
AGAIN_SECONDS: Final = 10.0
"""Between two starts of a launcher that ends without being told to."""


def main() -> None:
    """Serve the SuperNode until stopped."""
    site_file = Path(sys.argv.pop(1))
    try:
        check_own_code()
        # The launcher checks this too; here it is said before there is a task to lose.
        replace_in(run_clientapp, run_clientapp.run_clientapp, Task(site_file).replacements())
        names = {"get_executor": lambda *_, **__: Launches(site_file)}
        replace_in(flower, flower.run_superexec, names)
    except UserError as error:
        sys.exit(f"error: {error}")
    assert "MAX_RETRY_DELAY" in vars(http_retry)
    vars(http_retry)["MAX_RETRY_DELAY"] = RETRY_SECONDS
    flower_superexec()


class Launches(SubprocessExecutor):
    """Hands tasks to one `client.launcher`, which forks for each; tokens are unseen by `ps`."""

    def __init__(self, site_file: Path) -> None:
        self._site_file = site_file
        self._launcher: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        """To the launcher's standard input; it says when it is ready."""
        self._ready = False
        self._started = -AGAIN_SECONDS

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: object
    ) -> tuple[set[TaskType], set[str]]:
        """Of all kinds of task, only a ClientApp's, and none before there is who works on it.

        The SuperNode gives up a task that is taken and of which it hears nothing for 30 s.
        """
        mine = {TaskType.CLIENT_APP} if self._is_ready() else set()
        return mine & supported_task_types, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Have a process work on a task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a site runs no task of kind '{spec.task_type}'")
        order = Order(
            spec.runtime_api_address, spec.token, spec.insecure, spec.root_certificates_path,
            spec.parent_pid,
        )  # fmt: skip
        if self._order(order) or self._order(order):  # one may have died unseen
            return LaunchResult.accepted()
        return LaunchResult.failed("the process ended at once; what it printed says why")

    def reconcile(self) -> None:
        """Keep a launcher ready; called at every look for tasks."""
        if self._ended() and time.monotonic() - self._started >= AGAIN_SECONDS:
            self._start()

    def close(self) -> None:
        """End the launcher; processes that it started notice our end."""
        if self._launcher is not None and self._line is not None:
            self._line.close()
            self._launcher.terminate()

    def _ended(self) -> bool:
        return self._launcher is None or self._launcher.poll() is not None

    def _is_ready(self) -> bool:
        if self._ended():
            return False
        assert self._line is not None
        if not self._ready:
            with suppress(BlockingIOError, ConnectionError):
                self._ready = self._line.recv(1, socket.MSG_DONTWAIT) == READY
        return self._ready

    def _order(self, order: Order) -> bool:
        """Whether a launcher took the order."""
        if self._ended():
            self._start()
        assert self._launcher is not None
        assert self._line is not None
        try:
            self._line.sendall(json.dumps(asdict(order)).encode() + b"\n")
        except ConnectionError:
            self._launcher.wait()
            return False
        return True

    def _start(self) -> None:
        words = [sys.executable, "-P", "-m", "client.launcher", "--site", str(self._site_file)]
        environment = {**os.environ, **QUIET, "PYTHONPATH": python_path(os.environ)}
        if self._line is not None:
            self._line.close()
        self._line, theirs = socket.socketpair()
        with theirs:
            self._launcher = subprocess.Popen(words, stdin=theirs.fileno(), env=environment)
        self._ready, self._started = False, time.monotonic()


if __name__ == "__main__":
    main()
