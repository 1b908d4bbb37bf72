"""A study for Prometheus: its run directory as metrics, read again whenever it has changed.

METRICS is the list of all that there are; docs/metrics.md has the same table. Figures by site or
modality are those of the last round in which they were given; what a site's policy keeps back never
came here and is not there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from core.checkpoint import read_json
from core.errors import UserError
from core.lock import held
from core.modalities import TITLES
from core.wire import EPSILON
from core.wire import METRICS as SITE_METRICS
from server.history import Line, read_history, read_recipe

Samples = dict[tuple[str, ...], float]
"""Values of labels -> value"""


@dataclass(frozen=True)
class About:
    """A metric as it is documented."""

    help: str
    labels: tuple[str, ...] = ()


PREFIX: Final = "fedmermed_"
BY_MODALITY: Final = ("modality",)
BY_SITE: Final = ("site",)
METRICS: Final[dict[str, About]] = {
    "study_info": About("Always 1; which study this is", ("name", "study", "version")),
    "study_running": About("1 while a process works on the study"),
    "study_failed": About("1 if the last run stopped with an error"),
    "rounds_planned": About("Rounds of the recipe"),
    "rounds_done": About("Rounds done"),
    "last_round_timestamp_seconds": About("When the history was last written; 0 before"),
    "round_seconds": About("Seconds of the last round by phase", ("phase",)),
    "phase_seconds_total": About("Seconds of all rounds by phase", ("phase",)),
    "bytes_total": About("Bytes to (down) and from (up) the sites", ("direction",)),
    "sites_admitted": About("Sites whose update was used in the last round"),
    "last_round_collapse_alarms": About("Collapse alarms of the last round"),
    "collapse_alarms_total": About("Collapse alarms of all rounds"),
    "loss": About("Training loss", BY_MODALITY),
    "loss_ceiling": About("Loss of a collapsed model", BY_MODALITY),
    "teacher_entropy": About("Entropy of the teacher's targets", BY_MODALITY),
    "mean_cosine": About("Mean cosine of embeddings; 1 is a point", BY_MODALITY),
    "rankme": About("Effective rank of embeddings", BY_MODALITY),
    "koleo": About("Spreading loss", BY_MODALITY),
    "description": About("Error of describing pictures; 2 is saying the usual", BY_MODALITY),
    "knn_auroc": About("kNN AUROC of the model before the last evaluated round", BY_MODALITY),
    "site_rounds_total": About("Rounds by what came of the site's reply", ("site", "outcome")),
    "site_asked_again_total": About("Questions beyond the first of a round", BY_SITE),
    "site_outliers_total": About("Times that the site's update stood out", BY_SITE),
    "site_last_admitted_round": About("Last round that used its update; 0 for none", BY_SITE),
    "site_images": About("Training images, as the site said", ("site", "modality")),
    "site_seconds": About("Seconds from the last question to its answer", BY_SITE),
    "site_update_norm": About("Length of its update", BY_SITE),
    "site_norm_ratio": About("That, in units of the median site's", BY_SITE),
    "site_cosine": About("Cosine of its update with the others'", BY_SITE),
    "site_epsilon": About("Epsilon of the study at the site, as it said (record privacy)", BY_SITE),
    "epsilon": About("Epsilon of the model (site privacy)"),
    "site_weight": About("Its share in the average", BY_SITE),
}
"""All metrics, without their prefix; those that end in _total are counters."""
FIGURES: Final = {
    "seconds": "site_seconds", "update_norm": "site_update_norm", "norm_ratio": "site_norm_ratio",
    "cosine": "site_cosine", "weight": "site_weight",
}  # fmt: skip
"""Key of an outcome in the history -> its metric."""


class StudyCollector(Collector):
    """Hands the metrics of a run directory to Prometheus's client library.

    Args:
        run: The run directory; it is only read.

    Raises:
        UserError: it holds no study.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "recipe.json").exists() or not (run / "study.json").exists():
            raise UserError(f"'{run}' is not a run directory; give the directory of a study")
        self._run = run
        self._recipe = read_recipe(run / "recipe.json")
        self._study = read_json(run / "study.json")
        self._seen: tuple[int, int] | None = None
        self._samples: dict[str, Samples] = {}

    def collect(self) -> Iterator[Metric]:
        """One family a metric that has a value, in the order of METRICS."""
        found = self._history() | self._now()
        for name, about in METRICS.items():
            if samples := found.get(name):
                counter = name.endswith("_total")
                family = CounterMetricFamily if counter else GaugeMetricFamily
                metric = family(PREFIX + name, about.help, labels=about.labels)
                for labels, value in samples.items():
                    metric.add_metric(labels, value)
                yield metric

    def _now(self) -> dict[str, Samples]:
        """What may change without a new round."""
        labels = self._recipe.name, str(self._study["study"]), _version(self._study)
        return {
            "study_info": {labels: 1},
            "study_running": {(): float(held(self._run / "lock"))},
            "study_failed": {(): float((self._run / "failure.json").exists())},
            "rounds_planned": {(): self._recipe.federation.rounds},
        }

    def _history(self) -> dict[str, Samples]:
        """What follows from the history; a long one is not read for nothing."""
        file = self._run / "history.jsonl"
        stat = file.stat() if file.exists() else None
        seen = (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)
        if seen != self._seen:
            samples = of_history(read_history(self._run))
            samples["last_round_timestamp_seconds"] = {(): seen[0] / 1e9}
            self._seen, self._samples = seen, samples
        return self._samples


