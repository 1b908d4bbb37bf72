import numpy as np
import pytest

from core.prototypes import decay_prototypes, merge_prototypes, site_prototypes, spherical_kmeans
from core.wire import Prototypes


def rng(seed=0):
    return np.random.default_rng(seed)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(per_cluster, seed=0, dim=8):
    """Points around the first three axes, with the axis each belongs to."""
    draws = rng(seed)
    truth = np.repeat(np.arange(3), per_cluster)
    return unit(np.eye(dim)[truth] + 0.1 * draws.normal(size=(3 * per_cluster, dim))), truth


def test_separated_clusters_are_found():
    points, truth = clusters(30)
    centroids, assignment = spherical_kmeans(points, np.ones(90), 3, rng())
    assert len(centroids) == 3
    for axis in range(3):
        assert len(set(assignment[truth == axis])) == 1
        own = centroids[assignment[truth == axis][0]]
        assert own[axis] > 0.95


def test_a_single_centroid_is_the_weighted_mean_direction():
    points = np.array([[1, 0], [0, 1]], np.float32)
    centroids, assignment = spherical_kmeans(points, np.array([3.0, 4.0]), 1, rng())
    np.testing.assert_allclose(centroids, [[0.6, 0.8]], atol=1e-7)  # (3, 4) / 5
    assert assignment.tolist() == [0, 0]
    assert centroids.dtype == np.float32


def test_equal_generators_give_equal_bits():
    points, _ = clusters(20)
    first = spherical_kmeans(points, np.ones(60), 5, rng(7))
    again = spherical_kmeans(points, np.ones(60), 5, rng(7))
    assert first[0].tobytes() == again[0].tobytes()
    assert (first[1] == again[1]).all()


def test_no_more_centroids_than_distinct_points_come_back():
    points = unit([[1, 0], [2, 0], [0, 1], [0, 3]])
    centroids, assignment = spherical_kmeans(points, np.ones(4), 4, rng())
    assert len(centroids) == 2
    assert sorted(set(assignment.tolist())) == [0, 1]


def test_opposite_points_leave_finite_unit_centroids():
    points = np.array([[1, 0], [-1, 0]], np.float32)
    centroids, _ = spherical_kmeans(points, np.ones(2), 1, rng())
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_patients", [2, 5, 10])
def test_a_returned_row_has_at_least_the_minimum_of_distinct_patients(seed, min_patients):
    draws = rng(seed)
    embeddings = unit(draws.normal(size=(60, 4)))
    patients = draws.integers(0, 25, size=60)
    centroids, counts = site_prototypes(embeddings, patients, 8, min_patients, rng(seed))
    assert 1 <= len(centroids) <= 8
    assert counts.min() >= min_patients
    nearest = (embeddings.astype(np.float64) @ centroids.T.astype(np.float64)).argmax(1)
    for index, count in enumerate(counts):  # a centroid's own points, as its cosines say
        assert len(set(patients[nearest == index])) >= min(min_patients, count)


def test_too_few_patients_give_nothing_however_many_their_images():
    embeddings = unit(rng().normal(size=(100, 4)))
    centroids, counts = site_prototypes(embeddings, np.arange(100) % 9, 4, 10, rng())
    assert centroids.shape == (0, 4)
    assert counts.shape == (0,)


def test_an_empty_bank_gives_nothing():
    centroids, _ = site_prototypes(np.zeros((0, 4), np.float32), np.zeros(0, int), 4, 2, rng())
    assert centroids.shape == (0, 4)


def test_a_patient_with_many_images_weighs_no_more_than_one_with_a_single_image():
    # One patient's thousand images at (1, 0), another's single one at (0, 1): the middle.
    embeddings = np.array([[1, 0]] * 1000 + [[0, 1]], np.float32)
    patients = np.array([7] * 1000 + [8])
    centroids, counts = site_prototypes(embeddings, patients, 1, 2, rng())
    np.testing.assert_allclose(centroids, [[2**-0.5, 2**-0.5]], atol=1e-6)
    assert counts.tolist() == [2.0]


def test_counts_are_distinct_patients_not_images():
    points, truth = clusters(20)
    patients = truth * 100 + np.tile(np.arange(20) // 2, 3)  # ten patients of two images an axis
    _, counts = site_prototypes(points, patients, 3, 5, rng())
    assert counts.tolist() == [10.0, 10.0, 10.0]


def contribution(seed, modality="ct"):
    rows = unit(rng(seed).normal(size=(4, 6)))
    return Prototypes({modality: rows}, {modality: np.array([12, 30, 11, 15], np.float32)})


def test_order_of_arrival_changes_no_bit_of_the_merge():
    sites = {name: contribution(i) for i, name in enumerate("abc")}
    one = merge_prototypes(sites, 5, 1, 2)
    other = merge_prototypes({name: sites[name] for name in "cab"}, 5, 1, 2)
    assert one.centroids["ct"].tobytes() == other.centroids["ct"].tobytes()
    assert one.counts["ct"].tobytes() == other.counts["ct"].tobytes()


def test_merged_counts_add_up_to_all_patients():
    merged = merge_prototypes({"a": contribution(0), "b": contribution(1)}, 3, 0)
    assert len(merged.counts["ct"]) <= 3
    assert merged.counts["ct"].sum() == 2 * (12 + 30 + 11 + 15)


def test_a_modality_of_fewer_sites_than_wanted_is_left_out():
    sites = {"a": contribution(0), "b": contribution(1, "oct")}
    assert list(merge_prototypes(sites, 3, 0).counts) == ["ct", "oct"]
    assert merge_prototypes(sites, 3, 0, least_sites=2) == Prototypes({}, {})


def test_absent_sites_fade_and_counts_below_one_are_dropped():
    rows = unit(np.eye(2))
    faded = decay_prototypes(Prototypes({"ct": rows}, {"ct": np.array([1.5, 10], np.float32)}), 0.5)
    assert faded.counts["ct"].tolist() == [5.0]
    assert faded.centroids["ct"].tolist() == [[0.0, 1.0]]
    assert decay_prototypes(faded, 0.1) == Prototypes({}, {})
