"""The run directory: all that a study is at the coordinator, and how it goes on after a crash.

RUN/recipe.json                the recipe, complete
RUN/study.json                 the study's random id, when it began, versions
RUN/round-0000.safetensors     the initial state; then one file a round; which of them are kept is
                               the recipe's federation.keep_every
RUN/history.jsonl              one line a round: sites, outcomes, figures, digest of the checkpoint
RUN/failure.json               why the last run stopped, if it did
RUN/quarantine.json            which sites are not asked, and why (server/quarantine.py)
RUN/run.json                   which of Flower's runs works on it, if it was submitted to one
RUN/lock                       held by the server that works on it
RUN/live.json                  what happens now: phase, deadline, a state a site (server/live.py)
RUN/ledger.jsonl               with site privacy: what was released, see server/release.py, as is
RUN/prepared.*                 the round that is about to be paid for
and, while a round runs, a file without a name with the updates that were admitted (server/spool.py)
A round is done when its line and its intact checkpoint are there; a line is written after its
checkpoint. Checkpoints hold no time and no id: equal studies give equal files.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.checkpoint import (
    Arrays,
    load_arrays,
    read_json,
    save_arrays,
    sha256_file,
    write_atomically,
    write_json,
)
from core.config import Recipe, load_recipe, recipe_from_json
from core.errors import UserError
from core.wire import GlobalState, Prototypes

SITE_PROTOTYPES = "site_prototypes/"
SITE_COUNTS = "site_prototype_counts/"
NEWEST_KEPT = 3
"""Checkpoints that are kept in any case: a damaged one costs a round and not the study."""
PACKAGES = ("fedmermed", "flwr", "numpy", "safetensors", "torch", "timm")
LOCK_SECONDS = 1.0
"""Whoever only looks whether a run directory is held holds it for an instant."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Where a study stands: the last round done, 0 before the first, and its state."""

    round_number: int
    state: GlobalState
    contributions: dict[str, Prototypes]
    """Site -> the prototypes it last sent, decayed while it was absent."""


