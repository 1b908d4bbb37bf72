"""Prototypes: what a site says of its memory bank, and how the server joins what all sites say.

Spherical k-means in numpy; sums run in float64 without BLAS, so results depend neither on the
number of threads nor on the engine.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from core.modalities import MODALITIES
from core.wire import Prototypes

Points = NDArray[np.floating]
Float64 = NDArray[np.float64]
Centroids = NDArray[np.float32]
Assignment = NDArray[np.int64]


def spherical_kmeans(
    points: Points,
    weights: NDArray[np.floating],
    k: int,
    rng: np.random.Generator,
    iterations: int = 20,
) -> tuple[Centroids, Assignment]:
    """Cluster directions by cosine.

    Args:
        points: [N, D] with N >= 1; only the direction of a row counts.
        weights: [N], positive.
        k: Most centroids wanted; fewer come back when there are fewer distinct points.
        rng: Draws the starting points (k-means++ on 1 - cosine).
        iterations: Most rounds of assignment and mean.

    Returns:
        Unit rows [k', D] and the index of each point's centroid [N]; each centroid has a point.
    """
    units, mass = _unit(points), weights.astype(np.float64)
    centroids, assignment = _refine(units, mass, _spread(units, mass, k, rng), iterations)
    return centroids.astype(np.float32), assignment


def site_prototypes(
    embeddings: Points,
    patients: NDArray[np.integer],
    k: int,
    min_patients: int,
    rng: np.random.Generator,
) -> tuple[Centroids, NDArray[np.float32]]:
    """Summarise one modality of a memory bank for the server.

    Args:
        embeddings: [N, D], the bank's entries that hold real images.
        patients: [N], whose each entry is.
        k: Most prototypes wanted.
        min_patients: Fewest distinct patients of a prototype, at least 2.
        rng: Draws the starting points.

    Returns:
        Unit rows [k', D] and the distinct patients behind each [k']; k' is 0 if there are too few.

    **Guarantees**, for every input:
        - A returned row is a mean over at least `min_patients` distinct patients.
        - Fewer than `min_patients` distinct patients in all: nothing is returned.
        - No patient weighs more than 1 in a row, however many images are theirs.
        - A returned count is the number of distinct patients of its row.
    """
    _, patient_index, images = np.unique(patients, return_inverse=True, return_counts=True)
    k = min(k, len(images) // min_patients)
    if k == 0:
        dim = embeddings.shape[1]
        return np.zeros((0, dim), np.float32), np.zeros(0, np.float32)
    units, mass = _unit(embeddings), 1.0 / images[patient_index]
    centroids = _spread(units, mass, k, rng)
    while True:
        centroids, assignment = _refine(units, mass, centroids, iterations=20)
        pairs = np.unique(np.stack([assignment, patient_index]), axis=1)  # [2, distinct]
        counts = np.bincount(pairs[0], minlength=len(centroids))
        if counts.min() >= min_patients:  # true at the latest when one centroid is left
            return centroids.astype(np.float32), counts.astype(np.float32)
        centroids = np.delete(centroids, counts.argmin(), axis=0)


def merge_prototypes(
    contributions: Mapping[str, Prototypes], k: int, *seed: int, least_sites: int = 1
) -> Prototypes:
    """Join the prototypes of all sites by spherical k-means weighted with their counts.

    Args:
        contributions: Site -> what it last sent. Sites are taken in name order: the order of
            arrival changes no bit of the result.
        k: Most prototypes of a modality.
        seed: Whole numbers that fix the draws, such as the study's seed and the round.
        least_sites: A modality to which fewer contributed is left out; 1 or more.

    Returns:
        Per modality unit rows and patient counts.
    """
    merged = Prototypes({}, {})
    for index, modality in enumerate(MODALITIES):
        given = [
            contributions[s] for s in sorted(contributions) if modality in contributions[s].counts
        ]
        if len(given) < least_sites:
            continue
        points = np.concatenate([p.centroids[modality] for p in given])  # [N, D]
        counts = np.concatenate([p.counts[modality] for p in given])  # [N]
        rng = np.random.default_rng([*seed, index])
        merged.centroids[modality], assignment = spherical_kmeans(points, counts, k, rng)
        totals = np.bincount(assignment, counts, minlength=len(merged.centroids[modality]))
        merged.counts[modality] = totals.astype(np.float32)
    return merged


def decay_prototypes(prototypes: Prototypes, factor: float) -> Prototypes:
    """What remains of an absent site's prototypes after a round; counts below 1 are dropped."""
    decayed = Prototypes({}, {})
    for modality, counts in prototypes.counts.items():
        left = (counts * np.float32(factor)).astype(np.float32)
        if (kept := left >= 1).any():
            decayed.counts[modality] = left[kept]
            decayed.centroids[modality] = prototypes.centroids[modality][kept]
    return decayed


def _unit(points: Points) -> Float64:
    rows = points.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    units: Float64 = rows / np.maximum(norms, 1e-30)[:, None]
    return units


def _cosines(points: Float64, centroids: Float64) -> Float64:
    cosines: Float64 = np.einsum("nd,kd->nk", points, centroids)  # [N, K]
    return cosines


def _spread(points: Float64, weights: Float64, k: int, rng: np.random.Generator) -> Float64:
    """Starting centroids: points drawn far from those already drawn (k-means++)."""
    chosen: list[int] = []
    distance = np.ones(len(points))
    while len(chosen) < k:
        chance = np.cumsum(weights * distance)
        if chance[-1] <= 0:  # every point is already a centroid
            break
        pick = int(np.searchsorted(chance, rng.random() * chance[-1], side="right"))
        chosen.append(min(pick, len(points) - 1))
        nearest = _cosines(points, points[chosen[-1:]])[:, 0]
        # Rounding leaves 1 - cosine of equal points near 1e-16, not at 0.
        distance = np.minimum(distance, np.where(nearest > 1 - 1e-12, 0.0, 1 - nearest))
    return points[chosen]


def _refine(
    points: Float64, weights: Float64, centroids: Float64, iterations: int
) -> tuple[Float64, Assignment]:
    """Lloyd's iterations; a centroid that loses all its points is dropped."""
    assignment = np.full(len(points), -1)
    for _ in range(iterations):
        nearest = _cosines(points, centroids).argmax(1)
        held, nearest = np.unique(nearest, return_inverse=True)
        if len(held) == len(centroids) and (nearest == assignment).all():
            break
        assignment, centroids = nearest, centroids[held]
        for index in range(len(centroids)):
            inside = assignment == index
            mean = (weights[inside, None] * points[inside]).sum(0)
            if (norm := np.sqrt((mean * mean).sum())) > 1e-12:  # opposite points may cancel
                centroids[index] = mean / norm
    return centroids, assignment
