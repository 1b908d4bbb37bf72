"""Admission: what an update must be before the server lets it touch the global state."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.config import Recipe
from core.modalities import MODALITIES
from core.privacy.accounting import releases_prototypes
from core.wire import (
    COUNTS,
    EPSILON,
    METRICS,
    NUM_EXAMPLES,
    PROTOTYPES,
    ROUND,
    STUDENT,
    TEACHER,
    GlobalState,
    Prototypes,
    SiteUpdate,
    metric_is_declared,
    take,
)

UNIT_TOLERANCE = 1e-3
"""Allowed distance of a prototype's norm from 1."""
HEADER_BYTES = 512
"""Allowed of an array beside its numbers, its name included."""
MOST_METRICS = (len(METRICS) + 1) * (len(MODALITIES) + 1) + 1


class Rejected(Exception):
    """An update that must not be used; its text names site, round, what was wrong."""


def admit(
    arrays: Arrays,
    metrics: Mapping[str, Any],
    *,
    site: str,
    round_number: int,
    reference: GlobalState,
    recipe: Recipe,
) -> SiteUpdate:
    """Check an update against the state that the site was sent.

    Args:
        arrays: Under their wire names; all must be float32.
        metrics: Counts and scalars under their wire names.
        site: Name of the sender.
        round_number: The round it answers.
        reference: The global state at the start of the round.
        recipe: The study.

    Returns:
        The update, fit to be aggregated.

    Raises:
        Rejected: the first of the guarantees below that does not hold.

    **Guarantees** for an admitted update:
        - It says that it answers this round.
        - Arrays are exactly the global student's (and the teacher's, when the recipe averages
          teachers), with their shapes, float32 and finite, plus prototypes; nothing else.
        - Student and teacher each lie within `max_update_norm` times the norm of what was sent.
        - Prototypes are unit rows of the recipe's dimension, at most its number, each of at least
          its minimum of patients and no more patients than images, for modalities the site holds;
          a modality's counts sum to no more than the entries of the memory they are made of.
        - Numbers of examples are whole, between 1 and `max_examples`, one modality at the least.
        - Metrics are on the closed list, finite, and within the range of each.
        - With record privacy (core/privacy) it holds nothing else than round, numbers of examples,
          epsilon, weights, and prototypes in the rounds that release them; their noised counts may
          be larger than the true ones, up to `max_examples`.
    """
    try:
        _check_round(metrics, round_number)
        expected = expected_arrays(reference, recipe)
        weights = {n: a for n, a in arrays.items() if not n.startswith((PROTOTYPES, COUNTS))}
        _check_names(weights, expected)
        for name, array in arrays.items():
            _check_array(name, array, expected.get(name))
        examples = _check_metrics(metrics, recipe.federation.max_examples)
        update = SiteUpdate(
            round_number=round_number,
            student=take(arrays, STUDENT),
            teacher=take(arrays, TEACHER),
            prototypes=Prototypes(take(arrays, PROTOTYPES), take(arrays, COUNTS)),
            num_examples=examples,
            metrics={
                n: float(v)
                for n, v in metrics.items()
                if n != ROUND and not n.startswith(NUM_EXAMPLES)
            },
        )
        limit = recipe.federation.max_update_norm
        _check_distance("student", update.student, reference.student, limit)
        if update.teacher:
            _check_distance("teacher", update.teacher, reference.teacher, limit)
        if recipe.privacy.mode == "record":
            _check_private(update, recipe)
        _check_prototypes(update, recipe)
    except _Bad as bad:
        reason = f"site '{site}', round {round_number}: {printable(str(bad))}; update rejected"
        raise Rejected(reason) from None
    return update


def expected_arrays(reference: GlobalState, recipe: Recipe) -> Arrays:
    """The weights that are asked for, under their wire names, as they were sent."""
    expected = {STUDENT + name: a for name, a in reference.student.items()}
    if recipe.federation.teacher == "average":
        expected |= {TEACHER + name: a for name, a in reference.teacher.items()}
    return expected


def most_bytes(reference: GlobalState, recipe: Recipe) -> tuple[int, int]:
    """The most arrays and bytes that a reply can have which may be admitted.

    Prototypes of all modalities are counted in, whichever a site holds.
    """
    expected = expected_arrays(reference, recipe)
    federation, dim = recipe.federation, recipe.model.embedding_dim
    rows = len(MODALITIES) * federation.prototypes_per_modality
    arrays = len(expected) + 2 * len(MODALITIES) + 2
    numbers = sum(a.nbytes for a in expected.values()) + 4 * rows * (dim + 1)
    return arrays, numbers + HEADER_BYTES * arrays + sum(len(name.encode()) for name in expected)


def update_norm(sent: Mapping[str, NDArray[Any]], reference: Arrays) -> float:
    """Euclidean length of what a site changed, summed in float64 in name order."""
    return float(
        np.sqrt(sum(_squares(sent[n].astype(np.float64) - reference[n]) for n in sorted(sent)))
    )


