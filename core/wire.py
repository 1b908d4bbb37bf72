"""What crosses the wire, as a closed list, in plain numpy: the server reads this without torch.

Down (server to site), RecordDict with two records:
  "arrays"  ArrayRecord   student/<tensor>, teacher/<tensor>; with record privacy, whose memory is
                          made of them, prototypes/<modality> [K, D] unit rows and
                          prototype_counts/<modality> [K] float32
                          scales/student, scales/teacher [T] float32, in delta16 and delta8
  "config"  ConfigRecord  study, round, step (global step at which the round starts), recipe (JSON)
Up (site to server), RecordDict with two records:
  "arrays"  ArrayRecord   student/<tensor>, teacher/<tensor> (only when the recipe averages
                          teachers), prototypes/<modality>, prototype_counts/<modality>, and in
                          delta16 and delta8 scales as above
  "metrics" MetricRecord  round (int, the one that is answered), num_examples/<modality> (int, at
                          least one), and floats named <metric>/<modality> or <metric> with
                          <metric> in METRICS
With record privacy (core/privacy) metrics are round, num_examples/<modality> as the site declares
them in public, and epsilon; prototypes are there only in the rounds that release them.
Between a coordinator's service and a site's launcher small arrays travel in one (core/parcel.py).
Weights are float32, or in transport delta16 and delta8 float16 or int8 (core/transport.py).
A query message ("config": study) is answered with ConfigRecord "info": site, version.

An evaluate message measures a released backbone on a site's own labels. Down:
  "arrays"  ArrayRecord   backbone/<tensor>, and of the evaluator's own probe, if it sends one,
                          probe_weight/<modality> [F, C], probe_bias/<modality> [C]
  "config"  ConfigRecord  request: an EvaluationRequest as JSON
Up, an EvaluationReply:
  "metrics"    MetricRecord  num_train/<modality>, num_test/<modality> (int), and floats in [0, 1]
                             named <method>_<measure>/<modality>
  "histograms" ArrayRecord   histogram/<modality>/<class>/positives and .../negatives [B, 2] int64,
                             see core.evaluation.pooled; empty unless the site's policy sends them
  "notes"      ConfigRecord  skipped/<modality>, pooling/<modality>: why something was not sent
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from numpy.typing import NDArray
from pydantic import Field

from core.checkpoint import Arrays
from core.config import ModelConfig, Recipe
from core.modalities import MODALITIES
from core.strict import Count, Strict

STUDENT: Final = "student/"
TEACHER: Final = "teacher/"
PROTOTYPES: Final = "prototypes/"
COUNTS: Final = "prototype_counts/"
SCALES: Final = "scales/"
NUM_EXAMPLES: Final = "num_examples/"
ROUND: Final = "round"
EPSILON: Final = "epsilon"
"""What the site's ledger holds of the study, this reply included, at the recipe's delta."""

NOT_NOW: Final = 102
"""Code of an error reply to what the site's policy will allow later, by itself; the reason says
when. Flower's own codes are below 100."""

METRICS: Final[Mapping[str, tuple[float, float]]] = {
    "loss": (-1e6, 1e6),
    "koleo": (-1e6, 1e6),
    "description": (-1e-3, 1e6),
    "loss_ceiling": (0, 1e3),
    "teacher_entropy": (-1e-3, 1e3),
    "mean_cosine": (-1.001, 1.001),
    "rankme": (0, 1e6),
    "knn_auroc": (0, 1),
    "seconds_train": (0, 1e8),
    "seconds_evaluate": (0, 1e8),
    EPSILON: (0, 1e9),
}
"""Scalars a site may send, bare or as <metric>/<modality>, and the range in which each can lie,
rounding included; see core.collapse and core.train."""

BACKBONE: Final = "backbone/"
PROBE_WEIGHT: Final = "probe_weight/"
PROBE_BIAS: Final = "probe_bias/"
HISTOGRAM: Final = "histogram/"
SIDES: Final = ("positives", "negatives")
EVALUATION_COUNTS: Final = ("num_train", "num_test")
METHODS: Final = ("probe", "knn", "shared_probe")
"""probe and knn learn from the site's own training images; shared_probe is the evaluator's."""
MEASURES: Final = ("auroc", "accuracy", "balanced_accuracy")
NOTES: Final = ("skipped", "pooling")


