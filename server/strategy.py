"""Our strategy on Flower's Strategy API: quorum, admission by name, resume, a full record.

Flower's own start() counts rounds from 1, keeps no checkpoint and ends a run that every site
refused as completed; ours resumes, and raises when a round misses its quorum.
"""

import logging
import time
from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from core.collapse import alarm
from core.config import Recipe
from core.errors import UserError
from core.wire import SiteUpdate
from server.aggregate import aggregate
from server.history import Checkpoint, Line, RunDirectory, describe_round
from server.replies import count_bytes, judge, mean_metrics, to_record
from server.roster import Roster

LOG = logging.getLogger("fedmermed.server")
POLL_SECONDS = 1.0


class QuorumError(UserError):
    """A round had fewer admitted updates than the recipe's minimum."""


class FederatedMemory(Strategy):
    """Averages students and teachers with weights balanced over modalities; merges prototypes.

    Args:
        recipe: The study.
        run: Where checkpoints and history go.
        checkpoint: Where the study stands.
        expect_sites: The first round to run waits for so many, as long as for the quorum.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory, checkpoint: Checkpoint, expect_sites: int = 0
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.checkpoint = checkpoint
        self.expect_sites = expect_sites
        self.roster = Roster(run.study)
        self._sent: list[tuple[Message, str]] = []
        self._bytes_down = 0
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, up to `num_rounds`.

        Evaluation is part of a site's train reply, so the last two arguments go unused.

        Raises:
            QuorumError: a round missed its quorum; the checkpoint of the one before is intact.
        """
        self.summary()
        result = Result()
        result.arrays = initial_arrays
        for server_round in range(self.checkpoint.round_number + 1, num_rounds + 1):
            self._began, self._seconds = time.monotonic(), {}
            config = train_config or ConfigRecord()
            messages = list(self.configure_train(server_round, result.arrays, config, grid))
            self._lap("wait_for_sites")
            replies = list(grid.send_and_receive(messages, timeout=timeout))
            self._lap("exchange")
            arrays, metrics = self.aggregate_train(server_round, replies)
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
        return result

    def summary(self) -> None:
        """Say where the study stands."""
        done, rounds = self.checkpoint.round_number, self.recipe.federation.rounds
        LOG.info("study '%s': %d of %d rounds done", self.recipe.name, done, rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the quorum and address a message to each site that is connected."""
        sites = self._wait_for_sites(server_round, grid)
        federation = self.recipe.federation
        record = ConfigRecord(
            {
                **config,
                "study": self.run.study,
                "round": server_round,
                "step": (server_round - 1) * federation.local_steps,
                "recipe": self.recipe.to_json(),
            }
        )
        content = RecordDict({"arrays": arrays, "config": record})
        ttl, group = federation.round_timeout_seconds, str(server_round)
        self._sent = [
            (Message(content, node, MessageType.TRAIN, ttl=ttl, group_id=group), site)
            for site, node in sorted(sites.items())
        ]
        self._bytes_down = len(sites) * (arrays.count_bytes() + record.count_bytes())
        LOG.info("round %d of %d: %d sites train", server_round, federation.rounds, len(sites))
        return [message for message, _ in self._sent]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Admit or reject each reply by site name, aggregate, and make the round durable.

        Raises:
            QuorumError: fewer updates than `min_sites` were admitted.
        """
        site_of = {message.metadata.message_id: site for message, site in self._sent}
        silent = {"outcome": "silent", "reason": "no reply before the deadline"}
        outcomes: dict[str, Line] = {site: dict(silent) for site in site_of.values()}
        for name in sorted(set(self.roster.names.values()) - set(outcomes)):
            outcomes[name] = {"outcome": "absent", "reason": "not connected"}
        updates: dict[str, SiteUpdate] = {}
        bytes_up = 0
        for reply in replies:
            # Errors made by the SuperLink bear its own node id: the site is whom we asked.
            site = site_of.pop(reply.metadata.reply_to_message_id, None)
            if site is None:
                LOG.warning("round %d: a reply that nobody was asked for is ignored", server_round)
                continue
            if reply.has_content():
                bytes_up += count_bytes(reply.content)
            update, outcomes[site] = judge(
                reply, site=site, round_number=server_round,
                reference=self.checkpoint.state, recipe=self.recipe,
            )  # fmt: skip
            if update is not None:
                updates[site] = update
        self._lap("admit")
        self._require_quorum(server_round, outcomes)
        checkpoint, weights = self._aggregate(server_round, updates)
        self._lap("aggregate")
        for site, weight in weights.items():
            outcomes[site]["weight"] = weight
        alarms = self._alarms(updates)
        line = self.run.commit(
            checkpoint,
            {
                "round": server_round,
                "first_step": (server_round - 1) * self.recipe.federation.local_steps,
                "sites": outcomes,
                "refused_nodes": sorted(self.roster.refused.values()),
                "metrics": mean_metrics(updates),
                "alarms": alarms,
                "bytes_down": self._bytes_down,
                "bytes_up": bytes_up,
                "seconds": {name: round(s, 3) for name, s in self._seconds.items()},
            },
        )
        self.checkpoint = checkpoint
        rounds = self.recipe.federation.rounds
        LOG.info("%s", describe_round(line, rounds), extra={"line": line})
        return to_record(checkpoint.state.to_arrays()), MetricRecord(dict(line["metrics"]))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: sites evaluate the model they receive as part of training."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def _wait_for_sites(self, server_round: int, grid: Grid) -> dict[str, int]:
        federation, began = self.recipe.federation, time.monotonic()
        expected, self.expect_sites = self.expect_sites, 0  # later rounds take who is there
        self.roster.begin_round()
        while len(sites := self.roster.present(grid)) < max(federation.min_sites, expected):
            waited = time.monotonic() - began
            all_came = 0 < expected <= len(sites) + len(self.roster.refused)
            if not all_came and waited < federation.wait_for_sites_seconds:
                time.sleep(min(POLL_SECONDS, federation.wait_for_sites_seconds))
            elif len(sites) >= federation.min_sites:
                break
            else:
                why = "".join(f"; {reason}" for reason in sorted(set(self.roster.refused.values())))
                raise QuorumError(
                    f"round {server_round}: {len(sites)} site(s) connected after {waited:.0f} s, "
                    f"{federation.min_sites} needed{why}; start the missing sites and run again: "
                    "the study resumes"
                )
        return sites

    def _require_quorum(self, server_round: int, outcomes: dict[str, Line]) -> None:
        admitted = [site for site, o in outcomes.items() if o["outcome"] == "admitted"]
        if len(admitted) >= self.recipe.federation.min_sites:
            return
        failed = [
            outcome["reason"]
            if outcome["outcome"] == "rejected"  # such a reason names the site
            else f"site '{site}' {outcome['outcome']}: {outcome['reason']}"
            for site, outcome in outcomes.items()
            if outcome["outcome"] != "admitted"
        ]
        raise QuorumError(
            f"round {server_round}: {len(admitted)} of {len(outcomes)} sites admitted, "
            f"{self.recipe.federation.min_sites} needed ({'; '.join(failed)}); mend the sites and "
            f"run again: the study resumes after round {server_round - 1}"
        )

    def _aggregate(
        self, server_round: int, updates: dict[str, SiteUpdate]
    ) -> tuple[Checkpoint, dict[str, float]]:
        state, contributions, weights = aggregate(
            self.recipe,
            self.checkpoint.state,
            self.checkpoint.contributions,
            updates,
            round_number=server_round,
        )
        return Checkpoint(server_round, state, contributions), weights

    def _alarms(self, updates: dict[str, SiteUpdate]) -> list[str]:
        alarms = [
            f"site '{site}': {words}"
            for site in sorted(updates)
            for modality in updates[site].num_examples
            if (words := alarm(updates[site].metrics, modality))
        ]
        for words in alarms:
            LOG.warning("%s", words)
        return alarms

    def _lap(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase] = now - self._began
        self._began = now
