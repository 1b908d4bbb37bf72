"""`python -m server.superlink ...`: Flower's SuperLink, more patient, and losing no message.

Flower waits 5 s for SQLite's lock and then answers 500, which ends the run: at a state of 400 MB
and three sites it does (measured). And it hands a message out once: where the answer that holds it
does not arrive, the site never hears of it, and its round waits until the deadline. Its own
arguments are passed on as they are.
"""

import importlib
import logging
from typing import Any, Final

from core.console import run_command_line
from core.errors import UserError

LOG = logging.getLogger("flwr")
BUSY_MILLISECONDS: Final = "120000"
UNCONFIRMED: Final = """
SELECT message_id FROM message_ins AS message
JOIN run ON run.run_id = message.run_id
JOIN task ON task.task_id = run.primary_task_id
WHERE message.dst_node_id = :node AND message.delivered_at <> ''
AND task.finished_at IS NULL
AND EXISTS (SELECT 1 FROM objects WHERE object_id = message.message_id)
AND NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = message.message_id)
"""
"""Messages that a node was given, of runs that go on; a received one is no object any more."""
UNDELIVERED: Final = "UPDATE message_ins SET delivered_at = '' WHERE message_id = :message_id"


def raise_busy_timeout() -> None:
    """Have Flower's database connections wait for a lock for two minutes.

    Raises:
        UserError: this version of Flower keeps its settings elsewhere.
    """
    constant: Any = importlib.import_module("flwr.supercore.constant")
    pragmas = dict(getattr(constant, "SQLITE_PRAGMAS", ()))
    if "busy_timeout" not in pragmas:
        raise UserError(
            "flwr.supercore.constant.SQLITE_PRAGMAS holds no busy_timeout: this is not Flower "
            "1.41; install the version of constraints.txt"
        )
    patient = tuple((pragmas | {"busy_timeout": BUSY_MILLISECONDS}).items())
    constant.SQLITE_PRAGMAS = patient
    sql_mixin = importlib.import_module("flwr.supercore.sql_mixin")  # copies it when imported
    if dict(sql_mixin.SQLITE_PRAGMAS).get("busy_timeout") != BUSY_MILLISECONDS:
        raise UserError("Flower's database was set up before its patience was raised")


def deliver_until_confirmed() -> None:
    """Give a node a message again that it asks past without having confirmed it.

    A SuperNode takes one message at a time: it asks for the next when it has all parts of this one
    and has said so, or when it never got it.

    Raises:
        UserError: this version of Flower hands messages out in another way.
    """
    module: Any = importlib.import_module("flwr.server.superlink.linkstate.sql_linkstate")
    state: Any = getattr(module, "SqlLinkState", object)
    if "get_message_ins" not in vars(state) or not hasattr(state, "query"):
        raise UserError(
            f"{module.__name__}.SqlLinkState has no get_message_ins and query: this is not Flower "
            "1.41; install the version of constraints.txt"
        )
    hand_out = state.get_message_ins

    def get_message_ins(self: Any, node_id: int, limit: int | None, **options: Any) -> Any:
        if lost := self.query(UNCONFIRMED, {"node": module.uint64_to_int64(node_id)}):
            self.query(UNDELIVERED, lost)
            LOG.warning("a message to node %d did not arrive; it is sent again", node_id)
        return hand_out(self, node_id, limit, **options)

    state.get_message_ins = get_message_ins


def main() -> None:
    """Become the SuperLink."""
    raise_busy_timeout()
    deliver_until_confirmed()
    from flwr.superlink.cli import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    run_command_line(main)
