"""Guarantees of robust aggregation, on arrays whose means are known."""

import itertools

import numpy as np
import pytest

from core.admission import update_norm
from core.errors import UserError
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.aggregate import aggregate, weighted_mean
from server.robust import bound_updates, cap_prototypes, trimmed_mean
from server.spool import Spool

SHAPES = {"a": (3, 5), "b": (7,), "c": ()}


def arrays(rng, size=1.0):
    return {name: np.asarray(rng.normal(0, size, s), np.float32) for name, s in SHAPES.items()}


@pytest.fixture
def state():
    rng = np.random.default_rng(9)
    return GlobalState(student=arrays(rng), teacher=arrays(rng))


def update(state, rng, length=1.0, teacher_length=None):
    """An update whose student and teacher moved by these lengths."""

    def moved(start, distance):
        change = arrays(rng)
        size = update_norm(change, {n: np.zeros_like(a) for n, a in change.items()})
        scale = np.float32(distance / size)
        return {n: np.asarray(start[n] + scale * change[n], np.float32) for n in start}

    return SiteUpdate(
        round_number=1,
        student=moved(state.student, length),
        teacher=moved(state.teacher, length if teacher_length is None else teacher_length),
        prototypes=Prototypes({}, {}),
        num_examples={"ct": 10},
        metrics={},
    )


def outcomes(updates, state):
    return {
        site: {
            "update_norm": update_norm(one.student, state.student),
            "teacher_norm": update_norm(one.teacher, state.teacher),
        }
        for site, one in updates.items()
    }


def test_updates_within_the_bound_keep_every_bit(state):
    rng = np.random.default_rng(0)
    updates = {name: update(state, rng, 1 + 0.1 * i) for i, name in enumerate("abcde")}
    left, factors = bound_updates(updates, outcomes(updates, state), state, 3.0)
    assert factors == {}
    assert all(left[site] is updates[site] for site in updates)


def test_one_site_alone_is_never_cut(state):
    updates = {"a": update(state, np.random.default_rng(0), 1e6)}
    left, factors = bound_updates(updates, outcomes(updates, state), state, 1.0)
    assert factors == {}
    assert left["a"] is updates["a"]


@pytest.mark.parametrize(("student", "teacher"), [(100, 100), (100, 1), (1, 100), (1e30, 1)])
def test_what_is_longer_is_cut_to_the_bound_in_its_own_direction(state, student, teacher):
    rng = np.random.default_rng(0)
    updates = {name: update(state, rng) for name in "abcd"} | {
        "x": update(state, rng, student, teacher)
    }
    left, factors = bound_updates(updates, outcomes(updates, state), state, 3.0)
    assert list(factors) == ["x"]
    assert factors["x"] == pytest.approx(3 / max(student, teacher), rel=1e-3)
    norms = outcomes(left, state)["x"]
    assert max(norms.values()) == pytest.approx(3, rel=1e-3)
    whole = np.float64(updates["x"].student["b"]) - state.student["b"]
    cut = left["x"].student["b"] - state.student["b"]
    np.testing.assert_allclose(cut, factors["x"] * whole, atol=1e-5)


def test_the_bound_lies_among_the_honest_whatever_fewer_than_half_send(state):
    rng = np.random.default_rng(0)
    honest = {name: update(state, rng, 1 + 0.1 * i) for i, name in enumerate("abc")}
    for lengths in itertools.product([0, 1e-9, 1, 1e9], repeat=2):
        hostile = {f"x{i}": update(state, rng, length) for i, length in enumerate(lengths)}
        updates = honest | hostile
        left, factors = bound_updates(updates, outcomes(updates, state), state, 3)
        norms = outcomes(left, state)
        assert all(norms[site]["update_norm"] <= 3 * 1.2 * 1.001 for site in hostile)
        assert set(factors) <= set(hostile)


