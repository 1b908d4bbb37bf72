import numpy as np
import pytest

from client.ingest.grey import robust_range, to_bytes
from client.ingest.types import Reason, Rejected


def test_the_range_leaves_out_one_value_in_two_hundred_at_each_end() -> None:
    values = np.arange(1001, dtype=np.uint16)
    assert robust_range(values) == (5, 995)
    values[0] = 60_000  # a hot pixel
    assert robust_range(values)[1] < 1000


def test_where_percentiles_are_equal_the_extremes_count() -> None:
    values = np.zeros((100, 100), np.int32)
    values[5, 5] = 7
    assert robust_range(values) == (0, 7)
    assert robust_range(np.zeros((4, 4))) == (0, 0)


def test_a_large_volume_is_sampled_along_all_axes() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.int16)[:, None, None], (200, 200, 200))
    assert robust_range(ramp) == pytest.approx((1, 199), abs=2)
    assert robust_range(ramp.T) == pytest.approx((1, 199), abs=2)


def test_values_that_are_not_finite_do_not_count_and_alone_are_refused() -> None:
    assert robust_range(np.array([np.nan, 1, 2, np.inf, -np.inf])) == pytest.approx(
        (1, 2), abs=0.01
    )
    with pytest.raises(Rejected, match=Reason.NOT_FINITE):
        robust_range(np.array([np.nan, np.inf]))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float16, np.float32, np.float64])
def test_a_range_is_mapped_to_bytes_rounded_and_clipped(dtype: type) -> None:
    values = np.array([-1000, -160, -159, 40, 239, 240, 3000], dtype)
    # A CT window of centre 40 and width 400: 1 of 400 is 0.6375 levels, the centre 127.5.
    assert to_bytes(values, -160, 240).tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_nan_is_background_and_infinities_are_the_ends() -> None:
    values = np.array([np.nan, -np.inf, np.inf, 1.0])
    assert to_bytes(values, 0, 2).tolist() == [0, 0, 255, 128]


@pytest.mark.parametrize("ends", [(3, 3), (-1.7e308, 1.7e308), (0, 1e-300)])
def test_any_range_gives_bytes_without_a_warning(ends: tuple[float, float]) -> None:
    values = np.array([0.0, 3.0, -1.7e308, 1.7e308, np.nan])
    with np.errstate(all="raise"):
        assert to_bytes(values, *ends).dtype == np.uint8
