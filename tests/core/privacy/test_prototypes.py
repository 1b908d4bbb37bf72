"""Prototypes with noise: what one unit changes, what noise is added, what is kept."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from core.privacy.accounting import sigma_eff
from core.privacy.noise import PrivateRandom
from core.privacy.prototypes import private_prototypes, release_prototypes, unit_statistics

D = 8
Site = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def unit_rows(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


CENTROIDS = {"ct": unit_rows(5, D), "us": unit_rows(3, D, seed=1)}


def without(site: Site, unit: int) -> Site:
    embeddings, units = site
    return (
        {m: rows[units[m] != unit] for m, rows in embeddings.items()},
        {m: owner[owner != unit] for m, owner in units.items()},
    )


def change(site: Site, unit: int) -> tuple[float, float]:
    """How far removing a unit moves all sums and all counts."""
    with_it = unit_statistics(*site, CENTROIDS)
    without_it = unit_statistics(*without(site, unit), CENTROIDS)
    sums, counts = (
        np.concatenate([(a[m] - b[m]).ravel() for m in CENTROIDS])
        for a, b in zip(with_it, without_it, strict=True)
    )
    return float(np.linalg.norm(sums)), float(np.linalg.norm(counts))


def sites() -> Iterator[Site]:
    """Random ones, and those of units that try to weigh more than they may."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sizes = {"ct": int(rng.integers(1, 30)), "us": int(rng.integers(1, 30))}
        yield (
            {m: rng.normal(size=(n, D)) * 10.0 ** rng.integers(-8, 8) for m, n in sizes.items()},
            {m: rng.integers(0, 4, n) for m, n in sizes.items()},
        )
    for scale in (1e-170, 1.5e-162, 1e-30, 1.0, 1e200, 1e308):
        few = scale * CENTROIDS["ct"][:1]
        yield {"ct": few, "us": scale * CENTROIDS["us"]}, {"ct": np.zeros(1), "us": np.zeros(3)}
        yield {"ct": np.repeat(few, 500, 0)}, {"ct": np.zeros(500, int)}
        yield {"us": np.full((4, D), scale)}, {"us": np.array([0, 0, 1, 0])}
    bad = np.tile(CENTROIDS["ct"], (2, 1))
    bad[0, 0], bad[1, 3], bad[2] = np.nan, np.inf, 0.0
    yield {"ct": bad}, {"ct": np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 0])}
    half = (np.tile(CENTROIDS["ct"], (4, 1)) * 100).astype(np.float16)
    yield {"ct": half}, {"ct": np.repeat([0, 1], 10)}


def test_one_unit_moves_all_sums_by_at_most_one_and_all_counts_too() -> None:
    worst = np.zeros(2)
    for site in sites():
        for unit in np.unique(np.concatenate(list(site[1].values()))):
            worst = np.maximum(worst, change(site, unit))
    assert worst == pytest.approx([1, 1], abs=1e-9)  # reached, and not exceeded


def test_a_weight_for_each_modality_would_move_them_further() -> None:
    """What the test above must be able to see."""
    site = {m: rows[:1] for m, rows in CENTROIDS.items()}
    apart = [unit_statistics({m: rows}, {m: np.zeros(1)}, CENTROIDS) for m, rows in site.items()]
    total = sum(np.linalg.norm(sums[m]) ** 2 for sums, _ in apart for m in CENTROIDS) ** 0.5
    assert total == pytest.approx(2**0.5)
    together = change((site, {m: np.zeros(1) for m in site}), 0)
    assert together == pytest.approx((0.5**0.5, 0.5**0.5))  # a half to each of two rows


def test_sums_and_counts_by_hand() -> None:
    axes = np.eye(2)
    embeddings = {"ct": np.array([[3.0, 0], [0, 2], [5, 0]]), "us": np.array([[0.0, -4]])}
    units = {"ct": np.array(["a", "a", "b"]), "us": np.array(["a"])}
    sums, counts = unit_statistics(embeddings, units, {"ct": axes, "us": -axes, "oct": axes})
    # a has three embeddings: a third each; b one.
    assert sums["ct"] == pytest.approx(np.array([[1 / 3 + 1, 0], [0, 1 / 3]]))
    assert counts["ct"] == pytest.approx(np.array([1 / 3 + 1, 1 / 3]))
    assert sums["us"] == pytest.approx(np.array([[0, 0], [0, -1 / 3]]))
    assert counts["us"] == pytest.approx(np.array([0, 1 / 3]))
    assert not sums["oct"].any()
    assert counts["oct"].tolist() == [0, 0]


def test_what_is_not_finite_or_zero_counts_for_nothing() -> None:
    good = CENTROIDS["ct"][:1]
    bad = np.array([[np.nan] * D, [np.inf] + [0.0] * (D - 1), [0.0] * D])
    with_bad = {"ct": np.concatenate([good, bad])}
    expected = unit_statistics({"ct": good}, {"ct": np.array([7])}, CENTROIDS)
    found = unit_statistics(with_bad, {"ct": np.array([7, 7, 8, 9])}, CENTROIDS)
    for a, b in zip(expected, found, strict=True):
        assert all((a[m] == b[m]).all() for m in CENTROIDS)


def test_modalities_without_centroids_or_without_images_are_no_error() -> None:
    site = {"oct": unit_rows(4, D), "us": np.zeros((0, D))}
    sums, counts = unit_statistics(site, {"oct": np.arange(4), "us": np.zeros(0, int)}, CENTROIDS)
    assert set(sums) == {"ct", "us"}
    assert not any(a.any() for a in (*sums.values(), *counts.values()))
    assert unit_statistics({}, {}, CENTROIDS)[1]["ct"].tolist() == [0] * 5


