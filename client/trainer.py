"""The part of a site that trains: takes tasks of the site's SuperNode and starts one process each.

It is Flower's own `flower-superexec`, which asks the SuperNode for tasks, with one thing replaced:
what it starts. A task of another kind than a ClientApp's is neither asked for nor started.

    python -P -m client.trainer SITE.toml <arguments of flower-superexec>
"""

import os
import subprocess
import sys
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

from client.launcher import Task, check_own_code, replace_in
from client.parts import QUIET, python_path
from core.errors import UserError

RETRY_SECONDS: Final = 2
"""Longest pause between looks for a SuperNode that is away: it is near, and Flower's 20 s long."""


def main() -> None:
    """Serve the SuperNode until stopped."""
    site_file = Path(sys.argv.pop(1))
    try:
        check_own_code()
        # Each launcher checks this too; here it is said before there is a task to lose.
        replace_in(run_clientapp, run_clientapp.run_clientapp, Task(site_file).replacements())
        names = {"get_executor": lambda *_, **__: Launches(site_file)}
        replace_in(flower, flower.run_superexec, names)
    except UserError as error:
        sys.exit(f"error: {error}")
    assert "MAX_RETRY_DELAY" in vars(http_retry)
    vars(http_retry)["MAX_RETRY_DELAY"] = RETRY_SECONDS
    flower_superexec()


class Launches(SubprocessExecutor):
    """Starts `client.launcher` for each task; the token goes through a pipe, unseen by `ps`."""

    def __init__(self, site_file: Path) -> None:
        self._site_file = site_file
        self._running: list[subprocess.Popen[bytes]] = []

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: object
    ) -> tuple[set[TaskType], set[str]]:
        """Of all kinds of task, only a ClientApp's."""
        return {TaskType.CLIENT_APP} & supported_task_types, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of a task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a site runs no task of kind '{spec.task_type}'")
        words = [sys.executable, "-P", "-m", "client.launcher", "--site", str(self._site_file)]
        words += ["--runtime-api-address", spec.runtime_api_address]
        if spec.insecure:
            words.append("--insecure")
        elif spec.root_certificates_path is not None:
            words += ["--root-certificates", spec.root_certificates_path]
        if spec.parent_pid is not None:
            words += ["--parent-pid", str(spec.parent_pid)]
        environment = {**os.environ, **QUIET, "PYTHONPATH": python_path(os.environ)}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)
        self._running.append(process)
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write(spec.token.encode() + b"\n")
        except BrokenPipeError:
            return LaunchResult.failed("the process ended at once; what it printed says why")
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Bury processes that have ended; called at every look for tasks."""
        self._running = [process for process in self._running if process.poll() is None]


if __name__ == "__main__":
    main()
