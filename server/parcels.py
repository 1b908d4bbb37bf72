"""A Flower Grid that reaches sites which have joined: small arrays travel in parcels, both ways."""

from collections.abc import Iterable

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from core.parcel import close_parcel, open_parcel


class ParcelGrid(Grid):
    """Another grid, whose messages are closed as they go out and opened as they come in.

    At a site its launcher does the same; apps on both sides see whole records.

    Args:
        grid: Reaches sites that have joined.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Flower's own bookkeeping."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's own bookkeeping."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; kept because Flower's interface asks for it."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Who is connected."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Close what the messages hold, and send it."""
        return self._grid.push_messages([_closed(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have come, opened."""
        return [_opened(message) for message in self._grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies."""
        sent = [_closed(message) for message in messages]
        return (_opened(reply) for reply in self._grid.send_and_receive(sent, timeout=timeout))


def _closed(message: Message) -> Message:
    for record in message.content.array_records.values() if message.has_content() else ():
        close_parcel(record, Array)
    return message


def _opened(message: Message) -> Message:
    for record in message.content.array_records.values() if message.has_content() else ():
        open_parcel(record, Array)
    return message
