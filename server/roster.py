"""The roster: which connected node is which site.

On the coordinator's service that is told by the key with which a node signed in, as DIR/registered
has it: no site can answer in another's name. Elsewhere each node is asked once.
"""

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from core.admission import printable

LOG = logging.getLogger("fedmermed.server")
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
QUERY_SECONDS = 120.0
"""How long nodes may take to say who they are; a SuperNode starts a process for it."""


@dataclass
class Roster:
    """Names of nodes, in the order in which they were learnt."""

    study: str
    registered: Path | None = None
    """A directory with a file for each key: SITE-DIGEST.json, which holds the key's node-id."""
    names: dict[int, str] = field(default_factory=dict)
    """node -> site, also of nodes that are gone"""
    refused: dict[int, str] = field(default_factory=dict)
    """node -> why it takes no part in this round"""
    quarantined: dict[str, str] = field(default_factory=dict)
    """site -> why it is not asked"""

    def begin_round(self, quarantined: Mapping[str, str]) -> None:
        """Give nodes that were refused another chance, and take note of who is held now."""
        self.refused.clear()
        self.quarantined = dict(quarantined)

    def present(self, grid: Grid) -> dict[str, int]:
        """Learn who new nodes are; returns site -> node of those who are connected.

        Of two connected nodes with one name, the one that is known longer keeps it.
        """
        online = sorted(grid.get_node_ids())
        unknown = [node for node in online if node not in self.names and node not in self.refused]
        if unknown and self.registered is not None:
            self._look_up(self.registered, unknown)
        elif unknown:
            self._ask(grid, unknown)
        sites: dict[str, int] = {}
        for node, name in self.names.items():
            if node not in online or name in self.quarantined:
                continue
            if name in sites:
                self._refuse(node, f"another node already answers as site '{name}'")
            else:
                sites[name] = node
        return sites

    def _look_up(self, registered: Path, nodes: list[int]) -> None:
        sites = {}
        for file in registered.glob("*-*.json"):
            # Where Flower's own command was used, a file may be empty until that has ended.
            with suppress(OSError, ValueError, KeyError, TypeError):
                sites[int(json.loads(file.read_bytes())["node-id"])] = file.stem.rpartition("-")[0]
        for node in nodes:
            if node in sites:
                self.names[node] = sites[node]
            else:
                self._refuse(
                    node, f"'{registered}' names no site for its key; run: fedmermed-server admit"
                )

    def _ask(self, grid: Grid, nodes: list[int]) -> None:
        messages = [
            Message(
                RecordDict({"config": ConfigRecord({"study": self.study})}),
                node,
                MessageType.QUERY,
                ttl=QUERY_SECONDS,
            )
            for node in nodes
        ]
        replies = list(grid.send_and_receive(messages, timeout=QUERY_SECONDS))
        by_message = {reply.metadata.reply_to_message_id: reply for reply in replies}
        for node, message in zip(nodes, messages, strict=True):
            reply = by_message.get(message.metadata.message_id)
            if reply is None:
                self._refuse(node, "did not say who it is")
            elif reply.has_error():
                self._refuse(node, printable(reply.error.reason or "error without a reason"))
            elif (name := _site_name(reply)) is None:
                self._refuse(node, "gave no usable site name")
            else:
                self.names[node] = name

    def _refuse(self, node: int, reason: str) -> None:
        if node not in self.refused:
            LOG.warning("node %d takes no part: %s", node, reason)
        self.refused[node] = reason


def _site_name(reply: Message) -> str | None:
    info = reply.content.config_records.get("info")
    name = info.get("site") if info is not None else None
    return name if isinstance(name, str) and SITE_NAME.fullmatch(name) else None
