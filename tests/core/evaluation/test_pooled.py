import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from core.evaluation.pooled import (
    BINS,
    Bins,
    ScoreHistogram,
    histogram,
    pooled_auroc,
    safe_histogram,
    weighted_mean,
)


def site(number, images=400, shift=0.0, share=0.3):
    """Scores, which are positive, and whose images they are; three images a patient."""
    generator = np.random.default_rng(number)
    positive = generator.random(images) < share
    scores = 1 / (1 + np.exp(-(generator.normal(size=images) + 1.5 * positive + shift)))
    return scores, positive, np.arange(images) // 3


def pool(sites):
    return np.concatenate([s[0] for s in sites]), np.concatenate([s[1] for s in sites])


SHIFTS = {"alike": (0, 0, 0), "apart": (-2, 0, 2), "alone": (0,)}


@pytest.mark.parametrize("shifts", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("minimum", [None, 2, 10, 30])
def test_the_pooled_auroc_is_sklearns_within_its_bounds(shifts, minimum):
    sites = [site(i, shift=s, share=0.2 + 0.2 * i) for i, s in enumerate(shifts)]
    histograms = [
        histogram(*s[:2]) if minimum is None else safe_histogram(*s, minimum=minimum) for s in sites
    ]
    scores, positive = pool(sites)
    pooled, expected = pooled_auroc(histograms), roc_auc_score(positive, scores)
    assert pooled.low <= expected <= pooled.high
    assert pooled.low <= pooled.auroc <= pooled.high
    if minimum is None:
        assert pooled.auroc == pytest.approx((pooled.low + pooled.high) / 2)
        assert pooled.high - pooled.low < 0.03
        assert pooled.auroc == pytest.approx(expected, abs=1e-3)


def test_the_bound_is_half_the_pairs_that_share_a_bin():
    scores = np.array([0.001, 0.002, 0.5, 0.503, 0.507, 0.9])
    positive = np.array([False, True, False, True, True, True])
    pooled = pooled_auroc([histogram(scores, positive)])
    shared = (1 + 2) / (4 * 2)  # one pair in the first hundredth, two in the one from .50
    assert pooled.high - pooled.low == pytest.approx(shared)
    assert pooled.low == pytest.approx((1 - 1 + 1 + 1 + 2) / 8)  # .5x beats .001 twice, .9 both


def bins(*rows):
    return Bins.from_array(np.array(rows))


def test_a_wide_bin_counts_as_evenly_filled():
    wide = ScoreHistogram(positives=bins([100, 3]), negatives=bins([100, 1]))
    narrow = ScoreHistogram(bins([10, 0], [100, 1]), bins([10, 5], [100, 0]))
    pooled = pooled_auroc([wide, narrow])
    # Within: 1/2 of 3 pairs, all of 5. The wide positives beat .00-.10 with probability .95;
    # the positive in .10-1.00 beats an even negative with probability .1 + .9 / 2.
    assert pooled.within == pytest.approx((3 / 2 + 5) / 8)
    assert pooled.across == pytest.approx((15 * 0.95 + 1 * 0.55) / 16)
    assert (pooled.low, pooled.high) == (5 / 24, 1)


def test_equal_scores_count_half_as_in_sklearn():
    scores, positive = np.array([0.3, 0.3, 0.3, 0.8]), np.array([True, False, False, True])
    assert pooled_auroc([histogram(scores, positive)]).auroc == roc_auc_score(positive, scores)


def test_two_perfect_sites_may_be_far_from_perfect_together():
    low = np.repeat([0.25, 0.15], [90, 10]), np.repeat([True, False], [90, 10])
    high = np.repeat([0.95, 0.85], [10, 90]), np.repeat([True, False], [10, 90])
    aurocs = [pooled_auroc([histogram(*s)]).auroc for s in (low, high)]
    assert aurocs == [1, 1]
    assert weighted_mean(aurocs, [100, 100]) == 1
    pooled = pooled_auroc([histogram(*low), histogram(*high)])
    # 90 * 90 of 100 * 100 pairs set a positive of one site below a negative of the other.
    assert pooled.auroc == pytest.approx(0.19)
    assert roc_auc_score(*pool([low, high])[::-1]) == pytest.approx(0.19)
    assert pooled.within == 1
    assert pooled.across == pytest.approx(10 * 10 / (90 * 90 + 10 * 10))
    assert pooled.within_share == pytest.approx((90 * 10 + 10 * 90) / 100**2)


def test_within_and_across_make_up_the_pooled_figure():
    sites = [site(i, images=100 * (i + 1), shift=i) for i in range(4)]
    pooled = pooled_auroc([histogram(*s[:2]) for s in sites])
    share = pooled.within_share
    assert pooled.across is not None
    assert share * pooled.within + (1 - share) * pooled.across == pytest.approx(pooled.auroc)
    pairs = [int(s[1].sum()) * int((~s[1]).sum()) for s in sites]
    own = [pooled_auroc([histogram(*s[:2])]).auroc for s in sites]
    assert pooled.within == pytest.approx(weighted_mean(own, pairs))


def test_the_order_of_sites_is_irrelevant():
    histograms = [safe_histogram(*site(i, shift=i), minimum=10) for i in range(4)]
    assert pooled_auroc(histograms).auroc == pytest.approx(pooled_auroc(histograms[::-1]).auroc)


def test_the_weighted_mean_of_accuracies_is_the_accuracy_over_all_images():
    assert weighted_mean([0.5, 1.0], [30, 10]) == pytest.approx((15 + 10) / 40)


@pytest.mark.parametrize("minimum", [1, 2, 10, 25])
@pytest.mark.parametrize("number", range(8))
def test_no_count_is_of_fewer_patients_than_the_minimum(minimum, number):
    scores, positive, patients = site(number, images=150 + 40 * number, share=0.5)
    found = safe_histogram(scores, positive, patients, minimum=minimum)
    assert found is not None
    for which, side in ((positive, found.positives), (~positive, found.negatives)):
        assert side.counts.sum() == which.sum()
        for start, end, count in zip(side.starts, side.ends, side.counts, strict=True):
            inside = (scores >= start / BINS) & ((scores < end / BINS) | (end == BINS)) & which
            assert count == inside.sum()
            assert count == 0 or len(np.unique(patients[inside])) >= minimum


def test_many_images_of_one_patient_are_a_small_cell():
    scores = np.repeat([0.1, 0.2, 0.9], [20, 20, 20])
    positive = np.repeat([False, True, True], [20, 20, 20])
    patients = np.concatenate([np.arange(40), np.full(20, 40)])  # the last twenty are one person's
    found = safe_histogram(scores, positive, patients, minimum=10)
    assert found is not None
    assert found.positives.counts.max() == 40  # joined with the bin of the others


def test_too_few_patients_on_either_side_send_nothing():
    scores, positive = np.linspace(0, 1, 100), np.arange(100) >= 91
    for which in (positive, ~positive):
        assert safe_histogram(scores, which, np.arange(100), minimum=10) is None
    assert safe_histogram(scores, np.arange(100) >= 90, np.arange(100), minimum=10) is not None


def test_scores_of_zero_and_one_fall_into_the_outer_bins():
    found = histogram(np.array([0.0, 1.0]), np.array([False, True]))
    assert found.negatives.counts[0] == found.positives.counts[-1] == 1


def test_bins_survive_the_wire():
    found = safe_histogram(*site(1), minimum=10).positives
    again = Bins.from_array(found.to_array())
    assert np.array_equal(again.ends, found.ends)
    assert np.array_equal(again.counts, found.counts)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones((0, 2), np.int64), "has shape"),
        (np.ones((4, 3), np.int64), "has shape"),
        (np.array([[100, 1.0]]), "has dtype float64"),
        (np.array([[50, 1]]), "do not rise to 100"),
        (np.array([[60, 1], [60, 1], [100, 1]]), "do not rise"),
        (np.array([[0, 1], [100, 1]]), "do not rise"),
        (np.array([[50, -1], [100, 5]]), "negative counts"),
        (np.array([[50, 0], [100, 0]]), "or none"),
    ],
)
def test_rows_that_are_no_bins_are_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        Bins.from_array(rows)
