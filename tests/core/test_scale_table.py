"""The table of many sites: costs are found back from runs that were made of them."""

import pytest


@pytest.fixture
def table(load_benchmark):
    return load_benchmark("scale_table")


def run_of(sites, size):
    """A service that takes 2 s a round, .5 s a site and 10 s a GB; a look of 1 ms a second."""
    seconds, look = 30, 0.02 + 1e-3 * sites
    used = 2 + sites * (0.5 + 10e-9 * size) + look * seconds
    return {
        "sites": sites, "bytes_down": size // 2, "bytes_up": size // 2,
        "cpu": {"superlink": used}, "idle": {"superlink": look}, "seconds": {"exchange": seconds},
    }  # fmt: skip


def test_the_fit_finds_what_a_round_a_site_a_byte_and_a_look_cost(table):
    cost = table.fit([run_of(4, 0), run_of(16, 0), run_of(4, 40_000_000)], "superlink")
    assert cost.fixed == pytest.approx(2)
    assert cost.site == pytest.approx(0.5)
    assert cost.byte == pytest.approx(10e-9)
    assert cost.look == pytest.approx(1e-3)


def test_a_round_is_its_longest_part_and_what_follows_it(table):
    costs = {part: table.Cost(0, 0.1, 0, 0) for part in ("superlink", "gateway", "serverapp")}
    each = {"admit": 0.2, "spool": 0.1, "screen": 0.3, "sum": 0.4}
    model = {
        "each": each, "bytes_down": 100_000_000, "bytes_up": 25_000_000, "pack": 1, "checkpoint": 2,
    }  # fmt: skip
    found = table.parts(model, costs, 10)
    assert found["network"] == pytest.approx(10)  # 1.25 GB at 1 Gbit/s
    assert found["ServerApp"] == pytest.approx(1)
    assert found["closing"] == pytest.approx(10)
    assert table.whole(found) == pytest.approx(20)
