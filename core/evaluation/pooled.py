"""AUROC over all sites from counts alone, and why the mean of the sites' AUROCs is another figure.

AUROC is the share of (positive, negative) pairs that a score puts in the right order, ties by half.
Let site i hold P_i positives and N_i negatives of P and N in all, and let A_ij be that share for
positives of site i against negatives of site j. Then

    pooled AUROC = sum over i, j of P_i N_j / (P N) * A_ij
                 = s * within + (1 - s) * across,          s = sum over i of P_i N_i / (P N)

`within` is a weighted mean of the sites' own AUROCs A_ii. `across` holds the pairs of two sites; no
site sees one, and with S equal sites they are the share 1 - 1/S. Every site may order its own
images without a fault while one site's scores lie above another's, and `across` is then anything
from 0 to 1. So a mean of site AUROCs says nothing of the pooled one, and pooling takes scores.

Scores may be pooled only if **one classifier** gave them. Probes fitted at different sites put
scores on different scales, and their pooled AUROC would measure the scales. Calibrating each site's
probabilities does not mend that: a calibrated score carries the site's share of positives.

Instead of scores, a site gives the numbers of positives and negatives in bins of the score. Pairs
in bins apart are ordered for certain; those in overlapping bins are not, and bound the error. The
estimate spreads the images of a bin evenly over it, down to hundredths, and takes the trapezoid
rule: two in the same hundredth are a tie. With bins of a hundredth all through, it lies midway
between the bounds. Small cells are avoided by joining bins, which widens the bounds: sites of few
patients get wide ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

BINS: Final = 100
"""The finest bins: hundredths of the range 0 to 1."""


@dataclass(frozen=True)
class Bins:
    """How many scores lie in each bin; bins cover 0 to 1.

    Attributes:
        ends: int64 [B], where each bin ends, in hundredths: rising, the last one is BINS.
        counts: int64 [B].
    """

    ends: Counts
    counts: Counts

    @property
    def starts(self) -> Counts:
        """Where each bin starts, in hundredths [B]."""
        return np.concatenate([[0], self.ends[:-1]])

    def to_array(self) -> Counts:
        """Columns end and count [B, 2]."""
        return np.stack([self.ends, self.counts], axis=1)

    @classmethod
    def from_array(cls, rows: Counts) -> "Bins":
        """The inverse of `to_array`.

        Raises:
            ValueError: the rows are no such counts.
        """
        if rows.ndim != 2 or rows.shape[1] != 2 or not 1 <= len(rows) <= BINS:
            raise ValueError(f"has shape {rows.shape}, expected (1 to {BINS}, 2)")
        if rows.dtype != np.int64:
            raise ValueError(f"has dtype {rows.dtype}, expected int64")
        ends, counts = rows.T
        if ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != BINS:
            raise ValueError(f"has bin ends that do not rise to {BINS}")
        if counts.min() < 0 or counts.max() >= 2**40 or not counts.any():
            raise ValueError("has negative counts, or none")
        return cls(ends, counts)


@dataclass(frozen=True)
class ScoreHistogram:
    """The images of a class at a site and all others there, by score; their bins may differ."""

    positives: Bins
    negatives: Bins


@dataclass(frozen=True)
class Pooled:
    """AUROC over several sites, with bounds that hold whatever the scores within the bins are.

    Attributes:
        auroc: the estimate, between the bounds.
        low: no order of the scores within the bins gives less.
        high: nor more.
        within: over the pairs that lie within a site, the weighted mean of the sites' AUROCs.
        across: over the pairs of two sites; None with a single site.
        within_share: s, the share of pairs that lie within a site.
    """

    auroc: float
    low: float
    high: float
    within: float
    across: float | None
    within_share: float


def histogram(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> ScoreHistogram:
    """Count scores in [0, 1] by hundredth; `positive` [Q] says which are of the class."""
    ends = np.arange(1, BINS + 1)
    return ScoreHistogram(*(_count(scores[which], ends) for which in (positive, ~positive)))


def safe_histogram(
    scores: NDArray[np.float64],
    positive: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    minimum: int,
) -> ScoreHistogram | None:
    """A histogram without small cells, or none: neighbouring bins are joined until they are gone.

    Args:
        scores: In [0, 1], [Q].
        positive: Which of them are of the class [Q].
        patients: Whose images they are [Q].
        minimum: Fewest patients of a bin that is not empty.

    **Guarantees**, for every input:
        - Each count is 0, or is of the images of `minimum` patients or more.
        - None comes back if the positives or the negatives are of fewer patients in all.
        A bin may be empty: who knows an image and its score may then learn its label. The
        guarantee is for one histogram: several, of scores that differ little, may be compared.
    """
    sides = [_safe_bins(scores[which], patients[which], minimum) for which in (positive, ~positive)]
    return ScoreHistogram(sides[0], sides[1]) if sides[0] and sides[1] else None


def pooled_auroc(sites: Sequence[ScoreHistogram]) -> Pooled:
    """AUROC over the images of all sites, whose bins may differ.

    Args:
        sites: A histogram a site, each with positives and negatives, of one classifier's scores.
    """
    positives = np.stack([_spread(site.positives) for site in sites])  # [S, BINS]
    negatives = np.stack([_spread(site.negatives) for site in sites])
    right, pairs = _right_pairs(positives.sum(0), negatives.sum(0))
    own = [_right_pairs(p, n) for p, n in zip(positives, negatives, strict=True)]
    own_right, own_pairs = (sum(part) for part in zip(*own, strict=True))
    wins, losses = _certain_pairs(sites)
    return Pooled(
        auroc=right / pairs,
        low=wins / pairs,
        high=1 - losses / pairs,
        within=own_right / own_pairs,
        across=(right - own_right) / (pairs - own_pairs) if len(sites) > 1 else None,
        within_share=own_pairs / pairs,
    )


def weighted_mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """Mean of the sites' figures by their images.

    Of accuracies it is the accuracy over all images. Of AUROCs it is not the AUROC over all images.
    """
    return float(np.average(values, weights=counts))


def _safe_bins(
    scores: NDArray[np.float64], patients: NDArray[np.int64], minimum: int
) -> Bins | None:
    hundredths = _hundredths(scores)

    def may_leave(start: int, end: int) -> bool:
        there = len(np.unique(patients[(hundredths >= start) & (hundredths < end)]))
        return there == 0 or there >= minimum

    if len(np.unique(patients)) < minimum:
        return None
    ends = [0]
    for end in range(1, BINS + 1):
        if may_leave(ends[-1], end):
            ends.append(end)
    while ends[-1] != BINS:  # what is left over joins the bins before it
        if may_leave(ends[-1], BINS):
            ends.append(BINS)
        else:
            ends.pop()
    return _count(scores, np.array(ends[1:]))


def _count(scores: NDArray[np.float64], ends: Counts) -> Bins:
    numbers = np.searchsorted(ends, _hundredths(scores), side="right")
    return Bins(ends, np.bincount(numbers, minlength=len(ends)))


def _hundredths(scores: NDArray[np.float64]) -> Counts:
    """The finest bin of each score; it never falls as the score rises, so bounds are exact."""
    assert ((scores >= 0) & (scores <= 1)).all()
    return np.minimum((scores * BINS).astype(np.int64), BINS - 1)


def _spread(bins: Bins) -> NDArray[np.float64]:
    """Counts by hundredth [BINS], each bin's evenly over its hundredths."""
    widths = bins.ends - bins.starts
    return np.repeat(bins.counts / widths, widths)


def _right_pairs(
    positives: NDArray[np.float64], negatives: NDArray[np.float64]
) -> tuple[float, float]:
    """Pairs in the right order, ties half, and all pairs, from counts by hundredth [BINS]."""
    below = negatives.cumsum() - negatives / 2
    return float(positives @ below), float(positives.sum() * negatives.sum())


def _certain_pairs(sites: Sequence[ScoreHistogram]) -> tuple[float, float]:
    """Pairs in the right and in the wrong order wherever the scores lie in their bins."""
    starts, ends, counts = _joined([site.negatives for site in sites])
    below = np.bincount(ends, counts, BINS + 1).cumsum()  # [BINS + 1], in bins that end by then
    above = np.bincount(starts, counts, BINS + 1)[::-1].cumsum()[::-1]  # that start from there
    starts, ends, counts = _joined([site.positives for site in sites])
    return float(counts @ below[starts]), float(counts @ above[ends])


def _joined(sites: Sequence[Bins]) -> tuple[Counts, Counts, Counts]:
    """Starts, ends and counts of all sites' bins."""
    parts = zip(*((bins.starts, bins.ends, bins.counts) for bins in sites), strict=True)
    starts, ends, counts = (np.concatenate(part) for part in parts)
    return starts, ends, counts
