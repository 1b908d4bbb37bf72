"""`python -m server.superexec ...`: Flower's SuperExec that starts ServerApps and nothing else.

Flower's own takes agents, models and simulations too, whatever a run asks for. What a ServerApp
prints is kept: Flower drops it. Its own arguments are passed on as they are.
"""

import importlib
from typing import Any

from core.console import run_command_line
from core.errors import UserError


def restrict_to_server_apps() -> None:
    """Have SuperExec ask for ServerApps only.

    Raises:
        UserError: this version of Flower chooses its tasks in another way.
    """
    from flwr.supercore.constant import TaskType

    loop = importlib.import_module("flwr.supercore.superexec.run_superexec")
    chooser: Any = getattr(loop, "AutoExecPlugin", None)
    if not hasattr(chooser, "supported_task_types") or not hasattr(chooser, "suppress_output"):
        raise UserError(
            "flwr.supercore.superexec chooses its tasks in another way: this is not Flower 1.41; "
            "install the version of constraints.txt"
        )
    chooser.supported_task_types = frozenset({TaskType.SERVER_APP})
    chooser.suppress_output = False


def main() -> None:
    """Become the SuperExec."""
    restrict_to_server_apps()
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


if __name__ == "__main__":
    run_command_line(main)