class Recorded(PrivateRandom):
    """Hands on what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[np.ndarray] = []

    def normal(self, count: int) -> np.ndarray:
        self.drawn.append(super().normal(count))
        return self.drawn[-1]


def test_noise_has_its_deviation_on_sums_and_on_counts_and_is_each_numbers_own() -> None:
    k, dim, sums, counts = 400, 16, 1e6 * unit_rows(400, 16), np.full(400, 1e4)
    random = Recorded()
    rows, noised = release_prototypes(sums, counts, 5.0, 9.0, random, 10)
    assert [len(d) for d in random.drawn] == [k * dim, k]
    on_sums = random.drawn[0].reshape(k, dim) * 5.0
    assert np.std(noised - counts) == pytest.approx(9.0, rel=0.15)
    expected = sums + on_sums
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert rows == pytest.approx(expected, abs=1e-6)
    assert np.std(on_sums) == pytest.approx(5.0, rel=0.05)


def test_two_releases_draw_other_noise() -> None:
    first, second = (
        release_prototypes(100 * unit_rows(5, D), np.full(5, 100.0), 1.0, 2.0, PrivateRandom(), 10)
        for _ in range(2)
    )
    assert (first[1] != second[1]).all()
    assert not (first[0] == second[0]).any()


@pytest.mark.parametrize("dim", [1, 2, 32])
def test_noise_alone_hardly_ever_passes_for_a_sum(dim: int) -> None:
    rows, _ = release_prototypes(
        np.zeros((50_000, dim)), np.full(50_000, 1e6), 10.0, 20.0, PrivateRandom(), 0
    )
    assert len(rows) <= 16  # chance 6.3e-5 each at dim 1, less beyond: 3.2 expected


def test_noise_alone_seldom_passes_for_a_count() -> None:
    rows, _ = release_prototypes(
        np.full((50_000, 2), 1e6), np.zeros(50_000), 10.0, 20.0, PrivateRandom(), 0
    )
    assert 25 < len(rows) < 125  # chance 1.35e-3 each: 67.5 expected, deviation 8.2


@pytest.mark.parametrize(
    ("length", "count", "kept"),
    [
        (1000.0, 1000.0, 1),
        (10.0, 1000.0, 0),  # the sum is no longer than noise
        (1000.0, 20.0, 0),  # the count is no larger than noise
        (1000.0, 85.0, 0),  # beyond noise, below the fewest patients
    ],
)
def test_a_row_is_kept_if_sum_count_and_fewest_units_allow(
    length: float, count: float, kept: int
) -> None:
    rows, counts = release_prototypes(
        length * unit_rows(1, D), np.array([count]), 5.0, 5.0, PrivateRandom(), 120
    )
    assert len(rows) == len(counts) == kept


def test_rows_are_finite_of_length_one_and_near_the_true_directions() -> None:
    directions = unit_rows(6, 64)
    rows, counts = release_prototypes(
        500 * directions, np.full(6, 600.0), 6.0, 12.0, PrivateRandom(), 10
    )
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(6), abs=1e-6)
    # cos = 1 / sqrt(1 + (6 * 8 / 500)^2) = .9954 in the mean
    assert (np.einsum("kd,kd->k", rows, directions) > 0.98).all()
    assert rows.dtype == counts.dtype == np.float32


def test_private_prototypes_find_the_clusters_of_all_modalities() -> None:
    rng = np.random.default_rng(0)
    embeddings, units = {}, {}
    for modality, centroids in CENTROIDS.items():
        group = rng.integers(0, len(centroids), 4000)
        embeddings[modality] = centroids[group] + 0.05 * rng.normal(size=(4000, D))
        units[modality] = np.arange(4000) // 2  # two images of each modality a patient
    start = {m: unit_rows(*c.shape, seed=5) * 0.3 + c for m, c in CENTROIDS.items()}
    found = private_prototypes(
        embeddings, units, start, noise=5.0, min_count=10, random=PrivateRandom()
    )
    assert list(found.centroids) == ["ct", "us"]
    for modality, rows in found.centroids.items():
        cosines = np.einsum("kd,jd->kj", rows, CENTROIDS[modality])
        assert (cosines.max(1) > 0.97).all()
        # 2,000 patients weigh a half in each modality; noise on counts has deviation 10
        assert found.counts[modality].sum() == pytest.approx(1000, abs=150)


def test_noise_is_drawn_for_modalities_that_a_site_does_not_hold() -> None:
    random = Recorded()
    arguments = {"noise": 5.0, "min_count": 10.0, "random": random}
    found = private_prototypes({}, {}, CENTROIDS, **arguments)
    assert [len(d) for d in random.drawn] == [5 * D, 5, 3 * D, 3]
    assert found.centroids == {}


def test_counts_have_twice_the_noise_of_sums_as_the_accounting_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    monkeypatch.setattr(
        "core.privacy.prototypes.release_prototypes",
        lambda sums, counts, a, b, *rest: used.append((a, b)) or (sums[:0], counts[:0]),
    )
    random = PrivateRandom()
    private_prototypes({}, {}, CENTROIDS, noise=7.0, min_count=10, random=random)
    assert used == [(7.0, 14.0)] * 2
    assert sigma_eff(*used[0]) == pytest.approx(14 / 5**0.5)


def test_the_order_of_units_and_images_changes_nothing_but_rounding() -> None:
    embeddings, units = unit_rows(6, D, seed=3), np.array([0, 0, 1, 2, 2, 2])
    expected = unit_statistics({"ct": embeddings}, {"ct": units}, CENTROIDS)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        o = list(order)
        found = unit_statistics({"ct": embeddings[o]}, {"ct": units[o]}, CENTROIDS)
        for a, b in zip(expected, found, strict=True):
            assert a["ct"] == pytest.approx(b["ct"])
