import numpy as np

from core.sampling import batch_share, draw


def test_one_pass_takes_every_image_once() -> None:
    taken = np.concatenate([draw(np.arange(10), s * 4, 4, 0, "site") for s in range(5)])
    assert sorted(taken[:10]) == list(range(10))
    assert sorted(taken[10:]) == list(range(10))


def test_passes_are_shuffled_anew_and_sites_apart() -> None:
    first, second = draw(np.arange(50), 0, 50, 0, "a"), draw(np.arange(50), 50, 50, 0, "a")
    assert first.tolist() != second.tolist()
    assert first.tolist() != draw(np.arange(50), 0, 50, 0, "b").tolist()


def test_a_small_pool_is_repeated_within_one_batch() -> None:
    assert np.bincount(draw(np.arange(3), 0, 12, 0)).tolist() == [4, 4, 4]


def test_a_batch_is_balanced_and_the_streams_have_no_gap() -> None:
    for batch_size in (7, 8, 11, 13):
        taken = [0, 0, 0]
        for step in range(20):
            shares = [batch_share(3, index, batch_size, step) for index in range(3)]
            assert [start for start, _ in shares] == taken
            assert sum(count for _, count in shares) == batch_size
            taken = [t + count for t, (_, count) in zip(taken, shares, strict=True)]
        assert max(taken) - min(taken) <= 1 + batch_size % 3
