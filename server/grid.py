"""A Flower Grid in one process: real apps, real messages, no network.

Every message is taken apart and put together again by Flower's own code, as on a real wire. Sites
work one after the other, each when its reply is asked for.
"""

import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
FIRST_NODE_ID = 1000


class InProcessGrid(Grid):
    """Delivers messages to a ClientApp by calling it.

    Args:
        client_app: The ClientApp, or anything called like one.
        node_configs: One for each site.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        node_configs: Sequence[UserConfig],
    ) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._contexts = {
            FIRST_NODE_ID + i: Context(RUN_ID, FIRST_NODE_ID + i, config, RecordDict(), {})
            for i, config in enumerate(node_configs)
        }
        self._undelivered: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        # Flower builds no Message outside a task: this process is one.
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Flower's own bookkeeping."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's own bookkeeping."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; kept because Flower's interface asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All sites; they are always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; a site gets its own when its reply is pulled."""
        numbers = []
        for message in messages:
            number = f"message-{next(self._numbers)}"
            numbers.append(number)
            message.metadata.__dict__["_message_id"] = number
            self._undelivered[number] = message
        return numbers

    def deliver(self, message: Message) -> Message | None:
        """Call the ClientApp; what it raises becomes an error reply, as in flwr-clientapp."""
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            traceback.print_exc()
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Deliver these messages and hand over the replies; each site answers before the next."""
        numbers = [number for number in message_ids if number in self._undelivered]
        replies = (self._answer(self._undelivered.pop(number), number) for number in numbers)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Deliver messages one by one as replies are asked for; who does not answer never will."""
        return self._answers(self.push_messages(messages))

    def _answers(self, numbers: Iterable[str]) -> Iterator[Message]:
        for number in numbers:
            yield from self.pull_messages([number])  # no name here may keep a reply alive

    def _answer(self, message: Message, number: str) -> Message | None:
        reply = self.deliver(_copy(message, number))
        return None if reply is None else _copy(reply, f"reply-to-{number}")


def _copy(message: Message, number: str) -> Message:
    """Serialise and parse, arrays included."""
    objects: Mapping[str, bytes] = {
        key: nested.deflate() for key, nested in get_all_nested_objects(message).items()
    }
    copy = inflate_object_from_contents(message.object_id, dict(objects))
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = number
    return copy