def of_history(lines: Sequence[Line]) -> dict[str, Samples]:
    """Metric -> its samples, as far as they follow from the lines of a history."""
    found: dict[str, Samples] = {name: {} for name in METRICS}
    found["rounds_done"][()] = len(lines)
    found["collapse_alarms_total"][()] = 0
    for direction in ("down", "up"):
        found["bytes_total"][direction,] = 0
    for line in lines:
        _add_round(found, line)
        for site, outcome in line["sites"].items():
            _add_site(found, line["round"], site, outcome)
        for outlier in line.get("outliers", ()):
            _count(found["site_outliers_total"], (outlier["site"],), 1)
    if lines:
        admitted = [o["outcome"] == "admitted" for o in lines[-1]["sites"].values()]
        found["sites_admitted"][()] = sum(admitted)
        found["last_round_collapse_alarms"][()] = len(lines[-1]["alarms"])
    return found


def _add_round(found: dict[str, Samples], line: Line) -> None:
    for phase, seconds in line["seconds"].items():
        found["round_seconds"][phase,] = seconds
        _count(found["phase_seconds_total"], (phase,), seconds)
    found["bytes_total"]["down",] += line["bytes_down"]
    found["bytes_total"]["up",] += line["bytes_up"]
    found["collapse_alarms_total"][()] += len(line["alarms"])
    if EPSILON in line["metrics"]:
        found[EPSILON][()] = line["metrics"][EPSILON]
    for key, value in line["metrics"].items():
        name, _, modality = key.partition("/")
        if name in SITE_METRICS and name in METRICS and modality in TITLES:
            found[name][modality,] = value


def _add_site(found: dict[str, Samples], number: int, site: str, outcome: Line) -> None:
    _count(found["site_rounds_total"], (site, outcome["outcome"]), 1)
    _count(found["site_asked_again_total"], (site,), max(0, outcome.get("asked", 1) - 1))
    _count(found["site_outliers_total"], (site,), 0)
    admitted = outcome["outcome"] == "admitted"
    last = found["site_last_admitted_round"]
    last[site,] = number if admitted else last.get((site,), 0)
    if EPSILON in outcome.get("metrics", {}):
        found["site_epsilon"][site,] = outcome["metrics"][EPSILON]
    for modality, count in outcome.get("num_examples", {}).items():
        found["site_images"][site, modality] = count
    for key, name in FIGURES.items():
        if outcome.get(key) is not None:
            found[name][site,] = outcome[key]


def _count(samples: Samples, labels: tuple[str, ...], value: float) -> None:
    samples[labels] = samples.get(labels, 0) + value


def _version(study: Line) -> str:
    return str(study.get("packages", {}).get("fedmermed", ""))