@dataclass(frozen=True)
class Prototypes:
    """Centroids of one modality: unit rows [K, D] and how many patients each stands for [K]."""

    centroids: Arrays
    """modality -> float32 [K, D]"""
    counts: Arrays
    """modality -> float32 [K]"""


@dataclass(frozen=True, kw_only=True)
class GlobalState:
    """What the server sends, and what a checkpoint of a round holds.

    Prototypes are sent where `sends_prototypes`; else they are there to be looked at.
    """

    student: Arrays
    teacher: Arrays
    prototypes: Prototypes = field(default_factory=lambda: Prototypes({}, {}))

    def to_arrays(self) -> Arrays:
        """All arrays under their wire names."""
        return flatten(self.student, self.teacher, self.prototypes)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "GlobalState":
        """The inverse of `to_arrays`; names outside the list are left to admission to refuse."""
        return cls(
            student=take(arrays, STUDENT),
            teacher=take(arrays, TEACHER),
            prototypes=Prototypes(take(arrays, PROTOTYPES), take(arrays, COUNTS)),
        )


@dataclass(frozen=True, kw_only=True)
class SiteUpdate:
    """What a site sends back after a round; `teacher` is empty when the server rebuilds it."""

    round_number: int
    """The round it answers."""
    student: Mapping[str, NDArray[Any]]
    teacher: Mapping[str, NDArray[Any]]
    prototypes: Prototypes
    num_examples: dict[str, int]
    """modality -> training images"""
    metrics: dict[str, float]

    def to_arrays(self) -> Arrays:
        """All arrays under their wire names."""
        return flatten(self.student, self.teacher, self.prototypes)

    def to_metrics(self) -> dict[str, int | float]:
        """Round, counts and metrics under their wire names."""
        counts = {f"{NUM_EXAMPLES}{m}": n for m, n in self.num_examples.items()}
        return {ROUND: self.round_number, **counts, **self.metrics}


def flatten(
    student: Mapping[str, NDArray[Any]],
    teacher: Mapping[str, NDArray[Any]],
    prototypes: Prototypes,
) -> Arrays:
    """Prefix each group of arrays with its wire name."""
    groups = {
        STUDENT: student,
        TEACHER: teacher,
        PROTOTYPES: prototypes.centroids,
        COUNTS: prototypes.counts,
    }
    return {prefix + name: a for prefix, group in groups.items() for name, a in group.items()}


def take(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays under a prefix, without it."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def sends_prototypes(recipe: Recipe) -> bool:
    """Whether sites are sent the merged prototypes: with record privacy alone is there a use."""
    return recipe.privacy.mode == "record"


def metric_is_declared(name: str) -> bool:
    """Whether a scalar's name is on the closed list."""
    metric, slash, modality = name.partition("/")
    if name == ROUND:
        return True
    if metric == NUM_EXAMPLES.rstrip("/"):
        return modality in MODALITIES
    return metric in METRICS and (not slash or modality in MODALITIES)


class EvaluationRequest(Strict):
    """What an evaluator asks of a site, beside the arrays."""

    study: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    """An id for the audit files."""
    model: ModelConfig
    px: Annotated[int, Field(ge=8)]
    """Side of the images that the backbone takes."""
    last_blocks: Count
    """Blocks whose tokens the probes see."""
    neighbours: Count
    probe_classes: dict[str, tuple[str, ...]]
    """modality -> class names of the evaluator's probe, in the order of its outputs"""


@dataclass(frozen=True)
class EvaluationReply:
    """All that leaves a site in an evaluation."""

    metrics: dict[str, int | float]
    histograms: Arrays
    notes: dict[str, str]


def evaluation_metric_is_declared(name: str) -> bool:
    """Whether the name of an evaluation's figure is on the closed list."""
    metric, _, modality = name.partition("/")
    declared = {f"{method}_{measure}" for method in METHODS for measure in MEASURES}
    return metric in declared.union(EVALUATION_COUNTS) and modality in MODALITIES


def note_is_declared(name: str) -> bool:
    """Whether the name of a note is on the closed list."""
    kind, _, modality = name.partition("/")
    return kind in NOTES and modality in MODALITIES
