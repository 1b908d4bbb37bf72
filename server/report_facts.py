"""What the report of a study tells in tables, taken from its run directory alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from core.checkpoint import read_json, sha256_file
from core.config import Recipe
from core.modalities import TITLES
from core.wire import COUNTS
from server.history import SITE_COUNTS, Line
from server.tally import PHASES

OUTCOMES = ("admitted", "silent", "rejected", "error", "absent", "quarantined")


@dataclass
class SiteRow:
    """One site over all rounds.

    Attributes:
        name: Its name.
        outcomes: Outcome -> rounds that ended so for it.
        asked_again: Questions beyond the first of a round.
        seconds: From the question to the answer, a round that it answered.
        training_seconds: What it says it trained and evaluated.
        images: Modality -> training images, as it last said.
        weights: Its share in the average, a round that used its update.
    """

    name: str
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    asked_again: int = 0
    seconds: list[float] = field(default_factory=list)
    training_seconds: float = 0.0
    images: dict[str, int] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)

    @property
    def mean_seconds(self) -> float | None:
        """From the question to the answer."""
        return fmean(self.seconds) if self.seconds else None

    @property
    def mean_weight(self) -> float | None:
        """Of the rounds in which its update was used."""
        return fmean(self.weights) if self.weights else None


def site_rows(lines: Sequence[Line]) -> list[SiteRow]:
    """A row a site that was ever known, by name."""
    rows: dict[str, SiteRow] = {}
    for line in lines:
        for site, outcome in line["sites"].items():
            row = rows.setdefault(site, SiteRow(site))
            row.outcomes[outcome["outcome"]] = row.outcomes.get(outcome["outcome"], 0) + 1
            row.asked_again += max(0, outcome.get("asked", 1) - 1)
            row.images = outcome.get("num_examples", row.images)
            if "seconds" in outcome:
                row.seconds.append(outcome["seconds"])
            if "weight" in outcome:
                row.weights.append(outcome["weight"])
            metrics = outcome.get("metrics", {})
            row.training_seconds += sum(v for n, v in metrics.items() if n.startswith("seconds_"))
    return [rows[name] for name in sorted(rows)]


def phase_seconds(lines: Sequence[Line]) -> dict[str, list[float]]:
    """Phase -> seconds of each round."""
    return {p: [float(line["seconds"].get(p, 0.0)) for line in lines] for p in PHASES}


def total_images(rows: Sequence[SiteRow]) -> dict[str, int]:
    """Modality -> images of all sites, modalities in their fixed order."""
    return {
        modality: total
        for modality in TITLES
        if (total := sum(row.images.get(modality, 0) for row in rows))
    }


@dataclass(frozen=True)
class PrototypeRow:
    """The merged prototypes of a modality, and what they are made of."""

    title: str
    count: int
    patients: float
    sites: int


@dataclass(frozen=True)
class Model:
    """The last state of a study on disk.

    Attributes:
        round_number: The round after which it is the state.
        checksum: sha256 of its checkpoint as the history has it.
        state: "intact", "missing" or "damaged".
        released: sha256 of model.safetensors, "" if there is none.
        saved: When the checkpoint was written, in UTC; "" if it is missing.
        prototypes: A row a modality.
    """

    round_number: int
    checksum: str
    state: str
    released: str
    saved: str
    prototypes: tuple[PrototypeRow, ...]


def read_model(run: Path, lines: Sequence[Line]) -> Model:
    """Look at the last round's checkpoint, and hold it against its checksum."""
    number, checksum = lines[-1]["round"], lines[-1]["sha256"]
    file, released = run / f"round-{number:04d}.safetensors", run / "model.safetensors"
    own = sha256_file(released) if released.exists() else ""
    if not file.exists():
        return Model(number, checksum, "missing", own, "", ())
    intact = sha256_file(file) == checksum
    saved = datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    rows = _prototypes(file) if intact else ()
    return Model(number, checksum, "intact" if intact else "damaged", own, saved, rows)


def changed_settings(recipe: Recipe) -> list[tuple[str, str]]:
    """Settings of a recipe that are not the defaults, as section.key and value."""
    return [
        (name, value)
        for name, value in _texts(recipe.model_dump(mode="json", exclude_defaults=True))
        if name != "name"
    ]


def flat_settings(recipe: Recipe) -> list[tuple[str, str]]:
    """All settings of a recipe, as section.key and value."""
    return _texts(recipe.model_dump(mode="json"))


def read_optional(file: Path) -> dict[str, Any]:
    """A JSON file of the run directory, or {} if there is none."""
    return dict(read_json(file)) if file.exists() else {}


def _texts(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in _flat(table).items()
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _prototypes(file: Path) -> tuple[PrototypeRow, ...]:
    """Only the counts are read: the weights beside them may be gigabytes."""
    counts: dict[str, Any] = {}
    senders: dict[str, int] = {}
    try:
        with safe_open(file, "np") as arrays:
            for name in arrays.keys():  # noqa: SIM118 - it is no dictionary
                if name.startswith(COUNTS):
                    counts[name.removeprefix(COUNTS)] = arrays.get_tensor(name)
                elif name.startswith(SITE_COUNTS):
                    modality = name.rpartition("/")[2]
                    senders[modality] = senders.get(modality, 0) + 1
    except SafetensorError:
        return ()
    return tuple(
        PrototypeRow(
            TITLES[m], len(counts[m]), float(np.asarray(counts[m], np.float64).sum()),
            senders.get(m, 0),
        )
        for m in TITLES if m in counts
    )  # fmt: skip
