"""What the updates of a round say beside each other."""

import numpy as np
import pytest

from core.admission import update_norm
from core.checkpoint import sha256_arrays
from core.wire import GlobalState, Prototypes, SiteUpdate
from server.screening import COSINE_LIMIT, cosines, screen
from server.spool import Spool

SIZE = 400
COMMON = np.random.default_rng(7).normal(size=SIZE)
"""Where honest sites go."""


@pytest.fixture
def state():
    rng = np.random.default_rng(9)
    student = {n: rng.normal(size=SIZE // 2).astype(np.float32) for n in ("a", "b")}
    return GlobalState(student=student, teacher={})


def update(state, change, images=10):
    parts = dict(zip(("a", "b"), np.split(np.asarray(change), 2), strict=True))
    return SiteUpdate(
        round_number=1,
        student={n: (state.student[n] + parts[n]).astype(np.float32) for n in parts},
        teacher={},
        prototypes=Prototypes({}, {}),
        num_examples={"ct": images},
        metrics={},
    )


def honest(state, count=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: update(state, COMMON + 1.5 * rng.normal(size=SIZE), 10 + 3 * i)
        for i, name in enumerate("abcdefghij"[:count])
    }


def admitted(updates, state):
    return {
        site: {
            "outcome": "admitted",
            "digest": sha256_arrays(dict(one.student)),
            "update_norm": update_norm(one.student, state.student),
        }
        for site, one in updates.items()
    }


def judge(recipe, state, updates, lines=()):
    outcomes = admitted(updates, state)
    return screen(recipe, state, lines, updates, outcomes), outcomes


def test_honest_updates_are_handed_on_as_they_are_with_their_figures(recipe, state):
    updates = honest(state)
    screened, outcomes = judge(recipe, state, updates)
    assert screened.outliers == []
    assert all(screened.updates[site] is updates[site] for site in updates)
    for outcome in outcomes.values():
        assert set(outcome) == {"outcome", "digest", "update_norm", "norm_ratio", "cosine"}
        assert 0.7 < outcome["norm_ratio"] < 1.4
        assert 0.3 < outcome["cosine"] < 1


def test_cosines_are_those_with_the_mean_of_the_others(state, tmp_path):
    updates = honest(state)
    outcomes = admitted(updates, state)
    changes = {
        s: np.concatenate([u.student[n].astype(np.float64) - state.student[n] for n in "ab"])
        for s, u in updates.items()
    }
    images = {s: u.num_examples["ct"] for s, u in updates.items()}
    spool = Spool(tmp_path)
    spooled = {site: spool.put(one) for site, one in updates.items()}
    for given in (updates, spooled):
        found = cosines(given, outcomes, state.student, median=1e9)
        for site, own in changes.items():
            others = sum(images[s] * changes[s] for s in changes if s != site)
            expected = own @ others / np.linalg.norm(own) / np.linalg.norm(others)
            assert found[site] == pytest.approx(expected, rel=1e-6)


def against(rounds):
    """A history in which site x pulled against the others for so many rounds."""
    cosines = {"x": -0.3, "a": 0.2, "b": 0.3}
    sites = {site: {"outcome": "admitted", "cosine": value} for site, value in cosines.items()}
    return [{"sites": sites}] * rounds


def test_a_flipped_update_is_reported_and_a_long_one_turns_the_mean_against_nobody(recipe, state):
    updates = honest(state)
    for factor in (-1, -1000):
        updates["x"] = update(
            state, factor * (COMMON + 1.5 * np.random.default_rng(5).normal(size=SIZE))
        )
        screened, outcomes = judge(recipe, state, updates, against(2))
        figures = [o["figure"] for o in screened.outliers if o["site"] == "x"]
        assert figures == (["cosine"] if factor == -1 else ["norm_ratio", "cosine"])
        assert len(screened.outliers) == len(figures)
        assert outcomes["x"]["cosine"] < COSINE_LIMIT
        assert min(o["cosine"] for s, o in outcomes.items() if s != "x") > 0.2
    words = "site 'x': its update points against the other sites' in round after round: cosine -0."
    assert screened.outliers[1]["words"].startswith(words)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        against(1),
        [*against(1), {"sites": {"x": {"outcome": "admitted", "cosine": 0.1}}}],
        [*against(1), {"sites": {"x": {"outcome": "silent"}}}],
        [*against(1), {"sites": {}}],
    ],
)
def test_a_direction_is_not_reported_before_it_has_lasted(lines, recipe, state):
    updates = honest(state)
    updates["x"] = update(state, -COMMON)
    screened, outcomes = judge(recipe, state, updates, lines)
    assert outcomes["x"]["cosine"] < COSINE_LIMIT
    assert screened.outliers == []


def test_sites_that_all_pull_apart_are_not_called_odd(recipe, state):
    lines = []
    for number in range(1, 5):
        draws = np.random.default_rng(number).normal(size=(3, SIZE))
        changes = draws - draws.mean(0)
        updates = {s: update(state, c) for s, c in zip("abc", changes, strict=True)}
        screened, outcomes = judge(recipe, state, updates, lines)
        assert max(o["cosine"] for o in outcomes.values()) < COSINE_LIMIT
        assert screened.outliers == []
        lines.append({"round": number, "sites": outcomes})


