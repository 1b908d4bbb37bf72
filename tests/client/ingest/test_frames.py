import itertools

from hypothesis import given
from hypothesis import strategies as st

from client.ingest.frames import pick_frames


def test_few_frames_are_all_taken() -> None:
    assert pick_frames(0, 16) == []
    assert pick_frames(1, 16) == [0]
    assert pick_frames(3, 3) == [0, 1, 2]


def test_many_frames_are_taken_from_the_middle_of_equal_parts() -> None:
    assert pick_frames(100, 1) == [50]
    assert pick_frames(100, 4) == [12, 37, 62, 87]
    assert pick_frames(5, 4) == [0, 1, 3, 4]


@given(count=st.integers(0, 2**40), most=st.integers(1, 200))
def test_chosen_frames_exist_are_distinct_and_evenly_spaced(count: int, most: int) -> None:
    frames = pick_frames(count, most)
    assert len(frames) == min(count, most)
    assert all(0 <= frame < count for frame in frames)
    gaps = {after - before for before, after in itertools.pairwise(frames)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert min(gaps, default=1) >= 1
