"""Releases under site privacy: a round is paid for before anybody can have it, and paid for once.

RUN/prepared.safetensors   the state after the round
RUN/prepared.json          its line of the history, with the digest of that state and the epsilon
RUN/ledger.jsonl           the ledger: study, round, digest and noise of every release

Prepared, charged, renamed, recorded: whoever dies in between leaves what `finish_release` completes
with the same digest, which the ledger counts once. Noise drawn for a state that was not prepared
whole is lost with it, unseen.

**Guarantees**, for a kill at any instant:
    - The state of a round has its final name, and its line in the history, only when its charge is
      on the disk.
    - After a resume each round that is done was charged once, under the digest of its checkpoint.
    - A round that is done again because its checkpoint was damaged is charged again: its first
      state was released too.

Not covered: a run directory that is set back to an older copy forgets releases.
"""

import os
from typing import Final

from core.checkpoint import read_json, sha256_file, sync_directory, write_json
from core.config import Recipe
from core.privacy.accounting import epsilon, round_events
from core.privacy.ledger import Ledger
from core.wire import EPSILON
from server.history import Checkpoint, Line, RunDirectory

STATE: Final = "prepared.safetensors"
LINE: Final = "prepared.json"
LEDGER: Final = "ledger.jsonl"


def commit(run: RunDirectory, recipe: Recipe, checkpoint: Checkpoint, line: Line) -> Line:
    """Make a round durable; under site privacy, pay for it first.

    Args:
        run: The run directory; this process holds it.
        recipe: The study.
        checkpoint: The round and its state, noised under site privacy.
        line: What is known of the round.

    Returns:
        The line as it is in the history, with the checkpoint's digest and, under site privacy, the
        study's epsilon.

    Raises:
        UserError: the ledger is damaged or cannot be written; nothing was released.
    """
    if recipe.privacy.mode != "site":
        return run.commit(checkpoint, line)
    spent = spent_epsilon(run, recipe, checkpoint.round_number)
    line = {**line, "metrics": {**line["metrics"], EPSILON: spent}}
    line["sha256"] = run.save(checkpoint, run.path / STATE)
    write_json(run.path / LINE, line)
    return _publish(run, recipe, line)


def finish_release(run: RunDirectory, recipe: Recipe) -> None:
    """Complete the release that a kill cut short, and drop what it left half.

    Raises:
        UserError: as `commit`.
    """
    done, state, file = len(run.heal()), run.path / STATE, run.path / LINE
    if file.exists() and (line := read_json(file))["round"] == done + 1:
        final = run.checkpoint_path(done + 1)
        if any(path.exists() and sha256_file(path) == line["sha256"] for path in (state, final)):
            _publish(run, recipe, line)
    file.unlink(missing_ok=True)
    state.unlink(missing_ok=True)


def spent_epsilon(run: RunDirectory, recipe: Recipe, *rounds: int) -> float:
    """Epsilon of all that the study has released, and of more rounds."""
    events = [*Ledger(run.path / LEDGER).events(run.study)]
    for number in rounds:
        events += round_events(recipe, number)
    return epsilon(events, recipe.privacy.delta)


def _publish(run: RunDirectory, recipe: Recipe, line: Line) -> Line:
    """Charge, rename, record; the first two do nothing where they were done before."""
    number, state = line["round"], run.path / STATE
    Ledger(run.path / LEDGER).charge(
        run.study,
        number,
        line["sha256"],
        round_events(recipe, number),
        delta=recipe.privacy.delta,
        ceiling=None,
    )
    if state.exists():
        os.replace(state, run.checkpoint_path(number))
    run.record(line)
    sync_directory(run.path)
    (run.path / LINE).unlink()
    return line
