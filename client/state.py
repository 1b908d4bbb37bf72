"""What a site keeps on its disk between rounds, so that a round is trained once whatever happens.

STATE/<study>/round-0007/   private.safetensors (optimiser moments, memory bank, what rounding took
                            from what was sent), reply.safetensors and reply.json (the exact reply,
                            and the digest of what it answers)
STATE/<study>/progress.json while a round trains, see client.progress
STATE/<study>/.ranks-*      while a round trains on several devices, see client.ranks
A round's directory appears by one rename, complete; the one before goes after that. Private arrays
hold patient embeddings and never leave the site.

A round that costs of a privacy budget is charged when its directory lies complete and synced under
another name. Killed between the charge and the rename, the next look renames it: the noise of that
reply is paid for, and a second training would draw, and cost, another one.
"""

import fcntl
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.policy import Refusal
from core.checkpoint import (
    Arrays,
    commit_directory,
    load_arrays,
    read_json,
    save_arrays,
    sha256_arrays,
    sync_directory,
    sync_tree,
    write_json,
)
from core.errors import UserError
from core.wire import GlobalState, SiteUpdate

STUDY_ID = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class StoredReply:
    """A trained round's reply, and what the policy is held against when it is sent again."""

    update: SiteUpdate
    patients: dict[str, int]
    """modality -> patients it was trained on"""


@dataclass(frozen=True)
class SiteState:
    """One study's state at one site."""

    directory: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study: an orphan of a killed process may still be training the same round."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.directory / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def stored_reply(self, round_number: int, received: str) -> StoredReply | None:
        """The reply to a round that was already trained, or None when it is new.

        Args:
            round_number: The round asked for.
            received: Digest of the arrays that came with it.

        Raises:
            Refusal: the round is older than the state, or was trained from other weights.
        """
        last = self.last_round()
        if round_number > last:
            return None
        if round_number < last:
            raise Refusal(
                f"round {round_number} was asked for, but this site is already at round {last} "
                "of this study; a site does not go back"
            )
        path = self._round(last)
        facts = read_json(path / "reply.json")
        if facts["received"] != received:
            raise Refusal(
                f"round {round_number} was asked for again with other weights; this site trains "
                "a round of a study once"
            )
        arrays, _ = load_arrays(path / "reply.safetensors")
        carrier = GlobalState.from_arrays(arrays)
        update = SiteUpdate(
            round_number=round_number,
            student=carrier.student,
            teacher=carrier.teacher,
            prototypes=carrier.prototypes,
            num_examples=facts["num_examples"],
            metrics=facts["metrics"],
        )
        # A round from before patients were noted had one of each modality at the least.
        return StoredReply(update, facts.get("patients", dict.fromkeys(update.num_examples, 1)))

    def private(self) -> Arrays:
        """Private arrays of the last round trained; none before the first."""
        file = self.private_file()
        return load_arrays(file)[0] if file else {}

    def private_file(self) -> Path | None:
        """Where they are."""
        last = self.last_round()
        return self._round(last) / "private.safetensors" if last else None

    def commit(
        self,
        round_number: int,
        received: str,
        reply: StoredReply,
        private: Arrays,
        charge: Callable[[str], None] | None = None,
    ) -> None:
        """Store a trained round in one step, then drop older ones.

        Args:
            round_number: The round.
            received: Digest of the arrays that came with it.
            reply: What is to leave.
            private: What is to stay.
            charge: Pays for the reply of this digest; what it raises leaves the round untrained.
        """
        update = reply.update
        aside = self._aside(round_number)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_arrays(aside / "private.safetensors", private)
        save_arrays(aside / "reply.safetensors", update.to_arrays())
        facts = {
            "received": received,
            "num_examples": update.num_examples,
            "metrics": update.metrics,
            "patients": reply.patients,
        }
        write_json(aside / "reply.json", facts)
        if charge is not None:
            sync_tree(aside)
            sync_directory(self.directory)
            charge(sha256_arrays(update.to_arrays()))
        self._finish(aside, round_number)

    def recover(self, charged: Callable[[int], Collection[str]]) -> None:
        """Finish the commit of a round that was charged before the process died.

        Args:
            charged: Round -> digests of the replies that were paid for.
        """
        for aside in sorted(self.directory.glob(".round-*.partial")):
            number = int(aside.name.removeprefix(".round-").removesuffix(".partial"))
            if number <= self.last_round():
                continue
            try:
                arrays, _ = load_arrays(aside / "reply.safetensors")
                read_json(aside / "reply.json")
            except UserError:  # killed while it was written, so before it was charged
                continue
            if sha256_arrays(arrays) in charged(number):
                self._finish(aside, number)

    def _finish(self, aside: Path, round_number: int) -> None:
        commit_directory(aside, self._round(round_number))
        for number in self._rounds():
            if number < round_number:
                shutil.rmtree(self._round(number))

    def last_round(self) -> int:
        """The last round trained, 0 before the first."""
        return max(self._rounds(), default=0)

    def _rounds(self) -> list[int]:
        return [int(path.name.removeprefix("round-")) for path in self.directory.glob("round-*")]

    def _aside(self, number: int) -> Path:
        return self.directory / f".round-{number:04d}.partial"

    def _round(self, number: int) -> Path:
        return self.directory / f"round-{number:04d}"


def open_state(state_path: Path, study: str) -> SiteState:
    """The state of a study.

    Raises:
        Refusal: the study's id, which comes from the coordinator, is not a plain hexadecimal name.
    """
    if not STUDY_ID.fullmatch(study):
        raise Refusal("the study's id is not 8 to 64 hexadecimal digits")
    return SiteState(state_path / "studies" / study)
