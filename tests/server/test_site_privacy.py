"""What the server releases under site privacy: sums of what sites sent, cut and noised."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from core.errors import UserError
from core.modalities import MODALITIES
from core.privacy.noise import PrivateRandom
from core.wire import GlobalState, Prototypes, SiteUpdate
from server import site_privacy
from server.aggregate import rebuild_teacher
from server.site_privacy import aggregate_privately, clipped_sums, public_centroids
from server.spool import Spool

DIM = 16
NONE = Prototypes({}, {})


class Silent(PrivateRandom):
    """Noise of length 0, so that what is noised can be seen."""

    def normal(self, count):
        return np.zeros(count)


def update(prototypes=NONE, images=10, **student):
    return SiteUpdate(
        round_number=1,
        student={name: np.asarray(array, np.float32) for name, array in student.items()},
        teacher={},
        prototypes=prototypes,
        num_examples={"ct": images},
        metrics={},
    )


def state_of(prototypes=NONE, **student):
    arrays = {name: np.asarray(array, np.float32) for name, array in student.items()}
    return GlobalState(student=arrays, teacher=arrays, prototypes=prototypes)


def rows_of(modality, rows, counts):
    units = np.asarray(rows, np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    return Prototypes(
        {modality: units.astype(np.float32)}, {modality: np.asarray(counts, np.float32)}
    )


def length(arrays):
    return math.sqrt(sum(float(np.square(a).sum()) for a in arrays.values()))


def test_updates_are_cut_over_all_weights_summed_and_divided_by_the_fixed_number(make_site_recipe):
    recipe = make_site_recipe(sites=4, clip_norm=1.0)
    state = state_of(a=[1.0, 1.0], b=[[2.0]])
    updates = {
        "long": update(a=[4.0, 1.0], b=[[6.0]]),  # changed by (3, 0, 4): length 5, cut to 1
        "short": update(a=[1.0, 1.3], b=[[2.4]]),  # by (0, .3, .4): length .5, as it is
    }
    new, weights = aggregate_privately(recipe, state, updates, round_number=1, random=Silent())
    np.testing.assert_allclose(new.student["a"], [1 + 0.6 / 4, 1 + 0.3 / 4], rtol=1e-6)
    np.testing.assert_allclose(new.student["b"], [[2 + (0.8 + 0.4) / 4]], rtol=1e-6)
    assert new.student["a"].dtype == np.float32
    assert weights == {"long": 0.25, "short": 0.25}


def adversarial():
    """Sets of changes that try to make one site count for more than the clip."""
    rng = np.random.default_rng(0)
    axis = np.eye(12)
    yield [1e6 * axis[0], -1e6 * axis[0], axis[1]]
    yield [1e6 * rng.normal(size=12) for _ in range(5)]
    yield [np.full(12, 1e15), np.full(12, -1e15), np.full(12, 1e-15)]
    yield [np.full(12, 0.7 / math.sqrt(12))] * 4  # all alike, at the clip
    yield [np.zeros(12), 1e6 * axis[11]]
    for scale in (1e-6, 0.3, 0.7, 1.0, 3.0):
        yield [scale * rng.normal(size=12) for _ in range(4)]


def cut_each_tensor(updates, sent, clip_norm):
    for name in sent:
        arrays = {site: u.student[name] for site, u in updates.items()}
        only = {site: update(**{name: array}) for site, array in arrays.items()}
        yield from clipped_sums(only, {name: sent[name]}, clip_norm)


def mean_of_who_is_there(updates, sent, clip_norm):
    for name, total in clipped_sums(updates, sent, 3 * clip_norm):
        yield name, total / len(updates)


def weighed_by_images(updates, sent, clip_norm):
    images = sum(u.num_examples["ct"] for u in updates.values())
    parts = [
        (u.num_examples["ct"] / images, dict(clipped_sums({s: u}, sent, clip_norm)))
        for s, u in updates.items()
    ]
    for name in sent:
        yield name, sum(3 * weight * part[name] for weight, part in parts)


def most_moved(sums):
    """How far removing one site moves the sums, at the most."""
    clip, most = 0.7, 0.0
    sent = {name: np.zeros(4, np.float32) for name in "abc"}
    for changes in adversarial():
        updates = {
            f"s{i}": update(images=10**i, **dict(zip("abc", change.reshape(3, 4), strict=True)))
            for i, change in enumerate(changes)
        }
        whole = dict(sums(updates, sent, clip))
        for site in updates:
            others = {s: u for s, u in updates.items() if s != site}
            left = dict(sums(others, sent, clip)) if others else dict.fromkeys(whole, 0.0)
            most = max(most, length({n: whole[n] - left[n] for n in whole}) / clip)
    return most


def test_one_site_moves_the_sum_by_the_clip_at_the_most_whatever_it_sends():
    assert 0.999 < most_moved(clipped_sums) <= 1.0001
    for broken in (cut_each_tensor, mean_of_who_is_there, weighed_by_images):
        assert most_moved(broken) > 1.05, broken


def test_neither_images_nor_other_sites_change_what_a_site_counts_for(make_site_recipe):
    recipe, state = make_site_recipe(sites=3), state_of(w=np.zeros(4))
    one = {"a": update(w=[0.5, 0, 0, 0]), "b": update(w=[0, 0.5, 0, 0])}
    other = {"b": update(images=7_000_000, w=[0, 0.5, 0, 0]), "a": one["a"], "c": update(w=[9] * 4)}
    first, _ = aggregate_privately(recipe, state, one, round_number=1, random=Silent())
    second, _ = aggregate_privately(recipe, state, other, round_number=1, random=Silent())
    difference = second.student["w"] - first.student["w"]  # what c added
    np.testing.assert_allclose(difference, np.full(4, 0.5 / 3), rtol=1e-5)


def test_the_order_of_the_sites_changes_no_bit(make_site_recipe):
    recipe, state, rng = (
        make_site_recipe(sites=5),
        state_of(w=np.ones(40)),
        np.random.default_rng(2),
    )
    updates = {
        name: update(rows_of("ct", rng.normal(size=(2, DIM)), [9, 9]), w=rng.normal(size=40))
        for name in "abcde"
    }
    backwards = {name: updates[name] for name in reversed(updates)}
    one, _ = aggregate_privately(recipe, state, updates, round_number=1, random=Silent())
    other, _ = aggregate_privately(recipe, state, backwards, round_number=1, random=Silent())
    first, second = one.to_arrays(), other.to_arrays()
    assert list(first) == list(second)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path, make_site_recipe):
    recipe = make_site_recipe(sites=20)
    state = state_of(**{f"w{i}": np.ones((8, 2048)) for i in range(40)})  # 2.6 MB

    def peak(count):
        with Spool(tmp_path) as spool:
            updates = {f"s{i:02d}": spool.put(update(**state.student)) for i in range(count)}
            tracemalloc.start()
            try:
                aggregate_privately(recipe, state, updates, round_number=1, random=PrivateRandom())
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    few, many = peak(2), peak(20)
    assert many - few < 0.1 * 40 * 8 * 2048 * 4  # 18 more updates in memory would be 18


def test_every_number_has_noise_of_its_own_of_the_stated_deviation(make_site_recipe, monkeypatch):
    monkeypatch.setattr(site_privacy, "CHUNK_NUMBERS", 7)  # parts that end within arrays
    recipe = make_site_recipe(sites=3, noise_multiplier=2.0, clip_norm=0.5)
    state = state_of(a=np.zeros((40, 50)), b=np.zeros(3001), c=np.float32(0.0))
    still = {"a": update(**state.student)}
    draws = []
    for _ in range(2):
        new, _ = aggregate_privately(recipe, state, still, round_number=1, random=PrivateRandom())
        draws.append(np.concatenate([new.student[n].reshape(-1) for n in "abc"]) * 3 / (2.0 * 0.5))
    assert stats.kstest(draws[0], "norm").pvalue > 1e-6
    assert abs(draws[0].std() - 1) < 0.05
    assert len(np.unique(draws)) > 0.99 * 2 * 5002  # float32 has some twice
    for lag in (1, 7, 2000):
        assert abs(np.corrcoef(draws[0][:-lag], draws[0][lag:])[0, 1]) < 0.07


def test_a_site_that_is_away_counts_as_one_that_changed_nothing(make_site_recipe):
    recipe, state = make_site_recipe(sites=3), state_of(w=np.ones(2))
    moved, still = update(w=[1.6, 1.0]), update(w=[1.0, 1.0])
    alone, _ = aggregate_privately(recipe, state, {"a": moved}, round_number=1, random=Silent())
    both, _ = aggregate_privately(
        recipe, state, {"a": moved, "b": still, "c": still}, round_number=1, random=Silent()
    )
    assert alone.student["w"].tobytes() == both.student["w"].tobytes()
    np.testing.assert_allclose(alone.student["w"], [1.2, 1.0], rtol=1e-6)


def test_more_sites_than_the_recipe_divides_by_end_the_round(make_site_recipe):
    recipe, state = make_site_recipe(sites=3), state_of(w=np.ones(2))
    updates = dict.fromkeys("abcd", update(w=[1.0, 1.0]))
    with pytest.raises(UserError, match=r"round 5: 4 sites take part, but .*privacy.sites = 3"):
        aggregate_privately(recipe, state, updates, round_number=5, random=Silent())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_ends_the_round_instead_of_passing_the_cut(
    make_site_recipe, value
):
    recipe, state = make_site_recipe(sites=3), state_of(w=np.ones(2))
    updates = {"a": update(w=[1.0, 1.0]), "bad": update(w=[1.0, value])}
    with pytest.raises(UserError, match="site 'bad': its update is not finite; nothing was"):
        aggregate_privately(recipe, state, updates, round_number=1, random=Silent())


def test_the_teacher_follows_from_the_noised_student_alone(make_site_recipe):
    recipe, state = make_site_recipe(sites=3), state_of(w=np.ones(5))
    new, _ = aggregate_privately(
        recipe, state, {"a": update(w=np.full(5, 9.0))}, round_number=2, random=PrivateRandom()
    )
    expected = rebuild_teacher(state.teacher, new.student, recipe, 2)
    assert new.teacher["w"].tobytes() == expected["w"].tobytes()


def test_rows_are_assigned_to_what_anybody_may_know(make_site_recipe):
    recipe = make_site_recipe()
    first = public_centroids(recipe, NONE)
    assert list(first) == list(MODALITIES)
    assert all(rows.shape == (3, DIM) for rows in first.values())
    np.testing.assert_allclose(np.linalg.norm(first["ct"], axis=1), 1)
    released = rows_of("ct", np.eye(DIM)[:2], [5, 5])
    later = public_centroids(recipe, released)
    assert (later["ct"][:2] == np.eye(DIM)[:2]).all()
    assert (later["ct"][2] == first["ct"][2]).all()
    assert (later["us"] == first["us"]).all()


def test_with_little_noise_prototypes_come_near_those_of_the_sites(make_site_recipe):
    recipe = make_site_recipe(sites=40, prototype_noise=0.05)
    direction = np.eye(DIM)[:1]
    updates = {f"s{i:02d}": update(rows_of("ct", direction, [12]), w=[0.0]) for i in range(40)}
    new, _ = aggregate_privately(
        recipe, state_of(w=[0.0]), updates, round_number=1, random=PrivateRandom()
    )
    assert list(new.prototypes.counts) == ["ct"]
    assert new.prototypes.centroids["ct"].shape == (1, DIM)
    assert new.prototypes.centroids["ct"][0, 0] > 0.999
    assert new.prototypes.centroids["ct"][0, 0] != 1  # noised
    assert abs(new.prototypes.counts["ct"][0] - 40) < 1
    assert new.prototypes.counts["ct"][0] != 40


def test_a_site_weighs_one_however_many_rows_and_patients_it_claims(make_site_recipe):
    recipe = make_site_recipe(sites=41, prototype_noise=0.01)
    modest = rows_of("ct", np.eye(DIM)[:1], [12])
    rows = np.tile(np.eye(DIM, dtype=np.float32)[:1], (3, 1))
    greedy = Prototypes(
        dict.fromkeys(MODALITIES, rows), dict.fromkeys(MODALITIES, np.float32([1e9] * 3))
    )
    updates = {f"s{i:02d}": update(modest, w=[0.0]) for i in range(40)}
    updates["greedy"] = update(greedy, w=[0.0])
    new, _ = aggregate_privately(
        recipe, state_of(w=[0.0]), updates, round_number=1, random=Silent()
    )
    np.testing.assert_allclose(new.prototypes.counts["ct"], [40 + 1 / 7], rtol=1e-6)
    np.testing.assert_allclose(new.prototypes.counts["us"], [1 / 7], rtol=1e-6)


def test_prototypes_that_the_noise_drowns_are_not_released(make_site_recipe):
    recipe = make_site_recipe(prototype_noise=10.0)
    updates = {"a": update(rows_of("ct", np.eye(DIM)[:1], [12]), w=[0.0])}
    old = rows_of("us", np.eye(DIM)[:1], [30])
    new, _ = aggregate_privately(
        recipe, state_of(old, w=[0.0]), updates, round_number=1, random=PrivateRandom()
    )
    assert "ct" not in new.prototypes.counts


def test_a_recipe_without_prototypes_draws_no_noise_for_them(make_site_recipe):
    recipe = make_site_recipe({"prototypes_per_modality": 0}, prototype_noise=1e-9)
    updates = {"a": update(rows_of("ct", np.eye(DIM)[:1], [12]), w=[0.0])}
    new, _ = aggregate_privately(
        recipe, state_of(w=[0.0]), updates, round_number=1, random=PrivateRandom()
    )
    assert new.prototypes == NONE
