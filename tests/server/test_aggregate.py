import numpy as np
import pytest

from core.schedules import ema_momentum
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.aggregate import aggregate, balanced_weights, rebuild_teacher, weighted_mean


def update(value, num_examples, centroids=None):
    counts = {m: np.full(len(c), 12, np.float32) for m, c in (centroids or {}).items()}
    return SiteUpdate(
        round_number=1,
        student={"w": np.full(3, value, np.float32)},
        teacher={"w": np.full(3, -value, np.float32)},
        prototypes=Prototypes(centroids or {}, counts),
        num_examples=num_examples,
        metrics={},
    )


@pytest.fixture
def state():
    zero = {"w": np.zeros(3, np.float32)}
    return GlobalState(student=zero, teacher=zero)


def test_each_modality_has_the_same_say():
    weights = balanced_weights({"a": {"ct": 30, "us": 10}, "b": {"ct": 90}, "c": {"us": 10}})
    # ct: a 30/120, b 90/120; us: a 10/20, c 10/20; mean of the two.
    assert weights == {"a": (0.25 + 0.5) / 2, "b": 0.75 / 2, "c": 0.5 / 2}
    assert sum(weights.values()) == 1


def test_a_site_alone_has_weight_one_whatever_it_holds():
    counts = {"ct": 7, "us": 3, "oct": 11, "cfp": 13, "cxr": 17, "pathology": 19, "dermatology": 23}
    assert balanced_weights({"a": counts}) == {"a": 1.0}


def test_the_mean_is_the_weighted_sum_and_float32():
    mean = weighted_mean(
        [{"w": np.array([1, 2], np.float32)}, {"w": np.array([5, -2], np.float32)}], [0.25, 0.75]
    )
    assert mean["w"].tolist() == [4.0, -1.0]
    assert mean["w"].dtype == np.float32


def test_one_group_of_weight_one_comes_back_bit_for_bit():
    array = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    array[:3] = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45]
    assert weighted_mean([{"w": array}], [1.0])["w"].tobytes() == array.tobytes()


def test_order_of_updates_changes_no_bit(recipe, state):
    rng = np.random.default_rng(1)
    updates = {
        name: update(float(rng.normal()), {"ct": int(rng.integers(5, 99))}, {"ct": np.eye(16)[:2]})
        for name in "abcde"
    }
    one = aggregate(recipe, state, {}, updates, round_number=1)
    backwards = {name: updates[name] for name in reversed(updates)}
    other = aggregate(recipe, state, {}, backwards, round_number=1)
    for array, again in zip(
        one[0].to_arrays().values(), other[0].to_arrays().values(), strict=True
    ):
        assert array.tobytes() == again.tobytes()
    assert one[2] == other[2]


def test_the_rebuilt_teacher_is_the_ema_of_a_student_that_stood_still(make_recipe):
    recipe = make_recipe(local_steps=3, rounds=4)
    teacher, student = {"w": np.array([1.0], np.float32)}, {"w": np.array([5.0], np.float32)}
    expected = 1.0
    for step in (6, 7, 8):
        momentum = ema_momentum(recipe, step)
        expected = momentum * expected + (1 - momentum) * 5.0
    rebuilt = rebuild_teacher(teacher, student, recipe, first_step=6)
    np.testing.assert_allclose(rebuilt["w"], [expected], rtol=1e-6)


def test_teachers_are_averaged_or_rebuilt_as_the_recipe_says(make_recipe, state):
    updates = {"a": update(1.0, {"ct": 10}), "b": update(3.0, {"ct": 10})}
    averaged, _, _ = aggregate(make_recipe(), state, {}, updates, round_number=1)
    assert averaged.student["w"].tolist() == [2.0] * 3
    assert averaged.teacher["w"].tolist() == [-2.0] * 3
    rebuilt, _, _ = aggregate(make_recipe(teacher="rebuild"), state, {}, updates, round_number=1)
    assert 0 < rebuilt.teacher["w"][0] < 2.0


def test_an_absent_site_keeps_its_prototypes_with_decay_until_they_fade(recipe, state):
    both = {
        "a": update(1.0, {"ct": 90}, {"ct": np.eye(16, dtype=np.float32)[:1]}),
        "b": update(1.0, {"ct": 90}, {"ct": np.eye(16, dtype=np.float32)[1:2]}),
    }
    new, kept, _ = aggregate(recipe, state, {}, both, round_number=1)
    assert new.prototypes.counts["ct"].sum() == 24
    new, kept, _ = aggregate(recipe, state, kept, {"a": both["a"]}, round_number=2)
    np.testing.assert_allclose(kept["b"].counts["ct"], [0.9 * 12], rtol=1e-6)
    np.testing.assert_allclose(new.prototypes.counts["ct"].sum(), 12 + 0.9 * 12, rtol=1e-6)
    for round_number in range(3, 26):  # 12 * .9^24 < 1
        new, kept, _ = aggregate(recipe, state, kept, {"a": both["a"]}, round_number=round_number)
    assert list(kept) == ["a"]
    assert new.prototypes.counts["ct"].tolist() == [12.0]


def test_a_site_that_sends_none_takes_its_old_prototypes_away(recipe, state):
    old = {"a": Prototypes({"ct": np.eye(16)[:1]}, {"ct": np.array([12.0])})}
    _, kept, _ = aggregate(recipe, state, old, {"a": update(1.0, {"ct": 5})}, round_number=1)
    assert kept == {}