@dataclass(frozen=True)
class RunDirectory:
    """One study's files."""

    path: Path
    study: str
    keep_every: int = 1

    def load(self, initial: Callable[[], GlobalState]) -> Checkpoint:
        """The last round that is done; lines and files after it are dropped.

        Args:
            initial: Makes the state of round 0, called only when the study has none yet.
        """
        number = len(self.heal())
        if not number and not self.checkpoint_path(0).exists():
            self.save(Checkpoint(0, initial(), {}), self.checkpoint_path(0))
        arrays, _ = load_arrays(self.checkpoint_path(number))
        return Checkpoint(number, GlobalState.from_arrays(arrays), _contributions(arrays))

    def heal(self) -> list[Line]:
        """Drop from the history what comes after the last round that is done; the others."""
        lines = read_history(self.path)
        while lines and not self._intact(lines[-1]):
            lines.pop()
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        if self._history.exists() and self._history.read_text(encoding="utf-8") != text:
            write_atomically(self._history, text.encode())
        return lines

    def commit(self, checkpoint: Checkpoint, line: Line) -> Line:
        """Write a round's checkpoint, then its line with the checkpoint's digest."""
        path = self.checkpoint_path(checkpoint.round_number)
        return self.record({**line, "sha256": self.save(checkpoint, path)})

    def record(self, line: Line) -> Line:
        """Write the line of a round whose checkpoint is in its place."""
        with open(self._history, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._prune(line["round"])
        return line

    def save(self, checkpoint: Checkpoint, path: Path) -> str:
        """Write a checkpoint; returns the file's sha256."""
        arrays = checkpoint.state.to_arrays()
        for site, prototypes in checkpoint.contributions.items():
            for modality in prototypes.counts:
                arrays[f"{SITE_PROTOTYPES}{site}/{modality}"] = prototypes.centroids[modality]
                arrays[f"{SITE_COUNTS}{site}/{modality}"] = prototypes.counts[modality]
        return save_arrays(path, arrays, {"round": str(checkpoint.round_number)})

    def checkpoint_path(self, round_number: int) -> Path:
        """File of the global state after a round."""
        return self.path / f"round-{round_number:04d}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: two servers on one run would overwrite each other's rounds.

        Raises:
            UserError: another process holds it.
        """
        with open(self.path / "lock", "w") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"another process is working on run directory '{self.path}'; wait for "
                            "it, stop it, or give another directory"
                        ) from None
                    time.sleep(0.05)
            yield

    def fail(self, reason: str, *, final: bool = True) -> None:
        """Leave word of why the run stopped, for whoever only sees this directory.

        Args:
            reason: In words.
            final: Whether it needs a person; if not, the study may be submitted again.
        """
        write_json(self.path / "failure.json", {"reason": reason, "final": final})

    @property
    def _history(self) -> Path:
        return self.path / "history.jsonl"

    def _intact(self, line: Line) -> bool:
        path = self.checkpoint_path(line["round"])
        return path.exists() and sha256_file(path) == line["sha256"]

    def _prune(self, last: int) -> None:
        for number in range(1, last - NEWEST_KEPT + 1):
            if number % self.keep_every:
                self.checkpoint_path(number).unlink(missing_ok=True)


def open_run(path: Path, recipe: Recipe) -> RunDirectory:
    """Open a run directory, or begin a study in an empty or missing one.

    Raises:
        UserError: the directory holds a study with another recipe.
    """
    recipe_file, study_file = path / "recipe.json", path / "study.json"
    if recipe_file.exists():
        there = read_recipe(recipe_file)
        if there != recipe:
            raise UserError(
                f"run directory '{path}' holds a study with another recipe: "
                f"{_difference(there, recipe)}; give another directory, or the recipe it began with"
            )
    else:
        write_json(recipe_file, recipe.model_dump(mode="json"))
    if not study_file.exists():
        study = {
            "study": secrets.token_hex(16),
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: v for name in PACKAGES if (v := _version(name))},
        }
        write_json(study_file, study)
    (path / "failure.json").unlink(missing_ok=True)
    return RunDirectory(path, read_json(study_file)["study"], recipe.federation.keep_every)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file or from a run directory's recipe.json."""
    if path.suffix == ".json":
        return recipe_from_json(json.dumps(read_json(path)), f"recipe '{path}'")
    return load_recipe(path)


def read_history(path: Path) -> list[Line]:
    """The lines of a run directory's history, rounds 1, 2, ...; a torn end is left out."""
    file = path / "history.jsonl"
    lines: list[Line] = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or line.get("round") != len(lines) + 1:
            break
        lines.append(line)
    return lines


def describe_round(line: Line, rounds: int) -> str:
    """A round in one sentence."""
    outcomes = [outcome["outcome"] for outcome in line["sites"].values()]
    losses = [value for name, value in line["metrics"].items() if name.startswith("loss/")]
    loss = f", mean loss {sum(losses) / len(losses):.3f}" if losses else ""
    return (
        f"round {line['round']} of {rounds}: {outcomes.count('admitted')} of {len(outcomes)} sites "
        f"admitted{loss}, {sum(line['seconds'].values()):.1f} s"
    )


def _contributions(arrays: Arrays) -> dict[str, Prototypes]:
    contributions: dict[str, Prototypes] = {}
    for name, array in arrays.items():
        if name.startswith(SITE_COUNTS):
            site, modality = name.removeprefix(SITE_COUNTS).split("/")
            prototypes = contributions.setdefault(site, Prototypes({}, {}))
            prototypes.counts[modality] = array
            prototypes.centroids[modality] = arrays[f"{SITE_PROTOTYPES}{site}/{modality}"]
    return contributions


def _difference(there: Recipe, here: Recipe) -> str:
    old, new = _flat(there.model_dump()), _flat(here.model_dump())
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    shown = [f"'{key}' is {old.get(key)!r} there and {new.get(key)!r} here" for key in keys[:3]]
    return ", ".join(shown) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
