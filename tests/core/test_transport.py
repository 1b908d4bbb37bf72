"""Fewer bits on the wire: golden values, a stated error over a grid, nothing lost for good."""

import numpy as np
import pytest

from core.rounding import FLOOR, RELATIVE_ERROR
from core.transport import (
    TransportError,
    carry,
    pack_state,
    pack_update,
    unpack_state,
    unpack_update,
)

TINIEST, LARGEST = np.float32(2.0**-149), np.finfo(np.float32).max


def f32(*values):
    return np.array(values, np.float32)


def down(array):
    """One student tensor as a site decodes it."""
    return unpack_state(pack_state({"student/a": array}, "delta16"), "delta16")["student/a"]


def up(change, start=None):
    """A change of one student tensor as the server decodes it, on a master of `start`."""
    start = np.zeros_like(change) if start is None else start
    packed = pack_update({"student/a": start + change}, {"student/a": start}, "delta16")
    return unpack_update(packed, {"student/a": start}, "delta16")["student/a"]


def test_packed_values_are_those_computed_by_hand():
    state = {"student/b": f32(3, 0), "student/a": f32(0.5, -0.75), "teacher/t": f32(0)}
    rows = np.eye(2, dtype=np.float32)
    packed = pack_state(state | {"prototypes/ct": rows}, "delta16")
    # 0.75 lies in [2^-1, 2^0): times 2^15 for the largest to lie in [2^14, 2^15); 3 in [2^1, 2^2).
    assert packed["scales/student"].tolist() == [2.0**-15, 2.0**-13]
    assert packed["student/a"].tolist() == [16384.0, -24576.0]
    assert packed["student/b"].tolist() == [24576.0, 0.0]
    assert packed["scales/teacher"].tolist() == [1.0]
    assert {packed[n].dtype.name for n in state} == {"float16"}
    assert packed["prototypes/ct"] is rows
    unpacked = unpack_state(packed, "delta16")
    assert set(unpacked) == {*state, "prototypes/ct"}
    assert all(unpacked[name].tolist() == array.tolist() for name, array in state.items())


def test_float32_passes_the_very_arrays():
    state = {"student/a": f32(np.pi, 1e-42, -0.0), "teacher/a": f32(1)}
    assert pack_state(state, "float32") is state
    assert unpack_state(state, "float32") is state
    assert pack_update(state, {}, "float32") is state
    assert unpack_update(state, {}, "float32") is state


GRID = [
    f32(0.0, -0.0),
    f32(TINIEST, -TINIEST),
    f32(TINIEST, 3 * TINIEST, 1e-40, 1.1754944e-38),
    f32(2.0**127, -(2.0**127)),
    f32(2.0**127, 1.0, 1e-20),
    f32(65504, 65519, 65520, 65536, 1e5),
    f32(6e-8, 5e-8, 1e-12, 6.1e-5),
    f32(1, 1 + 2**-11, 1 + 2**-12, np.nextafter(f32(2), f32(0))[0]),
    np.zeros((0, 3), np.float32),
    np.float32(0.3).reshape(()),
    *(
        np.random.default_rng(99 + exponent).standard_normal((64, 8)).astype(np.float32)
        * np.float32(10.0**exponent)
        for exponent in (-44, -38, -20, -6, 0, 6, 20, 37)
    ),
]


@pytest.mark.parametrize("codec", [down, up])
@pytest.mark.parametrize("array", GRID, ids=range(len(GRID)))
def test_the_error_is_within_what_is_stated(array, codec):
    decoded = codec(array)
    assert decoded.dtype == np.float32
    assert decoded.shape == array.shape
    exact, largest = array.astype(np.float64), np.abs(array.astype(np.float64)).max(initial=0)
    allowed = np.maximum(np.abs(exact) * RELATIVE_ERROR, largest * FLOOR)
    assert (np.abs(decoded - exact) <= allowed).all()
    assert np.isfinite(decoded).all()
    assert not decoded[array == 0].any()


def test_the_stated_error_is_no_larger_than_needed():
    worst = f32(1 + 2.0**-11)  # halfway between two float16, to the even one
    assert down(worst)[0] == 1.0
    assert abs(down(worst) - worst)[0] / worst[0] > 0.99 * RELATIVE_ERROR


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_arrives_as_not_finite(bad):
    change = f32(1e-3, bad, 1e30)
    assert not np.isfinite(up(change)[1])


