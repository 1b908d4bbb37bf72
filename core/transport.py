"""How student and teacher travel: as they are, or in half precision.

float32   Weights down, weights up, bit for bit.
delta16   Down the weights, up the difference from what was received, each as float16 with one
          float32 scale a tensor, a power of two: scales/student and scales/teacher [T], tensors
          in name order. The server keeps its float32 weights and adds the differences to them:
          what rounding took from the weights on their way down comes back with no site's answer,
          and is never lost from the server's own. Every site starts from the same rounded weights.

Error of delta16, for each element x of a tensor: at most |x| * 2^-11, or max|tensor| * 2^-39
where that is more. With x a weight on its way down, with x the site's change on its way up. Zero
stays zero, nothing up to 2^127 overflows, and no tensor vanishes, however small it is.

Prototypes are small, must stay unit rows, and always travel as float32.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Arrays
from core.wire import SCALES, STUDENT, TEACHER

Transport = Literal["float32", "delta16"]
Group = Mapping[str, NDArray[Any]]

RELATIVE_ERROR: Final = 2.0**-11
FLOOR: Final = 2.0**-39
"""Largest error of one element, in units of its own size and of its tensor's largest."""
TOP_EXPONENT = 15
"""Scaled tensors lie within 2^15: rounding up cannot reach float16's end at 65,504."""
SMALLEST_EXPONENT = -126
"""Of a normal float32; with it even the smallest subnormal is a float16."""


class TransportError(Exception):
    """Arrays that are not in the recipe's transport; the text says which and why."""


def pack_state(arrays: Arrays, transport: Transport) -> Arrays:
    """The global state, under its wire names, as it goes to the sites."""
    if transport == "float32":
        return arrays
    return _rest(arrays) | _packed({n: arrays[n] for n in _weights(arrays)})


def unpack_state(arrays: Arrays, transport: Transport) -> Arrays:
    """What a site starts from: the inverse of `pack_state` up to the stated error.

    Raises:
        TransportError: arrays came in another form.
    """
    if transport == "float32":
        return arrays
    scales = _scales(arrays)
    weights = {n: _decoded(n, arrays[n], scales[n]) for n in _weights(arrays)}
    return _rest(arrays) | weights


def pack_update(update: Arrays, started_from: Arrays, transport: Transport) -> Arrays:
    """A site's arrays as they leave it.

    Args:
        update: Under their wire names.
        started_from: What `unpack_state` gave for the round.
        transport: The recipe's.
    """
    if transport == "float32":
        return update
    with np.errstate(invalid="ignore", over="ignore"):  # a broken update is the server's to name
        return _rest(update) | _packed({n: update[n] - started_from[n] for n in _weights(update)})


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
    scales = _scales(arrays)
    result = _rest(arrays)
    for name in _weights(arrays):
        if name not in state:
            raise TransportError(f"array '{name}' was not asked for")
        array, known = arrays.pop(name), state[name]
        if array.shape != known.shape:
            raise TransportError(f"array '{name}' has shape {array.shape}, expected {known.shape}")
        difference = _decoded(name, array, scales[name])
        with np.errstate(invalid="ignore", over="ignore"):
            result[name] = np.add(known, difference, out=difference)
    return result


def _weights(arrays: Group) -> list[str]:
    return sorted(name for name in arrays if name.startswith((STUDENT, TEACHER)))


def _rest(arrays: Arrays) -> Arrays:
    """All that travels as it is; scales belong to the weights."""
    skipped = (STUDENT, TEACHER, SCALES)
    return {name: a for name, a in arrays.items() if not name.startswith(skipped)}


def _packed(weights: Group) -> Arrays:
    """Tensors as float16, and the scales of each group."""
    result: Arrays = {}
    for group in (STUDENT, TEACHER):
        names = [name for name in _weights(weights) if name.startswith(group)]
        scales = np.array([_scale(weights[name]) for name in names], np.float32)
        for name, scale in zip(names, scales, strict=True):
            with np.errstate(invalid="ignore", over="ignore"):
                result[name] = np.asarray(weights[name] / scale, np.float16)
        if names:
            result[SCALES + group.rstrip("/")] = scales
    return result


def _scale(tensor: NDArray[Any]) -> float:
    largest = float(np.abs(tensor).max(initial=0))
    if largest == 0 or not np.isfinite(largest):
        return 1.0
    exponent = int(np.frexp(largest)[1]) - TOP_EXPONENT
    return float(2.0 ** max(exponent, SMALLEST_EXPONENT))


def _scales(arrays: Arrays) -> dict[str, np.float32]:
    """The scale of each tensor; every group of tensors has its scales, and no other has."""
    result: dict[str, np.float32] = {}
    used = set()
    for group in (STUDENT, TEACHER):
        names = [name for name in _weights(arrays) if name.startswith(group)]
        key = SCALES + group.rstrip("/")
        if not names:
            continue
        if (scales := arrays.get(key)) is None:
            raise TransportError(f"array '{key}' is missing (transport delta16)")
        if scales.dtype != np.float32 or scales.shape != (len(names),):
            raise TransportError(
                f"array '{key}' is {scales.dtype} of shape {scales.shape}, expected float32 of "
                f"shape ({len(names)},)"
            )
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise TransportError(f"array '{key}' holds a scale that is not finite and positive")
        result |= dict(zip(names, scales, strict=True))
        used.add(key)
    if extra := sorted(name for name in arrays if name.startswith(SCALES) and name not in used):
        raise TransportError(f"array '{extra[0]}' was not asked for")
    return result


def _decoded(name: str, array: NDArray[Any], scale: np.float32) -> NDArray[np.float32]:
    if array.dtype != np.float16:
        raise TransportError(
            f"array '{name}' has dtype {array.dtype}, expected float16 (transport delta16)"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        decoded: NDArray[np.float32] = array.astype(np.float32) * scale
    return np.asarray(decoded)  # a scalar tensor's product is no array
