"""Prototypes that hide whether one patient, or one site, is behind them.

One step of spherical k-means with noise: embeddings go to the nearest of some centroids that
anybody may know (released before, or public), and the noised sums and counts of each centroid give
the next. A unit is a patient in mode 'record', a site in mode 'site'.

    S_k = sum over units p, and embeddings z of p nearest to k, of z / m_p          [K, D]
    c_k = sum over units p of the share of p's m_p embeddings that are nearest to k  [K]

The share of a unit is divided among its embeddings of all modalities together, so that all sums and
all counts cost one release each, whatever the number of modalities; see `sigma_eff`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.privacy.accounting import COUNT_NOISE
from core.privacy.noise import PrivateRandom
from core.wire import Prototypes

Float64 = NDArray[np.float64]
Rows = Mapping[str, NDArray[np.floating]]


def private_prototypes(
    embeddings: Rows,
    units: Mapping[str, NDArray[Any]],
    centroids: Rows,
    *,
    noise: float,
    min_count: float,
    random: PrivateRandom,
) -> Prototypes:
    """Summarise embeddings at the cost of `Event("prototypes", sigma_eff(noise, 2 noise), 1, 1)`.

    Args:
        embeddings: modality -> [N, D]; only directions count.
        units: modality -> [N], whose each row is: one value is one unit, in every modality.
        centroids: modality -> [K, D], unit rows that anybody may know. Modalities that are not here
            are left out, and for all that are here noise is drawn, held or not.
        noise: Deviation of the noise on sums; that on counts is twice as large.
        min_count: Fewest units of a prototype, by its noised count.
        random: Draws the noise.

    Returns:
        The prototypes that may leave, with noised counts; modalities without any are left out.

    **Guarantees**:
        - What is returned, modalities included, follows from noised sums and counts and from the
          keys and shapes of `centroids` alone.
    """
    sums, counts = unit_statistics(embeddings, units, centroids)
    result = Prototypes({}, {})
    for modality in centroids:
        rows, kept = release_prototypes(
            sums[modality], counts[modality], noise, COUNT_NOISE * noise, random, min_count
        )
        if len(rows):
            result.centroids[modality], result.counts[modality] = rows, kept
    return result


def unit_statistics(
    embeddings: Rows, units: Mapping[str, NDArray[Any]], centroids: Rows
) -> tuple[dict[str, Float64], dict[str, Float64]]:
    """Sums [K, D] and counts [K] of each modality; arguments as for `private_prototypes`.

    **Guarantees**, for every input, but for rounding in float64:
        - Adding or removing one unit moves all sums together, as one matrix, by at most 1
          (Frobenius), and all counts together by at most 1 (Euclid), whatever the number of its
          embeddings and modalities.
        - Embeddings that are not finite, or zero, count for nothing.
    """
    found = {m: np.asarray(embeddings[m], np.float64) for m in centroids if m in embeddings}
    directions: dict[str, Float64] = {}
    owners: dict[str, NDArray[Any]] = {}
    for modality, rows in found.items():
        largest = np.abs(rows).max(axis=1, initial=0.0)
        usable = np.isfinite(largest) & (largest > 0)
        scaled = rows[usable] / largest[usable, None]  # so that no square leaves float64's range
        directions[modality] = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
        owners[modality] = np.asarray(units[modality])[usable]
    sums = {m: np.zeros(rows.shape) for m, rows in centroids.items()}
    counts = {m: np.zeros(len(rows)) for m, rows in centroids.items()}
    if not owners:
        return sums, counts
    _, owner, images = np.unique(
        np.concatenate(list(owners.values())), return_inverse=True, return_counts=True
    )
    shares = np.split(1.0 / images[owner], np.cumsum([len(o) for o in owners.values()])[:-1])
    for (modality, rows), share in zip(directions.items(), shares, strict=True):
        nearest = np.einsum("nd,kd->nk", rows, centroids[modality]).argmax(1)  # [N]
        np.add.at(sums[modality], nearest, share[:, None] * rows)
        np.add.at(counts[modality], nearest, share)
    return sums, counts


def release_prototypes(
    sums: Float64,
    counts: Float64,
    sigma_sums: float,
    sigma_counts: float,
    random: PrivateRandom,
    min_count: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Add noise to sums [K, D] and counts [K], and keep what stands out of it.

    Returns:
        Unit rows [k, D] and their noised counts [k], k between 0 and K.

    **Guarantees**:
        - Every number of both has Gaussian noise of its own, of the deviations given; what is
          returned follows from the noised numbers alone.
        - A row is kept only if its noised sum is longer than noise alone would be, by three
          deviations, and its noised count at least `min_count` and three deviations. Of rows that
          nothing fell to, fewer than one in ten million passes both.
        - Rows are finite and of length 1.
    """
    k, dim = sums.shape
    noised = sums + sigma_sums * random.normal(k * dim).reshape(k, dim)
    noised_counts = counts + sigma_counts * random.normal(k)
    lengths = np.linalg.norm(noised, axis=1)
    kept = (lengths > sigma_sums * (math.sqrt(dim) + 3)) & (
        noised_counts >= max(min_count, 3 * sigma_counts)
    )
    rows = noised[kept] / lengths[kept, None]
    return rows.astype(np.float32), noised_counts[kept].astype(np.float32)