def test_a_difference_that_overflows_on_the_servers_weights_is_not_finite():
    packed = {"student/a": np.array([65504], np.float16), "scales/student": f32(2.0**112)}
    state = {"student/a": f32(LARGEST)}
    assert np.isinf(unpack_update(packed, state, "delta16")["student/a"][0])


def test_tiny_updates_of_many_rounds_survive_that_half_precision_weights_would_lose():
    rounds, step = 20, np.float32(1e-5)  # float16 next to 1: 1 - 2^-11 and 1 + 2^-10
    master, half = {"student/a": f32(1.0, 0.7)}, np.array([1.0, 0.7], np.float16)
    for _ in range(rounds):
        received = unpack_state(pack_state(master, "delta16"), "delta16")
        trained = {"student/a": received["student/a"] + step}
        packed = pack_update(trained, received, "delta16")
        master = unpack_update(packed, master, "delta16")
        half = (half.astype(np.float32) + step).astype(np.float16)
    assert half[0] == 1.0
    expected = f32(1.0, 0.7) + rounds * step
    np.testing.assert_allclose(master["student/a"], expected, rtol=0, atol=rounds * 2.0**-23)


def test_a_site_that_changes_nothing_leaves_the_servers_weights_bit_for_bit():
    rng = np.random.default_rng(0)
    master = {"student/a": rng.standard_normal((9, 7)).astype(np.float32)}
    received = unpack_state(pack_state(master, "delta16"), "delta16")
    assert received["student/a"].tobytes() != master["student/a"].tobytes()
    packed = pack_update(received, received, "delta16")
    decoded = unpack_update(packed, master, "delta16")["student/a"]
    assert decoded.tobytes() == master["student/a"].tobytes()


def test_decoding_takes_each_array_out_of_what_came():
    packed = pack_update({"student/a": f32(1)}, {"student/a": f32(0)}, "delta16")
    unpack_update(packed, {"student/a": f32(0)}, "delta16")
    assert "student/a" not in packed


