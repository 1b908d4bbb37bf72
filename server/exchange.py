"""One round's exchange: messages out, replies in one by one, and asking again after a failure.

A process that dies at a site, or a connection that breaks, costs the site its answer and not its
part in the round: it is asked again until the deadline. It trains a round once all the same, and
sends the stored reply if it has one. What a site refuses is not asked again, except where it said
that only the time of day is wrong.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from core.admission import printable
from core.wire import NOT_NOW
from server.grid import InProcessGrid
from server.history import Line
from server.live import Live
from server.replies import count_bytes

LOG = logging.getLogger("fedmermed.server")
M_MMAP_THRESHOLD: Final = -3  # malloc.h
LARGE_BYTES: Final = 1_048_576
PULL_SECONDS: Final = 3.0
"""Longest pause between two looks for replies, as in Flower, where a grid has no `pull_interval` of
its own; the shortest is a tenth."""
PULL_FRACTION: Final = 0.1
"""A pause is such a part of the time since something last went out or came in."""
PULL_BYTES: Final = 1e8
"""A pause is a second for each so many bytes of a message: a SuperLink with a database and states
of 400 MB has failed when it was asked every half second while they were on their way."""
PULL_SITE_SECONDS: Final = 0.03
"""A pause is such for each site that owes an answer: each is asked for by a request."""
PASSING: Final = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
"""Flower's errors for a process that died or a connection that broke."""
MOST_FAILURES: Final = 5
"""A site whose every try ends so is given up for the round."""
AGAIN_SECONDS: Final = 5.0
CLOSED_SECONDS: Final = (60.0, 3600.0)
"""First and longest pause before a site is asked again that does not work at this hour; the pause
doubles, because each question carries the whole state."""

Ask = Callable[[Mapping[str, int], float], Sequence[Message]]
"""Makes the messages for some sites (site -> node), in that order, each to live so many seconds."""


@dataclass
class Asked:
    """How it went with one site in this round."""

    times: int = 0
    failures: list[str] = field(default_factory=list)
    """Why it was asked again, in order."""
    closed: int = 0
    """How often it said that it does not work now."""
    since: float = 0.0
    seconds: float | None = None
    """From the last question to its answer; None without one."""

    def facts(self) -> Line:
        """For the history."""
        facts: Line = {} if self.seconds is None else {"seconds": round(self.seconds, 3)}
        if self.times != 1:
            facts |= {"asked": self.times, "failures": self.failures}
        return facts