@pytest.mark.parametrize(("common", "reported"), [(0.0, []), (0.15, []), (0.7, ["x"])])
def test_a_site_is_odd_only_where_the_others_pull_together(recipe, state, common, reported):
    rng = np.random.default_rng(3)
    changes = [common * COMMON + rng.normal(size=SIZE) for _ in range(5)]
    updates = {site: update(state, c) for site, c in zip("abcde", changes, strict=True)}
    updates["x"] = update(state, -np.mean(changes, axis=0))
    screened, outcomes = judge(recipe, state, updates, against(2))
    assert outcomes["x"]["cosine"] < COSINE_LIMIT
    assert [outlier["site"] for outlier in screened.outliers] == reported


def test_half_of_the_sites_and_more_are_not_called_odd_by_the_others(recipe, state):
    rng = np.random.default_rng(4)
    many = {site: update(state, -COMMON + rng.normal(size=SIZE)) for site in "abc"}
    heavy = {site: update(state, COMMON + rng.normal(size=SIZE), 1000) for site in "xy"}
    sites = {site: {"outcome": "admitted", "cosine": -0.3} for site in many}
    screened, outcomes = judge(recipe, state, many | heavy, [{"sites": sites}] * 2)
    assert max(outcomes[site]["cosine"] for site in many) < COSINE_LIMIT
    assert min(outcomes[site]["cosine"] for site in heavy) > -COSINE_LIMIT
    assert screened.outliers == []


def test_a_long_update_is_reported_and_cut_as_the_recipe_says(make_recipe, state):
    updates = honest(state) | {"x": update(state, 50 * COMMON)}
    screened, outcomes = judge(make_recipe(), state, updates)
    (outlier,) = screened.outliers
    assert outlier["words"].startswith("site 'x': its update is ")
    assert outlier["words"].endswith(" times as long as the median site's, more than 3")
    assert outlier["limit"] == 3
    assert outcomes["x"]["scaled_by"] == pytest.approx(3 / outcomes["x"]["norm_ratio"])
    plain, outcomes = judge(make_recipe(robust="none"), state, updates)
    assert plain.updates["x"] is updates["x"]
    assert "scaled_by" not in outcomes["x"]
    assert plain.outliers == screened.outliers


def test_of_two_sites_none_is_called_the_odd_one(recipe, state):
    updates = {"a": update(state, COMMON), "x": update(state, -50 * COMMON)}
    screened, outcomes = judge(recipe, state, updates)
    assert screened.outliers == []
    assert outcomes["x"]["scaled_by"] == pytest.approx(3 / 50, rel=1e-3)


def test_a_site_alone_has_no_cosine(recipe, state):
    screened, outcomes = judge(recipe, state, honest(state, 1))
    assert outcomes["a"]["cosine"] is None
    assert outcomes["a"]["norm_ratio"] == 1
    assert list(screened.updates) == ["a"]


def test_a_student_of_an_earlier_round_is_rejected_whoever_sent_it(recipe, state):
    updates = honest(state)
    _, before = judge(recipe, state, updates)
    lines = [{"round": 1, "sites": before}]
    replayed = honest(state, seed=1) | {"a": updates["a"], "x": updates["b"]}
    screened, outcomes = judge(recipe, state, replayed, lines)
    assert outcomes["a"] == {
        "outcome": "rejected",
        "reason": "site 'a', round 2: it sent the student that site 'a' sent in round 1; "
        "update rejected",
    }
    assert "that site 'b' sent in round 1" in outcomes["x"]["reason"]
    assert list(screened.updates) == ["b", "c", "d", "e"]


def test_all_senders_of_one_student_are_rejected_in_whatever_order_they_answered(recipe, state):
    updates = honest(state)
    found = []
    for names in ("abcdex", "xedcba"):
        given = {name: updates["b" if name == "x" else name] for name in names}
        screened, outcomes = judge(recipe, state, given)
        assert list(screened.updates) == ["a", "c", "d", "e"]
        found.append((outcomes["b"], outcomes["x"], screened.outliers, outcomes["a"]))
    assert found[0] == found[1]
    assert "it sent the same student as site 'b'; update rejected" in found[0][1]["reason"]


def test_sites_that_change_nothing_are_no_copies_of_each_other(recipe, state):
    still = np.zeros(SIZE)
    updates = honest(state) | {"x": update(state, still), "y": update(state, still)}
    screened, outcomes = judge(recipe, state, updates)
    assert len(screened.updates) == 7
    assert outcomes["x"]["cosine"] is None
    all_still = {name: update(state, still) for name in "abc"}
    screened, outcomes = judge(recipe, state, all_still)
    assert len(screened.updates) == 3
    assert outcomes["a"]["norm_ratio"] == 0.0
