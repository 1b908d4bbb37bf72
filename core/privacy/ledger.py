"""What a site has spent of its patients' privacy, over all studies: the patients are the same."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from core.errors import UserError
from core.privacy.accounting import Event, epsilon, study_events
from core.privacy.ledger_file import LedgerFile
from core.strict import Count, Strict, validate

if TYPE_CHECKING:
    from core.config import Recipe


class OverBudget(UserError):
    """A charge beyond the ceiling; its text holds no path and may be sent to the coordinator."""


class Charge(Strict):
    """One reply of one round, and what it costs."""

    study: Annotated[str, Field(min_length=1)]
    round: Count
    reply: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """sha256 of all that leaves."""
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Ledger:
    """The charges of a site, or of a study's coordinator, in a file of their own.

    **Guarantees**, whatever process dies or power fails at whatever instant:
        - Once `charge` has returned, the charge is on the disk and counts from then on.
        - A study, round and reply charged twice counts once; another reply of the round counts.
        - A charge that would exceed the ceiling is refused and not written down, however many
          processes charge at once.
        - A changed, missing, added or moved line, and a file that cannot be read or written, is an
          error before anything is charged or told; it is never read as less spent.
        - Both files are their owner's alone.
    """

    path: Path
    """ledger.jsonl; ledger.head lies beside it. See core.privacy.ledger_file."""

    def charge(
        self,
        study: str,
        round_number: int,
        reply: str,
        events: Sequence[Event],
        *,
        delta: float,
        ceiling: float | None,
    ) -> None:
        """Write down a reply's cost; once this returns, the reply may leave.

        Args:
            study: The study's id.
            round_number: 1, 2, ...
            reply: sha256 of all that leaves, in hex.
            events: What it costs.
            delta: At which the ceiling holds.
            ceiling: Most epsilon of all charges together, of any study; None: no limit.

        Raises:
            OverBudget: the charge exceeds the ceiling; nothing was charged.
            UserError: a file is damaged, or cannot be read or written; the text holds its path.
        """
        charge = Charge(study=study, round=round_number, reply=reply, events=tuple(events))
        with LedgerFile(self.path).opened() as file:
            charges = self._parse(file.entries)
            for other in charges:
                if (other.study, other.round, other.reply) == (study, round_number, reply):
                    if other.events != charge.events:
                        raise ValueError(f"{charge} was charged as {other}")
                    return
            if ceiling is not None:
                after = epsilon([*_events(charges), *events], delta)
                if not after <= ceiling:
                    raise OverBudget(
                        f"round {round_number} of study {study} would bring this site's epsilon to "
                        f"{after:.4g} at delta {delta:g}, above its ceiling of {ceiling:g}; the "
                        "round does not leave"
                    )
            file.append(json.dumps(charge.model_dump(mode="json")).encode())

    def charges(self) -> list[Charge]:
        """All charges, in order.

        Raises:
            UserError: a file is damaged or cannot be read.
        """
        return self._parse(LedgerFile(self.path).read())

    def charged(self, study: str, round_number: int) -> list[str]:
        """Digests of the replies of a round that were charged."""
        return [c.reply for c in self.charges() if (c.study, c.round) == (study, round_number)]

    def events(self, study: str | None = None) -> list[Event]:
        """What was charged, of one study or of all."""
        return _events(c for c in self.charges() if study in (None, c.study))

    def epsilon(self, delta: float, study: str | None = None) -> float:
        """Epsilon of what was charged, of one study or of all."""
        return epsilon(self.events(study), delta)

    def affords(self, events: Sequence[Event], delta: float, ceiling: float) -> tuple[float, bool]:
        """Epsilon of all studies after some more events, and whether the ceiling allows it."""
        after = epsilon([*self.events(), *events], delta)
        return after, after <= ceiling

    def rounds_left(self, recipe: "Recipe", round_number: int, delta: float, ceiling: float) -> int:
        """How many rounds of a recipe the ceiling affords, the first of them `round_number`.

        At most those that the recipe still has; what was charged before, of any study, counts.
        """
        spent = self.events()
        low, high = 0, recipe.federation.rounds - round_number + 1
        while low < high:
            middle = (low + high + 1) // 2
            more = study_events(recipe, round_number, round_number + middle - 1)
            fits = epsilon([*spent, *more], delta) <= ceiling
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _parse(self, entries: list[bytes]) -> list[Charge]:
        return [
            validate(Charge, entry.decode(), f"ledger '{self.path}', line {number}")
            for number, entry in enumerate(entries, 1)
        ]


def _events(charges: Iterable[Charge]) -> list[Event]:
    return [event for charge in charges for event in charge.events]
