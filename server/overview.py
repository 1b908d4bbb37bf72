"""A study at a glance: all that its run directory tells, as one value for tables and pages."""

from dataclasses import asdict, dataclass
from typing import Any

from server.alarms import Alarm


@dataclass(frozen=True)
class Figure:
    """One figure of a modality, the mean over the sites that sent it."""

    last: float
    round: int
    change: float | None
    """Since a few values before, or the first; None where there is one alone."""


@dataclass(frozen=True)
class ModalityView:
    """How a modality learns."""

    verdict: str
    """untrained: no site has it any more; collapse; of its kNN AUROC in the last rounds: better,
    worse, steady, too early to tell; unlabelled: no site sends one; private: none may, by record
    privacy."""
    images: int
    sites: int
    figures: dict[str, Figure]
    """metric (core.wire.METRICS) -> its figure"""
    prototypes: int
    prototype_patients: int


@dataclass(frozen=True)
class SiteView:
    """What is known of a site."""

    state: str
    """One of server.live.STATES; after the run, its last outcome."""
    since: float | None
    """Unix seconds; None where only the history tells."""
    reason: str
    last_admitted: int
    """Round, 0: none."""
    rounds: dict[str, int]
    """outcome -> rounds"""
    rejected_reason: str
    seconds: float | None
    bytes_up: int
    images: dict[str, int]
    quarantine: str
    """Why it is held; empty: it is not."""
    epsilon: float | None
    """That its patients have spent in this study, as it said; None: no record privacy."""


@dataclass(frozen=True)
class PrivacyView:
    """What differential privacy a study has, and what of it is spent."""

    mode: str
    """none, record or site, see core.privacy.config"""
    delta: float
    spent: float | None
    """Epsilon: of the site that has spent most (record), or of the model (site)."""
    planned: float | None
    """Epsilon after the last round; None where nobody could say, see server.study."""


@dataclass(frozen=True)
class Overview:
    """A study, from its run directory alone. Times are Unix seconds."""

    name: str
    study: str
    began: str
    state: str
    """not started, starting, running, waiting for sites, finished, failed, stopped or not heard
    of: its server is gone without a word."""
    state_words: str
    phase: str
    """Of the round that runs; empty if none does."""
    since: float | None
    deadline: float | None
    steps: tuple[int, int] | None
    """Of pretraining on phantoms, before round 1: done, of how many."""
    steps_left: float | None
    """Seconds that the rest of them take, about."""
    written: float | None
    """When the server was last heard of."""
    round: int
    """That runs or ran last."""
    rounds_done: int
    rounds: int
    round_seconds: float | None
    """Median of the last rounds."""
    seconds_left: float | None
    bytes_up: int
    bytes_down: int
    min_sites: int
    privacy: PrivacyView
    sites: dict[str, SiteView]
    modalities: dict[str, ModalityView]
    alarms: tuple[Alarm, ...]
    now: float

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return asdict(self)
