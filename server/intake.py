"""The intake of a round: each reply is judged when it comes, and only what is small is kept."""

import logging
from collections.abc import Mapping
from typing import Final

from flwr.app import Message

from core.config import Recipe
from core.wire import GlobalState, SiteUpdate
from server.history import Line
from server.replies import count_bytes, judge
from server.spool import Spool

LOG = logging.getLogger("fedmermed.server")
SILENT: Final[Line] = {"outcome": "silent", "reason": "no reply before the deadline"}


class Intake:
    """What has come in for one round.

    Args:
        recipe: The study.
        round_number: The round.
        reference: The global state that the sites were sent.
        asked: Id of a message -> the site it went to; grows while sites are asked again.
        spool: Where arrays of updates wait for the end of the round.
    """

    def __init__(
        self,
        recipe: Recipe,
        round_number: int,
        reference: GlobalState,
        asked: Mapping[str, str],
        spool: Spool,
    ) -> None:
        self.updates: dict[str, SiteUpdate] = {}
        """Site -> its admitted update, arrays on disk."""
        self.outcomes: dict[str, Line] = {}
        """Site -> what came of its reply."""
        self.bytes_up = 0
        self._recipe = recipe
        self._round = round_number
        self._reference = reference
        self._asked = asked
        self._spool = spool

    def take(self, reply: Message) -> None:
        """Judge a reply by the site that was asked; its arrays leave the message as they are read.

        Raises:
            UserError: the disk cannot hold the update.
        """
        # Errors made by the SuperLink bear its own node id: the site is whom we asked.
        site = self._asked.get(reply.metadata.reply_to_message_id)
        if site is None or site in self.outcomes:
            LOG.warning("round %d: a reply that nobody was asked for is ignored", self._round)
            return
        size = count_bytes(reply.content) if reply.has_content() else 0
        self.bytes_up += size
        update, self.outcomes[site] = judge(
            reply, site=site, round_number=self._round, reference=self._reference,
            recipe=self._recipe,
        )  # fmt: skip
        self.outcomes[site]["bytes"] = size
        if update is not None:
            self.updates[site] = self._spool.put(update)