HALF = np.zeros(2, np.float16)
MALFORMED = {
    "float32 weights": ({"student/a": f32(1, 2)}, "'student/a' has dtype float32, expected float1"),
    "big-endian": ({"student/a": HALF.astype(">f2")}, "'student/a' has dtype >f2, expected float1"),
    "no scales": ({"scales/student": None}, "'scales/student' is missing"),
    "scale of 0": ({"scales/student": f32(0)}, "holds a scale that is not finite and positive"),
    "negative scale": ({"scales/student": f32(-1)}, "not finite and positive"),
    "nan scale": ({"scales/student": f32(np.nan)}, "not finite and positive"),
    "inf scale": ({"scales/student": f32(np.inf)}, "not finite and positive"),
    "scales too many": ({"scales/student": f32(1, 1)}, r"shape \(2,\), expected float32 of shape"),
    "float64 scales": ({"scales/student": np.ones(1)}, "'scales/student' is float64"),
    "scales of nothing": ({"scales/teacher": f32(1)}, "'scales/teacher' was not asked for"),
    "other scales": ({"scales/x": f32(1)}, "'scales/x' was not asked for"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arrays_are_refused_by_name_both_ways(case):
    changes, words = MALFORMED[case]
    good = {"student/a": HALF, "scales/student": f32(1)}
    arrays = {n: a for n, a in (good | changes).items() if a is not None}
    with pytest.raises(TransportError, match=words):
        unpack_state(dict(arrays), "delta16")
    with pytest.raises(TransportError, match=words):
        unpack_update(dict(arrays), {"student/a": f32(0, 0)}, "delta16")


def test_an_update_of_another_shape_or_name_is_refused_before_it_is_decoded():
    arrays = {"student/a": HALF, "scales/student": f32(1)}
    with pytest.raises(TransportError, match=r"'student/a' has shape \(2,\), expected \(1, 2\)"):
        unpack_update(dict(arrays), {"student/a": np.zeros((1, 2), np.float32)}, "delta16")
    with pytest.raises(TransportError, match="'student/a' was not asked for"):
        unpack_update(dict(arrays), {"student/b": f32(0, 0)}, "delta16")


def test_changes_in_eight_bits_are_those_computed_by_hand():
    start = {"student/a": f32(1, 1, 1), "student/b": f32(0), "teacher/t": f32(2)}
    rows = np.eye(2, dtype=np.float32)
    update = {"student/a": f32(1.5, 0.75, 1), "student/b": f32(0), "teacher/t": f32(-125)}
    packed = pack_update(update | {"prototypes/ct": rows}, start, "delta8")
    # changes .5, -.25, 0: scale .5 / 127, and -.25 is -63.5 steps, which rounds to even
    assert packed["student/a"].tolist() == [127, -64, 0]
    assert packed["scales/student"].tolist() == [np.float32(0.5 / 127), 1.0]
    assert packed["teacher/t"].tolist() == [-127]
    assert packed["scales/teacher"].tolist() == [1.0]
    assert {packed[n].dtype.name for n in start} == {"int8"}
    assert packed["prototypes/ct"] is rows


def test_delta8_sends_the_teachers_distance_from_the_rounded_student():
    state = {
        "student/a": f32(0.5, -0.75),
        "teacher/a": f32(0.75, -1.25),
        "prototypes/ct": np.eye(2),
    }
    packed = pack_state(state, "delta8")
    assert packed["student/a"].dtype == np.float16
    # distances .25, -.5: scale .5 / 127, and .25 is 63.5 steps, which rounds to even
    assert packed["teacher/a"].tolist() == [64, -127]
    assert packed["scales/teacher"].tolist() == [np.float32(0.5 / 127)]
    received = unpack_state(packed, "delta8")
    assert received["student/a"].tolist() == [0.5, -0.75]
    np.testing.assert_allclose(received["teacher/a"], [0.5 + 64 / 254, -1.25], rtol=1e-7)
    assert received["prototypes/ct"] is state["prototypes/ct"]


def test_the_teachers_error_is_within_what_is_stated():
    rng = np.random.default_rng(3)
    student = rng.normal(0, 0.02, (30, 20)).astype(np.float32)
    for far in (0.0, 1e-6, 1e-3, 1.0):
        teacher = (student + rng.normal(0, far, student.shape)).astype(np.float32)
        state = {"student/a": student, "teacher/a": teacher}
        received = unpack_state(pack_state(state, "delta8"), "delta8")
        sixteen = unpack_state(pack_state(state, "delta16"), "delta16")
        assert received["student/a"].tobytes() == sixteen["student/a"].tobytes()
        apart = np.abs(teacher - received["student/a"]).max()
        allowed = apart / 253 + 2.0**-23 * np.abs(teacher).max()
        assert np.abs(received["teacher/a"] - teacher).max() <= allowed


@pytest.mark.parametrize("student", [{}, {"student/a": np.zeros(1, np.float16)}])
def test_a_teacher_without_its_student_is_refused_by_name(student):
    arrays = {"teacher/a": np.zeros(2, np.int8), "scales/teacher": f32(1), **student}
    arrays |= {"scales/student": f32(1)} if student else {}
    with pytest.raises(TransportError, match="'teacher/a' has no student's of its name and shape"):
        unpack_state(arrays, "delta8")


ROUNDS = 30


def changes(kind, rng):
    """What a site's training changes in a round, of two tensors."""
    size = (40, 6)
    change = {
        "even": lambda: rng.normal(0, 1e-3, size),
        "one huge": lambda: np.where(np.arange(240).reshape(size) == 7, 5.0, rng.normal(0, 1e-3)),
        "too small for a step": lambda: np.where(np.arange(240).reshape(size) == 0, 1.0, 1e-3),
        "zero": lambda: np.zeros(size),
        "now and then": lambda: rng.normal(0, 1e-3, size) * rng.integers(0, 2),
    }[kind]()
    return {"student/a": change.astype(np.float32), "student/b": f32(rng.normal())}


@pytest.mark.parametrize(
    "kind", ["even", "one huge", "too small for a step", "zero", "now and then"]
)
def test_all_that_was_sent_is_all_that_changed_but_for_what_the_last_round_owes(kind):
    rng = np.random.default_rng(5)
    start = {"student/a": rng.normal(0, 0.02, (40, 6)).astype(np.float32), "student/b": f32(0.5)}
    owed, largest = {}, {n: np.abs(array).max() for n, array in start.items()}
    sent, changed = dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    for _ in range(ROUNDS):
        update = {n: start[n] + change for n, change in changes(kind, rng).items()}
        whole, owed = carry(update, start, owed, "delta8")
        decoded = unpack_update(pack_update(whole, start, "delta8"), start, "delta8")
        for n in start:
            largest[n] = max(largest[n], np.abs(whole[n]).max())
            sent[n] = sent[n] + (decoded[n].astype(np.float64) - start[n])
            changed[n] = changed[n] + (update[n].astype(np.float64) - start[n])
        start = {n: decoded[n] for n in start}  # a study of one site
    for n in start:
        rounding = ROUNDS * 2.0**-23 * largest[n]
        np.testing.assert_allclose(sent[n], changed[n] - owed[n], rtol=0, atol=rounding)


def test_what_is_owed_is_within_the_stated_error_of_the_round():
    rng = np.random.default_rng(1)
    owed, start = {}, {"student/a": np.zeros((9, 9), np.float32)}
    for size in (1e-3, 1e3, 1e-30, 0.0):
        update = {"student/a": rng.normal(0, size, (9, 9)).astype(np.float32)}
        whole, owed = carry(update, start, owed, "delta8")
        assert np.abs(owed["student/a"]).max() <= np.abs(whole["student/a"]).max() / 253 + 2.0**-127
    assert not (update["student/a"]).any()
    assert whole["student/a"].any()  # what was owed comes, though nothing changed


def test_without_what_is_owed_small_changes_beside_a_large_one_would_never_arrive():
    start, owed = {"student/a": f32(0, 0)}, {}
    kept = lost = f32(0, 0)
    for _ in range(100):
        update = {"student/a": f32(1, 1e-3)}  # a step is 1 / 127
        whole, owed = carry(update, start, owed, "delta8")
        kept = (
            kept + unpack_update(pack_update(whole, start, "delta8"), start, "delta8")["student/a"]
        )
        lost = (
            lost + unpack_update(pack_update(update, start, "delta8"), start, "delta8")["student/a"]
        )
    assert lost[1] == 0
    assert kept[1] == pytest.approx(0.1, abs=1 / 253)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_sent_as_such_and_owes_nothing(bad):
    start = {"student/a": f32(0, 0), "student/b": f32(0)}
    update = {"student/a": f32(1e-3, bad), "student/b": f32(0.3)}
    owed = {"student/a": f32(1, 1), "student/b": f32(1e-3)}
    whole, left = carry(update, start, owed, "delta8")
    packed = pack_update(whole, start, "delta8")
    decoded = unpack_update(packed, start, "delta8")
    assert not np.isfinite(decoded["student/a"]).any()
    assert decoded["student/b"][0] == pytest.approx(0.301, rel=1e-6)
    assert set(left) == {"student/b"}


def test_only_delta8_owes_and_only_what_is_still_sent():
    update, start = {"student/a": f32(1 / 3, 1)}, {"student/a": f32(0, 0)}
    owed = {"student/a": f32(9, 9), "teacher/a": f32(1)}
    for transport in ("float32", "delta16"):
        whole, left = carry(update, start, owed, transport)
        assert whole is update
        assert left == {}
    whole, left = carry(update, start, owed, "delta8")
    assert set(whole) == set(left) == {"student/a"}
    assert update["student/a"][1] == 1  # the caller's own stays as it was


EIGHT = np.zeros(2, np.int8)
MALFORMED_EIGHT = {
    "float16 weights": ({"student/a": HALF}, "'student/a' has dtype float16, expected int8"),
    "unsigned": ({"student/a": EIGHT.astype(np.uint8)}, "has dtype uint8, expected int8"),
    "no scales": ({"scales/student": None}, r"is missing \(transport delta8\)"),
    "scale of 0": ({"scales/student": f32(0)}, "holds a scale that is not finite and positive"),
    "negative scale": ({"scales/student": f32(-1)}, "not finite and positive"),
    "inf scale": ({"scales/student": f32(np.inf)}, "not finite and positive"),
    "scales of each number": ({"scales/student": f32(1, 1)}, r"shape \(2,\), expected float32 of"),
}


@pytest.mark.parametrize("case", MALFORMED_EIGHT)
def test_malformed_changes_in_eight_bits_are_refused_by_name(case):
    changes, words = MALFORMED_EIGHT[case]
    good = {"student/a": EIGHT, "scales/student": f32(1)}
    arrays = {n: a for n, a in (good | changes).items() if a is not None}
    with pytest.raises(TransportError, match=words):
        unpack_update(arrays, {"student/a": f32(0, 0)}, "delta8")
