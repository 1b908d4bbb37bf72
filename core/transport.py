"""How student and teacher travel: as they are, or rounded.

float32   Weights down, weights up, bit for bit.
delta16   Down the weights, up the difference from what was received, both in HALF (core/rounding.py
          has form and error), with the scales scales/student and scales/teacher [T], tensors in
          name order. The server keeps its float32 weights and adds the differences to them: what
          rounding took from the weights on their way down comes back with no site's answer, and is
          never lost from the server's own. Every site starts from the same rounded weights.
delta8    Down the student in HALF, and in EIGHT what the teacher differs from that rounded student.
          Up the differences in EIGHT. What rounding took from a difference stays at the site and is
          added to that of the next round (`carry`). The student does not go down in eight bits:
          that would err by three times what a round changes (benchmarks/README.md).

Error for each element x of a tensor: in HALF at most |x| * 2^-11, or max|tensor| * 2^-39 where that
is more; in EIGHT at most max|tensor| / 253, or 2^-127 where that is more. The tensor is, down, the
weights or the teacher's distance from the student; up, the site's change with what it still owed.
Zero stays zero and nothing up to 2^127 overflows.

**Guarantees** of delta8, for a site's rounds from its first on, whichever it takes part in:
    - The sum of all that it sent is the sum of all that it changed, less what it still owes, which
      is no more than the error above of its last round. That holds up to the rounding of float32,
      2^-23 of a weight for each round, which training has too.
    - A tensor that is not finite is sent as not finite, and nothing of it is owed: one bad round
      does not spoil the next.
Not covered: what the server does not use. A change that it rejects, cuts, or does not wait for is
lost as in any transport; only what rounding took from it comes later.

Prototypes are small, must stay unit rows, and always travel as float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.rounding import EIGHT, HALF, Rounding, decode
from core.wire import SCALES, STUDENT, TEACHER

Transport = Literal["float32", "delta16", "delta8"]
Roundings = Mapping[str, Rounding]
"""Group of tensors -> how they are written."""
Named = tuple[str, NDArray[Any]]
DOWN: Final[Mapping[str, Roundings]] = {
    "delta16": {STUDENT: HALF, TEACHER: HALF},
    "delta8": {STUDENT: HALF, TEACHER: EIGHT},
}
UP: Final[Mapping[str, Roundings]] = {
    "delta16": {STUDENT: HALF, TEACHER: HALF},
    "delta8": {STUDENT: EIGHT, TEACHER: EIGHT},
}


class TransportError(Exception):
    """Arrays that are not in the recipe's transport; the text says which and why."""


def pack_state(arrays: Arrays, transport: Transport) -> Arrays:
    """The global state, under its wire names, as it goes to the sites."""
    if transport == "float32":
        return arrays
    roundings = DOWN[transport]
    student = _packed(((n, arrays[n]) for n in _weights(arrays, STUDENT)), roundings)
    scales = _scales(student, roundings, transport)

    def teachers() -> Iterator[Named]:  # one by one: memory holds no second float32 form of them
        for name in _weights(arrays, TEACHER):
            if transport == "delta8":
                twin = _twin(name)
                rounded = _decoded(twin, student[twin], scales[twin], roundings, transport)
                yield name, np.asarray(arrays[name] - rounded)
            else:
                yield name, arrays[name]

    return _rest(arrays) | student | _packed(teachers(), roundings)


def unpack_state(arrays: Arrays, transport: Transport) -> Arrays:
    """What a site starts from: the inverse of `pack_state` up to the stated error.

    Raises:
        TransportError: arrays came in another form.
    """
    if transport == "float32":
        return arrays
    weights = _decoded_all(arrays, DOWN[transport], transport)
    if transport == "delta8":
        for name in _weights(weights, TEACHER):
            student = weights.get(_twin(name))
            if student is None or student.shape != weights[name].shape:
                raise TransportError(f"array '{name}' has no student's of its name and shape")
            with np.errstate(invalid="ignore", over="ignore"):
                weights[name] += student
    return _rest(arrays) | weights


def pack_update(update: Arrays, started_from: Arrays, transport: Transport) -> Arrays:
    """A site's arrays as they leave it.

    Args:
        update: Under their wire names; in delta8 as `carry` returned them.
        started_from: What `unpack_state` gave for the round.
        transport: The recipe's.
    """
    if transport == "float32":
        return update
    return _rest(update) | _packed(_changes(update, started_from), UP[transport])


def carry(
    update: Arrays, started_from: Arrays, owed: Arrays, transport: Transport
) -> tuple[Arrays, Arrays]:
    """Add to an update what rounding took from the earlier ones.

    What is owed goes into the weights, not into what is sent: the update, once stored, gives the
    same bytes whenever it is sent.

    Args:
        update: Under their wire names.
        started_from: What `unpack_state` gave for the round.
        owed: What this function returned as second value last time; empty at first. Tensors of a
            name that is not in the update are dropped.
        transport: The recipe's; nothing is owed but in delta8.

    Returns:
        The update to store and to give to `pack_update`, and what is owed after it was sent.
    """
    if transport != "delta8":
        return update, {}
    whole, left = dict(update), {}
    for name in _weights(update):
        if name in owed:
            whole[name] = np.asarray(update[name] + owed[name])
    for name, change in _changes(whole, started_from):
        with np.errstate(invalid="ignore", over="ignore"):
            codes, scale = EIGHT.encode(change)
            lost = np.asarray(change - decode(codes, np.float32(scale)))
        if np.isfinite(lost).all():
            left[name] = lost
    return whole, left


