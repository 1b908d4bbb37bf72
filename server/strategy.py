"""Our strategy on Flower's Strategy API: quorum, admission by name, resume, a full record.

Flower's own start() counts rounds from 1, keeps no checkpoint and ends a run that every site
refused as completed; ours resumes, and raises when a round misses its quorum.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from core.config import Recipe
from core.privacy.noise import PrivateRandom
from core.transport import pack_state
from core.wire import Prototypes, SiteUpdate, sends_prototypes
from server.aggregate import aggregate
from server.attendance import last_sites, require_quorum, wait_for_sites
from server.exchange import Exchange
from server.history import Checkpoint, RunDirectory, describe_round, read_history
from server.intake import SILENT, Intake
from server.live import Live
from server.quarantine import quarantined
from server.release import commit
from server.replies import collapse_alarms, mean_metrics, to_record
from server.roster import Roster
from server.screening import screen
from server.site_privacy import aggregate_privately, require_room
from server.spool import Spool

LOG = logging.getLogger("fedmermed.server")


class FederatedMemory(Strategy):
    """Averages students and teachers with weights balanced over modalities; merges prototypes.

    Args:
        recipe: The study.
        run: Where checkpoints and history go.
        checkpoint: Where the study stands.
        expect_sites: A study's first round waits for so many, as long as for the quorum.
        registered: Where the service notes which key is which site's, see server.roster.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        checkpoint: Checkpoint,
        expect_sites: int = 0,
        registered: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.checkpoint = checkpoint
        self.expect_sites = expect_sites
        self.roster = Roster(run.study, registered)
        self.live = Live(run.path, recipe.federation.rounds)
        self._exchange: Exchange | None = None
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

        The state is read from and written to the checkpoint, and evaluation is part of a site's
        train reply, so `initial_arrays` and the last three arguments go unused, and the result
        holds metrics alone. Beside the state, memory holds at most what is being sent, or one
        reply, or the next state, however many sites there are.

        Raises:
            QuorumError: a round missed its quorum; the checkpoint of the one before is intact.
        """
        self.summary()
        result = Result()
        for server_round in range(self.checkpoint.round_number + 1, num_rounds + 1):
            self._began, self._seconds, self._bytes_down = time.monotonic(), {}, 0
            lines, federation = read_history(self.run.path), self.recipe.federation
            held = quarantined(self.run.path, lines, federation.quarantine_after)
            self.roster.begin_round(held)
            self.live.begin_round(server_round)
            expected = 0 if lines else self.expect_sites
            sites = wait_for_sites(
                federation, self.roster, grid, server_round, last_sites(lines), expected, self.live
            )
            self._lap("wait_for_sites")
            require_room(self.recipe, server_round, len(sites))
            LOG.info("round %d of %d: %d sites train", server_round, num_rounds, len(sites))
            self._exchange = self._open_exchange(server_round, grid, timeout)
            _, metrics = self.aggregate_train(server_round, self._exchange.replies(sites))
            result.train_metrics_clientapp[server_round] = metrics
        return result

    def summary(self) -> None:
        """Say where the study stands."""
        done, rounds = self.checkpoint.round_number, self.recipe.federation.rounds
        LOG.info("study '%s': %d of %d rounds done", self.recipe.name, done, rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: `start` asks sites by name, and asks some again."""
        return []

    def _open_exchange(self, server_round: int, grid: Grid, timeout: float) -> Exchange:
        config = ConfigRecord(
            {
                "study": self.run.study,
                "round": server_round,
                "step": (server_round - 1) * self.recipe.federation.local_steps,
                "recipe": self.recipe.to_json(),
            }
        )

        def ask(sites: Mapping[str, int], seconds: float) -> list[Message]:
            # Made for each question and let go of: no name may keep the state once it is sent.
            state = self.checkpoint.state
            if not sends_prototypes(self.recipe):
                state = replace(state, prototypes=Prototypes({}, {}))
            arrays = to_record(pack_state(state.to_arrays(), self.recipe.federation.transport))
            self._bytes_down += len(sites) * (arrays.count_bytes() + config.count_bytes())
            content, group = RecordDict({"arrays": arrays, "config": config}), str(server_round)
            return [
                # A moment longer than we wait: what the SuperLink says of one that expired
                # would take the place of our own plain reason.
                Message(content, node, MessageType.TRAIN, ttl=seconds + 60.0, group_id=group)
                for node in sites.values()
            ]

        return Exchange(grid, ask, lambda: self.roster.present(grid), timeout, self.live)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[None, MetricRecord]:
        """Admit or reject each reply by site name, aggregate, and make the round durable.

        Raises:
            QuorumError: fewer updates than `min_sites` were admitted.
        """
        with Spool(self.run.path) as spool:
            intake = self._take_in(server_round, replies, spool)
            outcomes = intake.outcomes
            self.live.outcomes(outcomes)
            self.live.phase("screening")
            for name, reason in self.roster.quarantined.items():
                outcomes[name] = {"outcome": "quarantined", "reason": reason}
            state, lines = self.checkpoint.state, read_history(self.run.path)
            known = set(self.roster.names.values()) | set(last_sites(lines))
            for name in sorted(known - set(outcomes)):
                outcomes[name] = {"outcome": "absent", "reason": "not connected"}
            screened = screen(self.recipe, state, lines, intake.updates, outcomes)
            updates = screened.updates
            self.live.outcomes(outcomes)
            self.live.phase("aggregating")
            self._lap("screen")
            require_quorum(self.recipe.federation, server_round, outcomes)
            checkpoint, weights = self._aggregate(server_round, updates)
        self._lap("aggregate")
        for site, weight in weights.items():
            outcomes[site]["weight"] = weight
        for words in (alarms := collapse_alarms(updates)):
            LOG.warning("%s", words)
        line = commit(
            self.run,
            self.recipe,
            checkpoint,
            {
                "round": server_round,
                "first_step": (server_round - 1) * self.recipe.federation.local_steps,
                "sites": outcomes,
                "refused_nodes": sorted(self.roster.refused.values()),
                "metrics": mean_metrics(updates),
                "alarms": alarms,
                "outliers": screened.outliers,
                "bytes_down": self._bytes_down,
                "bytes_up": intake.bytes_up,
                "seconds": {name: round(s, 3) for name, s in self._seconds.items()},
            },
        )
        self.checkpoint = checkpoint
        rounds = self.recipe.federation.rounds
        LOG.info("%s", describe_round(line, rounds), extra={"line": line})
        return None, MetricRecord(dict(line["metrics"]))  # the checkpoint has the arrays

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

    def _take_in(self, server_round: int, replies: Iterable[Message], spool: Spool) -> Intake:
        exchange = self._exchange
        assert exchange is not None, "start opens the exchange"
        intake = Intake(self.recipe, server_round, self.checkpoint.state, exchange.asked, spool)
        for reply in replies:
            self._lap("exchange")
            intake.take(reply)
            self.live.outcomes(intake.outcomes)
            self.live.beat()
            del reply  # it would live until the next one is here
            self._lap("admit")
        self._lap("exchange")
        for site, asked in exchange.sites.items():
            intake.outcomes.setdefault(site, dict(SILENT)).update(asked.facts())
        return intake

    def _aggregate(
        self, server_round: int, updates: dict[str, SiteUpdate]
    ) -> tuple[Checkpoint, dict[str, float]]:
        if self.recipe.privacy.mode == "site":
            state, weights = aggregate_privately(
                self.recipe, self.checkpoint.state, updates, round_number=server_round,
                random=PrivateRandom(),
            )  # fmt: skip
            return Checkpoint(server_round, state, {}), weights
        state, contributions, weights = aggregate(
            self.recipe,
            self.checkpoint.state,
            {
                site: prototypes
                for site, prototypes in self.checkpoint.contributions.items()
                if site not in self.roster.quarantined
            },
            updates,
            round_number=server_round,
        )
        return Checkpoint(server_round, state, contributions), weights

    def _lap(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._began
        self._began = now
