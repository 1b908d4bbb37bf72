"""Eight bits and a scale: golden values and a stated error over a grid."""

import numpy as np
import pytest

from core.rounding import EIGHT, HALF, TENSOR_ERROR, TENSOR_FLOOR, decode

TINIEST = np.float32(2.0**-149)


def f32(*values):
    return np.array(values, np.float32)


def through(tensor, rounding=EIGHT):
    codes, scale = rounding.encode(tensor)
    return decode(codes, np.float32(scale))


GRID = [
    f32(0.0, -0.0),
    f32(TINIEST, -TINIEST),
    f32(2.0**-126, 1e-40, -3e-39),
    f32(2.0**127, -(2.0**127), 1.0),
    f32(1e4, 1e-4, 0, -1e-4),
    f32(*range(-127, 128)),
    f32(*np.linspace(-1, 1, 1001)),
    np.zeros((0, 3), np.float32),
    np.float32(0.3).reshape(()),
    *(
        np.random.default_rng(99 + exponent).standard_normal((64, 8)).astype(np.float32)
        * np.float32(10.0**exponent)
        for exponent in (-44, -38, -20, -6, 0, 6, 20, 37)
    ),
]


@pytest.mark.parametrize("array", GRID, ids=range(len(GRID)))
def test_the_error_of_eight_bits_is_within_what_is_stated(array):
    decoded = through(array)
    assert decoded.dtype == np.float32
    assert decoded.shape == array.shape
    exact = array.astype(np.float64)
    allowed = max(np.abs(exact).max(initial=0) * TENSOR_ERROR, TENSOR_FLOOR)
    assert (np.abs(decoded - exact) <= allowed).all()
    assert not decoded[array == 0].any()


def test_whole_numbers_up_to_127_come_back_bit_for_bit():
    array = f32(*range(-127, 128))
    assert through(array).tolist() == array.tolist()


def test_the_stated_error_is_no_larger_than_needed():
    worst = f32(127, 0.4999)
    assert abs(through(worst) - worst)[1] > 0.99 * 127 * TENSOR_ERROR


def test_the_codes_use_the_whole_range_and_no_more():
    codes, _ = EIGHT.encode(f32(-3, 3, 0.01))
    assert codes.tolist() == [-127, 127, 0]


@pytest.mark.parametrize("rounding", [HALF, EIGHT])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_does_not_come_back_finite(bad, rounding):
    with np.errstate(invalid="ignore", over="ignore"):
        assert not np.isfinite(through(f32(1e-3, bad), rounding)).all()