class Exchange:
    """The messages and replies of one round.

    Args:
        grid: Reaches the sites.
        ask: Makes messages.
        find: Tells which sites are connected now, site -> node.
        seconds: From the first message to the deadline, after which missing replies are given up.
        live: Is told of each site that is asked, and whether it is still there.
    """

    def __init__(
        self,
        grid: Grid,
        ask: Ask,
        find: Callable[[], Mapping[str, int]],
        seconds: float,
        live: Live,
    ) -> None:
        self.asked: dict[str, str] = {}
        """Id of a message -> the site it went to."""
        self.sites: dict[str, Asked] = {}
        self._grid = grid
        self._ask = ask
        self._find = find
        self._live = live
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._waiting: list[str] = []
        self._nodes: dict[str, int] = {}
        """Site -> the node that was asked last."""
        self._due: dict[str, tuple[float, Message | None]] = {}
        """Site -> when it may be asked again, and the failed reply that counts if it is not."""
        self._in_process = isinstance(grid, InProcessGrid)
        self._longest = getattr(grid, "pull_interval", PULL_SECONDS)
        self._bytes = 0
        """Of the largest message."""
        self._moved = time.monotonic()
        """When something went out or came in last."""

    def replies(self, sites: Mapping[str, int]) -> Iterator[Message]:
        """Ask these sites (site -> node); hand over each reply before the next is fetched.

        Flower's own `send_and_receive` keeps all replies until the last one has come. A site whose
        failures may pass is asked again; its last one is handed over when that did not help.
        """
        if not self._in_process:
            _give_freed_memory_back()
        beat = None if self._in_process else self._longest
        self._live.phase("training", seconds=self._seconds, beat_seconds=beat)
        self._send(sites)
        while self._waiting or self._due:
            for number in list(self._waiting):
                replies = list(self._grid.pull_messages([number]))
                if replies or self._in_process:  # where no reply can come any more
                    self._waiting.remove(number)
                if replies:
                    self._moved = time.monotonic()
                while replies:
                    if self._asks_again(replies[0]):
                        del replies[0]
                    else:
                        yield replies.pop(0)  # no name here may keep it alive
            if time.monotonic() >= self._deadline:
                break
            self._send_again()
            self._look()
            if not self._in_process and (self._waiting or self._due):
                time.sleep(max(0.0, min(self._pause(), self._deadline - time.monotonic())))
        yield from (reply for _, reply in self._due.values() if reply is not None)

    def _pause(self) -> float:
        """Seconds until the next look."""
        waited = time.monotonic() - self._moved
        due = max(
            PULL_FRACTION * max(waited, self._longest),
            self._bytes / PULL_BYTES,
            PULL_SITE_SECONDS * len(self._waiting),
        )
        return float(min(due, self._longest))

    def _send(self, sites: Mapping[str, int]) -> None:
        now = time.monotonic()
        messages = self._ask(sites, self._deadline - now)
        self._bytes = max([self._bytes, *(count_bytes(message.content) for message in messages)])
        numbers = list(self._grid.push_messages(messages))
        del messages  # they hold the whole state
        self._moved = time.monotonic()
        for site, number in zip(sites, numbers or [""] * len(sites), strict=True):
            record = self.sites.setdefault(site, Asked())
            record.times, record.since = record.times + 1, now
            self._nodes[site] = sites[site]
            self._live.site(site, "asked", "".join(record.failures[-1:]))
            if number:
                self.asked[number] = site
                self._waiting.append(number)
            elif self._may_fail_again(record, "the message could not be handed to the SuperLink"):
                self._due[site] = (now + AGAIN_SECONDS, None)

    def _look(self) -> None:
        """Tell which of the sites that owe an answer are still connected."""
        if not self._in_process:
            online = set(self._grid.get_node_ids())
            for site in {self.asked[number] for number in self._waiting}:
                here = self._nodes[site] in online
                reason = "".join(self.sites[site].failures[-1:])
                self._live.site(site, "asked" if here else "lost", reason)
        self._live.beat()

    def _send_again(self) -> None:
        now = time.monotonic()
        ready = [site for site, (when, _) in self._due.items() if when <= now]
        if not ready:
            return
        connected = self._find()
        again = {site: connected[site] for site in ready if site in connected}
        if again:
            LOG.info("asking again: %s", ", ".join(again))
            for site in again:
                del self._due[site]
            self._send(again)

    def _asks_again(self, reply: Message) -> bool:
        """Whether this reply is a failure that may pass; then its site is due again."""
        site = self.asked.get(reply.metadata.reply_to_message_id)
        if site is None:
            return False
        record, now = self.sites[site], time.monotonic()
        record.seconds = now - record.since
        if not reply.has_error():
            return False
        code, reason = reply.error.code, printable(reply.error.reason or "no reason given")
        if code in PASSING and self._may_fail_again(record, reason):
            pause = 0.0 if self._in_process else AGAIN_SECONDS
        elif code == NOT_NOW and not self._in_process:
            first, longest = CLOSED_SECONDS
            pause = min(first * 2**record.closed, longest)
            record.closed += 1
            record.failures.append(reason)
        else:
            return False
        LOG.warning("site '%s': %s; it will be asked again", site, reason)
        self._live.site(site, "asked again", reason)
        self._due[site] = (now + pause, reply)
        return True

    def _may_fail_again(self, record: Asked, reason: str) -> bool:
        record.failures.append(reason)
        return len(record.failures) - record.closed < MOST_FAILURES


def _give_freed_memory_back() -> None:
    """Let the system have arrays as soon as they are freed.

    glibc would keep them for later use, apart for each of the threads that fetch replies: a whole
    reply and more. Not where sites train in this process, which such keeping makes faster.
    """
    with suppress(AttributeError):  # another C library, with its own ways
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