def printable(text: str, limit: int = 300) -> str:
    """Text from outside, cut and stripped of control characters, so that it may be shown."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


class _Bad(Exception):
    """One failed check; `admit` adds who and when."""


def _check_round(metrics: Mapping[str, Any], round_number: int) -> None:
    if ROUND not in metrics:
        raise _Bad(f"'{ROUND}' is missing: the site's software is older than this server's")
    found = metrics[ROUND]
    if type(found) is not int or found != round_number:
        raise _Bad(f"it answers round {_shown(found)}, not this one")


def _shown(value: Any) -> str:
    """A value from outside, short; a long list or a number of a million digits is not spelt out."""
    if type(value) is float or (type(value) is int and abs(value) < 10**18):
        return repr(value)
    return f"of type {type(value).__name__}" if type(value) is not bool else repr(value)


def _check_names(weights: Arrays, expected: Arrays) -> None:
    if missing := sorted(set(expected) - set(weights)):
        raise _Bad(f"array '{missing[0]}' is missing ({len(missing)} missing in all)")
    if extra := sorted(set(weights) - set(expected)):
        raise _Bad(f"array '{printable(extra[0], 80)}' was not asked for ({len(extra)} in all)")


def _check_array(name: str, array: Any, expected: Any) -> None:
    name = printable(name, 80)
    if array.dtype != np.float32:
        raise _Bad(f"array '{name}' has dtype {array.dtype}, expected float32")
    if expected is not None and array.shape != expected.shape:
        raise _Bad(f"array '{name}' has shape {array.shape}, expected {expected.shape}")
    if not np.isfinite(array).all():
        raise _Bad(f"array '{name}' is not finite")


def _check_metrics(metrics: Mapping[str, Any], max_examples: int) -> dict[str, int]:
    if len(metrics) > MOST_METRICS:
        raise _Bad(f"{len(metrics)} metrics were sent, at most {MOST_METRICS} are on the list")
    examples: dict[str, int] = {}
    for name, value in metrics.items():
        shown = printable(name, 80)
        if not metric_is_declared(name):
            raise _Bad(f"metric '{shown}' is not on the list of what may be sent")
        if name == ROUND:
            continue
        if name.startswith(NUM_EXAMPLES):
            if type(value) is not int or not 1 <= value <= max_examples:
                raise _Bad(
                    f"'{shown}' is {_shown(value)}, expected a whole number from 1 to "
                    f"{max_examples}"
                )
            examples[name.removeprefix(NUM_EXAMPLES)] = value
            continue
        low, high = METRICS[name.partition("/")[0]]
        if type(value) not in (int, float) or not low <= value <= high:
            raise _Bad(f"metric '{shown}' is {_shown(value)}, expected from {low:g} to {high:g}")
    if not examples:
        raise _Bad(f"no '{NUM_EXAMPLES}<modality>' was sent, expected one at the least")
    return examples


def _check_distance(
    what: str, sent: Mapping[str, NDArray[Any]], reference: Arrays, limit: float
) -> None:
    moved = update_norm(sent, reference)
    size = np.sqrt(sum(_squares(reference[n].astype(np.float64)) for n in sorted(sent)))
    if not moved <= limit * size:
        raise _Bad(
            f"{what} moved by {moved:.3g}, more than {limit:g} times the norm {size:.3g} of "
            "what was sent (federation.max_update_norm)"
        )


def _squares(array: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.square(array).sum())


def _check_private(update: SiteUpdate, recipe: Recipe) -> None:
    """A site that sends more than was noised is told so, and what it sent is not used."""
    if other := sorted(set(update.metrics) ^ {EPSILON}):
        wrong = "too much" if other[0] in update.metrics else "missing"
        raise _Bad(f"record privacy lets metric '{EPSILON}' leave alone; '{other[0]}' is {wrong}")
    if update.prototypes.counts and not releases_prototypes(recipe, update.round_number):
        raise _Bad("with record privacy this round releases no prototypes, and some were sent")


def _check_prototypes(update: SiteUpdate, recipe: Recipe) -> None:
    centroids, counts = update.prototypes.centroids, update.prototypes.counts
    if odd := sorted(set(centroids) ^ set(counts)):
        raise _Bad(f"prototypes of '{printable(odd[0], 40)}' lack their counts or centroids")
    federation, dim = recipe.federation, recipe.model.embedding_dim
    most, fewest = federation.prototypes_per_modality, federation.prototype_min_patients
    for modality in sorted(centroids):
        shown = f"'{PROTOTYPES}{printable(modality, 40)}'"
        rows, patients = centroids[modality], counts[modality]
        if modality not in MODALITIES or modality not in update.num_examples:
            raise _Bad(f"{shown}: the site reports no images of this modality")
        if rows.ndim != 2 or not 1 <= len(rows) <= most or rows.shape[1] != dim:
            raise _Bad(f"{shown} has shape {rows.shape}, expected (1 to {most}, {dim})")
        if patients.shape != (len(rows),):
            raise _Bad(f"counts of {shown} have shape {patients.shape}, expected ({len(rows)},)")
        if np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1).max() > UNIT_TOLERANCE:
            raise _Bad(f"{shown}: rows are not of unit length")
        images, slots = update.num_examples[modality], recipe.memory.entries_per_modality
        if recipe.privacy.mode == "record":  # of all patients, and noised
            images = slots = federation.max_examples
        if patients.min() < fewest or patients.max() > images:
            raise _Bad(
                f"counts of {shown} range from {patients.min():g} to {patients.max():g}, expected "
                f"{fewest} patients at the least and no more than the {images} images"
            )
        if (total := float(patients.sum(dtype=np.float64))) > slots:
            raise _Bad(
                f"counts of {shown} sum to {total:g}, more than the memory's {slots} entries"
            )
