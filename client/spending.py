"""What a round with record privacy costs this site: held against its ceiling, and written down.

**Guarantees**, for studies with record privacy:
    - A round beyond the policy's `max_epsilon`, over all studies, is refused before an image is
      read; so is any reply once the ceiling lies below what is spent.
    - A reply is in the ledger, on the disk, before it can leave; one that is not there, as it was
      trained without record privacy, does not leave as an answer with it.
    - A round costs once, however often it is asked for and whenever the process dies; if its reply
      was lost with the site's state, training it again costs again.
    - A ledger that cannot be read or written stops this site's answers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.policy import Policy, PolicyRefusal
from client.state import SiteState
from core.checkpoint import Arrays, sha256_arrays
from core.config import Recipe
from core.privacy.accounting import Event, epsilon, round_events
from core.privacy.ledger import Ledger, OverBudget

FILE: Final = "ledger.jsonl"


@dataclass(frozen=True)
class Spending:
    """One round's part in the ledger; without record privacy all of it does nothing."""

    policy: Policy
    recipe: Recipe
    study: str
    round_number: int
    state_path: Path

    @property
    def private(self) -> bool:
        """Whether the round is charged."""
        return self.recipe.privacy.mode == "record"

    @property
    def ledger(self) -> Ledger:
        """The site's, over all studies: their patients are the same."""
        return Ledger(self.state_path / FILE)

    def recover(self, state: SiteState) -> None:
        """Finish a round that was charged before its process died."""
        if self.private:
            ledger = self.ledger
            state.recover(lambda number: ledger.charged(self.study, number))

    def hold_stored(self, reply: Arrays) -> None:
        """Hold a reply that was trained before.

        Raises:
            PolicyRefusal: it was not paid for, as it was trained without record privacy, or more is
                spent than the ceiling.
        """
        if not self.private:
            return
        if sha256_arrays(reply) not in self.ledger.charged(self.study, self.round_number):
            raise PolicyRefusal(
                f"round {self.round_number} was trained before without record privacy; this site "
                "trains a round of a study once"
            )
        self._hold(())

    def hold_new(self) -> None:
        """Hold a round that is to be trained.

        Raises:
            PolicyRefusal: it would spend more than the ceiling.
        """
        if self.private:
            self._hold(round_events(self.recipe, self.round_number))

    def _hold(self, events: tuple[Event, ...]) -> None:
        ceiling = self.policy.max_epsilon
        if ceiling is None:
            return
        after, affordable = self.ledger.affords(events, self.policy.delta, ceiling)
        if not affordable:
            raise PolicyRefusal(
                f"this site's patients would have spent an epsilon of {after:.2f} with round "
                f"{self.round_number}; its policy allows {ceiling:g} over all studies"
            )

    def charge(self, digest: str) -> None:
        """Pay for the reply of this digest, before it can leave.

        Raises:
            PolicyRefusal: another study has spent what was left, while this one trained.
        """
        events = round_events(self.recipe, self.round_number)
        try:
            self.ledger.charge(
                self.study, self.round_number, digest, events,
                delta=self.policy.delta, ceiling=self.policy.max_epsilon,
            )  # fmt: skip
        except OverBudget as error:
            raise PolicyRefusal(str(error)) from None

    def epsilon_after(self) -> float:
        """What the study has spent with this round, at the recipe's delta: told with the reply."""
        events = (*self.ledger.events(self.study), *round_events(self.recipe, self.round_number))
        return epsilon(events, self.recipe.privacy.delta)
