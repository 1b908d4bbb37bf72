"""The last gate of a site: what a reply may hold, by the closed list and the policy of now.

`cut` takes out of an update what the policy does not send. `hold` looks at a whole reply once more,
just before it leaves, and knows nothing of how it was made.

**Guarantees**, for every reply that passes `hold`:
    - It holds the records of its kind of message and no other.
    - A training reply's arrays are named and shaped like arrays that were sent down, in single or
      half precision, or in eight bits where the recipe's transport is delta8, or are prototypes
      with their counts; the teacher only if the recipe averages teachers.
    - Prototypes are there only if the policy sends them, of allowed modalities, at most as many and
      as long as the recipe says, and each of at least the stricter minimum of patients.
    - Metrics are numbers whose names are on the closed list; if the policy sends none, round and
      numbers of images alone. Numbers of images are of allowed modalities.
    - With record privacy metrics are exactly the round, the numbers of images that the policy
      declares in public, and epsilon; prototypes are there only in the rounds that release them.
    - An evaluation's figures are there only if the policy sends metrics, of allowed modalities;
      score histograms only if it sends those, with no count below the patients it asks for but
      0. Notes are short lines of printable text.
    - An answer to a query holds this site's name and version alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.policy import Policy, PolicyRefusal
from core.checkpoint import Arrays
from core.config import Recipe
from core.evaluation.pooled import Bins, Counts
from core.privacy.accounting import releases_prototypes
from core.wire import (
    COUNTS,
    EPSILON,
    HISTOGRAM,
    NUM_EXAMPLES,
    PROTOTYPES,
    ROUND,
    SIDES,
    STUDENT,
    TEACHER,
    Prototypes,
    SiteUpdate,
    evaluation_metric_is_declared,
    metric_is_declared,
    note_is_declared,
)

FLOATS: Final = ("float32", "float16")
NOTE: Final = re.compile(r"[ -~]{0,300}")
HISTOGRAM_NAME: Final = re.compile(rf"{HISTOGRAM}([a-z]+)/\d+/({'|'.join(SIDES)})")


def cut(policy: Policy, recipe: Recipe, update: SiteUpdate) -> SiteUpdate:
    """What of an update may leave; `recipe` is the one that `approve` returned."""
    prototypes = Prototypes({}, {})
    for modality, counts in update.prototypes.counts.items() if policy.send_prototypes else ():
        enough = counts >= recipe.federation.prototype_min_patients
        if enough.any():
            prototypes.centroids[modality] = update.prototypes.centroids[modality][enough]
            prototypes.counts[modality] = counts[enough]
    private = recipe.privacy.mode == "record"
    metrics = {n: v for n, v in update.metrics.items() if metric_is_declared(n)}
    if private or not policy.send_metrics:  # epsilon is a fact about the recipe, not about images
        metrics = {n: v for n, v in metrics.items() if private and n == EPSILON}
    return replace(
        update,
        teacher=update.teacher if recipe.federation.teacher == "average" else {},
        prototypes=prototypes,
        num_examples=_declared(policy, update.num_examples) if private else update.num_examples,
        metrics=metrics,
    )


def _declared(policy: Policy, modalities: Iterable[str]) -> dict[str, int]:
    return {m: policy.declared_images[m] for m in modalities}


def hold_training(policy: Policy, recipe: Recipe, sent: Arrays, content: RecordDict) -> RecordDict:
    """Let a training reply pass.

    Args:
        policy: The site's.
        recipe: The study as the coordinator asks for it.
        sent: What was sent down, under wire names.
        content: The reply.

    Raises:
        PolicyRefusal: the reply does not keep to the guarantees; the text says which part.
    """
    _check_records(content, {"arrays": ArrayRecord, "metrics": MetricRecord})
    arrays, metrics = content.array_records["arrays"], content.metric_records["metrics"]
    for name, array in arrays.items():
        eight = recipe.federation.transport == "delta8" and name.startswith((STUDENT, TEACHER))
        _check(array.dtype in (("int8",) if eight else FLOATS), "an array's type")
        if name.startswith((PROTOTYPES, COUNTS)):
            continue
        teacher = name.startswith(TEACHER) and recipe.federation.teacher != "average"
        _check(name in sent and not teacher, "an array's name")
        _check(tuple(array.shape) == sent[name].shape, "an array's shape")
    _check_prototypes(policy, recipe, arrays)
    private = recipe.privacy.mode == "record"
    if private:
        _check_private(policy, recipe, content)
    for name, value in metrics.items():
        _check(metric_is_declared(name) and _is_number(value), "a metric's name or type")
        modality = name.partition("/")[2]
        needed = name == ROUND or name.startswith(NUM_EXAMPLES) or private
        _check(needed or policy.send_metrics, "a metric, as the policy sends none")
        _check(not modality or modality in policy.allowed_modalities, "a metric's modality")
    return content


def _check_private(policy: Policy, recipe: Recipe, content: RecordDict) -> None:
    """Nothing computed from data but what was noised."""
    metrics = dict(content.metric_records["metrics"])
    number, epsilon = metrics.pop(ROUND, None), metrics.pop(EPSILON, None)
    _check(type(number) is int and type(epsilon) is float, "the round or epsilon")
    named = {name.removeprefix(NUM_EXAMPLES): value for name, value in metrics.items()}
    _check(all(policy.declared_images.get(m) == n for m, n in named.items()), "a private metric")
    assert isinstance(number, int)
    arrays = content.array_records["arrays"]
    prototypes = any(name.startswith((PROTOTYPES, COUNTS)) for name in arrays)
    _check(not prototypes or releases_prototypes(recipe, number), "prototypes in this round")


def _check_prototypes(policy: Policy, recipe: Recipe, arrays: ArrayRecord) -> None:
    modalities = {n.removeprefix(PROTOTYPES) for n in arrays if n.startswith(PROTOTYPES)}
    counted = {n.removeprefix(COUNTS) for n in arrays if n.startswith(COUNTS)}
    _check(modalities == counted, "prototypes without their counts")
    _check(policy.send_prototypes or not modalities, "prototypes, as the policy sends none")
    _check(modalities <= set(policy.allowed_modalities), "a prototype's modality")
    most = recipe.federation.prototypes_per_modality
    minimum = max(recipe.federation.prototype_min_patients, policy.min_patients_per_prototype)
    for modality in modalities:
        counts = arrays[COUNTS + modality].numpy()
        length = recipe.model.embedding_dim
        shaped = tuple(arrays[PROTOTYPES + modality].shape) == (len(counts), length)
        _check(counts.ndim == 1 and len(counts) <= most and shaped, "the prototypes' shape")
        _check(bool((counts >= minimum).all()), "a prototype of too few patients")


def hold_evaluation(policy: Policy, content: RecordDict) -> RecordDict:
    """Let the reply to an evaluation pass.

    Raises:
        PolicyRefusal: as `hold_training`.
    """
    kinds = {"metrics": MetricRecord, "histograms": ArrayRecord, "notes": ConfigRecord}
    _check_records(content, kinds)
    _check(policy.send_metrics, "figures, as the policy sends none")
    for name, value in content.metric_records["metrics"].items():
        declared = evaluation_metric_is_declared(name) and _is_number(value)
        _check(declared, "a figure's name or type")
        _check(name.partition("/")[2] in policy.allowed_modalities, "a figure's modality")
    for name, array in content.array_records["histograms"].items():
        found = HISTOGRAM_NAME.fullmatch(name)
        _check(found is not None and policy.send_score_histograms, "a histogram")
        assert found is not None
        _check(found[1] in policy.allowed_modalities, "a histogram's modality")
        _check(_is_histogram(array.numpy(), policy.min_patients_per_cell), "a histogram's counts")
    for name, note in content.config_records["notes"].items():
        plain = isinstance(note, str) and NOTE.fullmatch(note)
        _check(bool(note_is_declared(name) and plain), "a note")
    return content


def hold_query(name: str, content: RecordDict) -> RecordDict:
    """Let the answer to a query pass.

    Raises:
        PolicyRefusal: as `hold_training`.
    """
    _check_records(content, {"info": ConfigRecord})
    info = content.config_records["info"]
    _check(set(info) == {"site", "version"} and info["site"] == name, "what a query asks for")
    return content


def _check_records(content: RecordDict, kinds: Mapping[str, type]) -> None:
    found = {name: type(record) for name, record in content.items()}
    _check(found == dict(kinds), "its records")


def _is_histogram(rows: Counts, minimum: int) -> bool:
    """Whether these are bins, none of which but empty ones is of fewer images than patients."""
    try:
        counts = Bins.from_array(rows).counts
    except ValueError:
        return False
    return bool(((counts == 0) | (counts >= minimum)).all())


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _check(held: bool, part: str) -> None:
    if not held:
        raise PolicyRefusal(f"this site held its reply back at its last gate: {part}")