def unpack_update(arrays: Arrays, state: Arrays, transport: Transport) -> Arrays:
    """A site's weights as the server would have had them in float32: its own plus the difference.

    The weighted mean of these, with weights that sum to 1, is the server's own plus the weighted
    mean of the differences. A number that is not finite stays so, for admission to name.

    Args:
        arrays: As they came; weights are taken out one by one, so that memory does not hold both
            forms of a reply.
        state: The server's float32 state, under its wire names.
        transport: The recipe's.

    Raises:
        TransportError: arrays came in another form; nothing was decoded for one that is unknown or
            of another shape than the state's.
    """
    if transport == "float32":
        return arrays
    roundings = UP[transport]
    scales = _scales(arrays, roundings, transport)
    result = _rest(arrays)
    for name in _weights(arrays):
        if name not in state:
            raise TransportError(f"array '{name}' was not asked for")
        array, known = arrays.pop(name), state[name]
        if array.shape != known.shape:
            raise TransportError(f"array '{name}' has shape {array.shape}, expected {known.shape}")
        difference = _decoded(name, array, scales[name], roundings, transport)
        with np.errstate(invalid="ignore", over="ignore"):
            result[name] = np.add(known, difference, out=difference)
    return result


def _changes(update: Arrays, started_from: Arrays) -> Iterator[Named]:
    for name in _weights(update):
        with np.errstate(invalid="ignore", over="ignore"):  # the server's to name
            change = np.asarray(update[name] - started_from[name])
        yield name, change


def _weights(arrays: Arrays, groups: str | tuple[str, ...] = (STUDENT, TEACHER)) -> list[str]:
    return sorted(name for name in arrays if name.startswith(groups))


def _group(name: str) -> str:
    return STUDENT if name.startswith(STUDENT) else TEACHER


def _twin(name: str) -> str:
    """The student's tensor of a teacher's."""
    return STUDENT + name.removeprefix(TEACHER)


def _rest(arrays: Arrays) -> Arrays:
    """All that travels as it is; scales belong to the weights."""
    skipped = (STUDENT, TEACHER, SCALES)
    return {name: a for name, a in arrays.items() if not name.startswith(skipped)}


def _packed(tensors: Iterable[Named], roundings: Roundings) -> Arrays:
    """Rounded tensors, which come in name order, and the scales of each group."""
    result: Arrays = {}
    scales: dict[str, list[float]] = {}
    for name, tensor in tensors:
        group = _group(name)
        with np.errstate(invalid="ignore", over="ignore"):
            result[name], scale = roundings[group].encode(tensor)
        scales.setdefault(group, []).append(scale)
    named = {SCALES + group.rstrip("/"): np.array(of, np.float32) for group, of in scales.items()}
    return result | named


def _scales(arrays: Arrays, roundings: Roundings, transport: Transport) -> dict[str, np.float32]:
    """The scale of each tensor; every group of tensors has its scales, and no other has."""
    result: dict[str, np.float32] = {}
    used = set()
    for group in (STUDENT, TEACHER):
        names = _weights(arrays, group)
        key = SCALES + group.rstrip("/")
        if not names:
            continue
        if (scales := arrays.get(key)) is None:
            raise TransportError(f"array '{key}' is missing (transport {transport})")
        if scales.dtype != np.float32 or scales.shape != (len(names),):
            raise TransportError(
                f"array '{key}' is {scales.dtype} of shape {scales.shape}, expected float32 of "
                f"shape ({len(names)},)"
            )
        # A scale that is nan says, where the numbers cannot, that its tensor is not finite.
        told = np.isnan(scales) & (not roundings[group].carries_nan)
        if not (told | (np.isfinite(scales) & (scales > 0))).all():
            raise TransportError(f"array '{key}' holds a scale that is not finite and positive")
        result |= dict(zip(names, scales, strict=True))
        used.add(key)
    if extra := sorted(name for name in arrays if name.startswith(SCALES) and name not in used):
        raise TransportError(f"array '{extra[0]}' was not asked for")
    return result


def _decoded_all(arrays: Arrays, roundings: Roundings, transport: Transport) -> Arrays:
    scales = _scales(arrays, roundings, transport)
    return {n: _decoded(n, arrays[n], scales[n], roundings, transport) for n in _weights(arrays)}


def _decoded(
    name: str, array: NDArray[Any], scale: np.float32, roundings: Roundings, transport: Transport
) -> NDArray[np.float32]:
    expected = roundings[_group(name)].dtype
    if array.dtype != expected:
        raise TransportError(
            f"array '{name}' has dtype {array.dtype}, expected {expected} (transport {transport})"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        return decode(array, scale)