def test_a_trimmed_mean_of_equal_weights_is_the_mean_of_the_middle():
    values = [5.0, -1e30, 1.0, 3.0, 1e30]
    groups = [{"w": np.full((2, 2), value, np.float32)} for value in values]
    assert trimmed_mean(groups, [0.2] * 5)["w"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_what_is_left_keeps_its_weights():
    groups = [{"w": np.array([value], np.float32)} for value in (0, 1, 2, 4, 9)]
    # 0 and 9 go; (.1 * 1 + .2 * 2 + .1 * 4) / .4
    assert trimmed_mean(groups, [0.5, 0.1, 0.2, 0.1, 0.1])["w"][0] == pytest.approx(2.25)


def test_every_number_is_trimmed_by_itself_whatever_the_size_of_a_chunk(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    groups = [arrays(rng) for _ in range(11)]
    weights = rng.dirichlet(np.ones(11))
    expected = {}
    for name in SHAPES:
        stacked = np.stack([g[name] for g in groups]).reshape(11, -1).astype(np.float64)
        rows = []
        for column in stacked.T:
            kept = np.argsort(column)[2:-2]
            rows.append((weights[kept] * column[kept]).sum() / weights[kept].sum())
        expected[name] = np.array(rows).reshape(SHAPES[name])
    spool = Spool(tmp_path)
    state = GlobalState(student={}, teacher={})
    on_disk = [
        spool.put(SiteUpdate(round_number=1, student=g, teacher={}, prototypes=state.prototypes,
                             num_examples={}, metrics={})).student
        for g in groups
    ]  # fmt: skip
    for chunk in (1, 40, 10**6):
        monkeypatch.setattr("server.robust.CHUNK_NUMBERS", chunk)
        for given in (groups, on_disk):
            mean = trimmed_mean(given, list(weights))
            for name in SHAPES:
                assert mean[name].dtype == np.float32
                np.testing.assert_allclose(mean[name], expected[name], rtol=1e-5, atol=1e-7)


def test_hostile_numbers_leave_every_weight_in_the_range_of_the_honest():
    rng = np.random.default_rng(0)
    honest = [arrays(rng) for _ in range(8)]
    for size in (0, 1e-3, 1e30):
        hostile = [arrays(rng, size) for _ in range(2)]
        mean = trimmed_mean([*honest, *hostile], [0.01] * 8 + [0.46] * 2)
        for name in SHAPES:
            stacked = np.stack([h[name] for h in honest])
            assert (stacked.min(0) <= mean[name]).all()
            assert (mean[name] <= stacked.max(0)).all()


def test_order_of_sites_changes_no_bit_of_a_trimmed_mean(make_recipe, state):
    recipe, rng = make_recipe(robust="trimmed_mean", min_sites=5), np.random.default_rng(1)
    updates = {name: update(state, rng) for name in "abcdef"}
    backwards = {name: updates[name] for name in reversed(updates)}
    one, other = (
        aggregate(recipe, state, {}, u, round_number=1)[0].student for u in (updates, backwards)
    )
    plain = weighted_mean([u.student for u in updates.values()], [1 / 6] * 6)
    assert any(one[name].tobytes() != plain[name].tobytes() for name in SHAPES)
    for name in SHAPES:
        assert one[name].tobytes() == other[name].tobytes()


def test_a_recipe_with_too_few_sites_to_trim_is_refused(make_recipe):
    with pytest.raises(UserError, match="raise 'min_sites' to 5 at the least"):
        make_recipe(robust="trimmed_mean", min_sites=4)


def prototypes(rows, counts):
    return Prototypes({"ct": rows}, {"ct": np.asarray(counts, np.float32)})


def test_counts_of_a_site_weigh_at_most_so_many_times_the_median_sites():
    rows = np.eye(4, dtype=np.float32)
    given = {
        "a": prototypes(rows[:2], [10, 10]), "b": prototypes(rows[:1], [30]),
        "x": prototypes(rows, [200, 100, 50, 50]),
    }  # fmt: skip
    capped = cap_prototypes(given, 3.0)
    assert capped["x"].counts["ct"].tolist() == [45.0, 22.5, 11.25, 11.25]
    for site in "ab":
        assert capped[site].counts["ct"] is given[site].counts["ct"]


def test_near_copies_of_one_direction_do_not_fill_the_merged_prototypes(make_recipe, state):
    recipe, rng = make_recipe(prototypes_per_modality=8), np.random.default_rng(0)

    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1)[:, None]).astype(np.float32)

    def sending(rows):
        counts = np.full(len(rows), 3.0, np.float32)
        one = update(state, rng)
        return SiteUpdate(**{**vars(one), "prototypes": Prototypes({"ct": rows}, {"ct": counts})})

    honest = {name: sending(unit(rng.normal(size=(4, 16)))) for name in "ab"}
    direction = rng.normal(size=16)
    flood = sending(unit(direction + 1e-3 * rng.normal(size=(8, 16))))
    new, _, _ = aggregate(recipe, state, {}, honest | {"x": flood}, round_number=1)
    near = new.prototypes.centroids["ct"] @ (direction / np.linalg.norm(direction))
    assert (near > 0.99).sum() == 1
    assert len(near) == 8
