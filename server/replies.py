"""Replies of sites: from Flower's records to admitted updates or outcomes with a reason."""

import logging
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import SType

from core.admission import MOST_METRICS, Rejected, admit, most_bytes, printable, update_norm
from core.checkpoint import Arrays, sha256_arrays
from core.collapse import alarm
from core.config import Recipe
from core.npy import NotAnArray, read_npy
from core.transport import TransportError, unpack_update
from core.wire import STUDENT, GlobalState, SiteUpdate
from server.history import Line

LOG = logging.getLogger("fedmermed.server")


def judge(
    reply: Message, *, site: str, round_number: int, reference: GlobalState, recipe: Recipe
) -> tuple[SiteUpdate | None, Line]:
    """Admit a reply, or say why not; arrays are taken out of it.

    Args:
        reply: What came back for this site.
        site: Name of the site that was asked.
        round_number: The round.
        reference: The global state that the site was sent.
        recipe: The study.

    Returns:
        The update if it is admitted, and the outcome for the history.
    """
    if reply.has_error():
        reason = printable(reply.error.reason or "no reason given")
        LOG.warning("site '%s', round %d: error: %s", site, round_number, reason)
        return None, {"outcome": "error", "reason": reason}
    try:
        where = f"site '{site}', round {round_number}"
        _check_size(where, reply.content, most_bytes(reference, recipe))
        arrays, metrics = _read(where, reply.content)
        # As they came: the same differences about another state would be another student.
        digest = sha256_arrays({n: a for n, a in arrays.items() if n.startswith(STUDENT)})
        arrays = _unpacked(where, arrays, reference, recipe)
        update = admit(
            arrays, metrics, site=site, round_number=round_number, reference=reference,
            recipe=recipe,
        )  # fmt: skip
    except Rejected as rejected:
        LOG.warning("%s", rejected)
        return None, {"outcome": "rejected", "reason": str(rejected)}
    outcome: Line = {
        "outcome": "admitted",
        "num_examples": update.num_examples,
        "metrics": update.metrics,
        "digest": digest,
        "update_norm": update_norm(update.student, reference.student),
    }
    if update.teacher:
        outcome["teacher_norm"] = update_norm(update.teacher, reference.teacher)
    return update, outcome


def mean_metrics(updates: dict[str, SiteUpdate]) -> dict[str, float]:
    """Metrics named <metric>/<modality>, averaged over sites by their images of the modality."""
    sums: dict[str, float] = {}
    images: dict[str, int] = {}
    for site in sorted(updates):
        for name, value in updates[site].metrics.items():
            count = updates[site].num_examples.get(name.partition("/")[2], 0)
            if count:
                sums[name] = sums.get(name, 0.0) + count * value
                images[name] = images.get(name, 0) + count
    return {name: sums[name] / images[name] for name in sorted(sums)}


def collapse_alarms(updates: dict[str, SiteUpdate]) -> list[str]:
    """What the figures of sites say of a collapse, in site order."""
    return [
        f"site '{site}': {words}"
        for site in sorted(updates)
        for modality in updates[site].num_examples
        if (words := alarm(updates[site].metrics, modality))
    ]


def to_record(arrays: Arrays) -> ArrayRecord:
    """Arrays as Flower carries them."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def count_bytes(content: RecordDict) -> int:
    """Bytes of all records of a message."""
    return sum(record.count_bytes() for record in content.values())


def _check_size(where: str, content: RecordDict, most: tuple[int, int]) -> None:
    """Refuse a reply that is larger than any that could be admitted, before it is decoded."""
    arrays = sum(len(record) for record in content.array_records.values())
    numbers = sum(record.count_bytes() for record in content.array_records.values())
    metrics = content.metric_records.values()
    values = sum(len(v) if isinstance(v, list) else 1 for m in metrics for v in m.values())
    for what, found, limit in (
        ("arrays", arrays, most[0]), ("bytes of arrays", numbers, most[1]),
        ("metrics", values, MOST_METRICS),
    ):  # fmt: skip
        if found > limit:
            raise Rejected(
                f"{where}: the reply has {found} {what}, no update of "
                f"this study has more than {limit}; update rejected"
            )


def _unpacked(where: str, arrays: Arrays, reference: GlobalState, recipe: Recipe) -> Arrays:
    """Arrays in float32, as admission judges them; they are taken out of `arrays`.

    Raises:
        Rejected: they did not come in the recipe's transport.
    """
    try:
        return unpack_update(arrays, reference.to_arrays(), recipe.federation.transport)
    except TransportError as error:
        raise Rejected(f"{where}: {printable(str(error))}; update rejected") from None


def _read(where: str, content: RecordDict) -> tuple[Arrays, dict[str, Any]]:
    """Take a reply apart, and its arrays out of it.

    Raises:
        Rejected: it is not one record of arrays and one of numbers, or an array cannot be decoded.
    """
    names = [*content.array_records, *content.metric_records, *content.config_records]
    if names != ["arrays", "metrics"] or not content.array_records or not content.metric_records:
        raise Rejected(
            f"{where}: the reply is not one 'arrays' and one 'metrics' record; update rejected"
        )
    arrays: Arrays = {}
    record = content.array_records["arrays"]
    for name in list(record):
        try:
            array = record.pop(name)  # what is not an array in numpy's format goes with its bytes
            if array.stype != SType.NUMPY:
                raise NotAnArray("not in numpy's format")
            arrays[name] = read_npy(array.data)
        except NotAnArray as error:
            raise Rejected(
                f"{where}: array '{printable(name, 80)}' cannot be decoded ({error}); update "
                "rejected"
            ) from None
    return arrays, dict(content.metric_records["metrics"])
