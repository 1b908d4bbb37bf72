from server.incidents import KINDS, incidents, plain_reason


def line(number, sites, **more):
    return {"round": number, "sites": sites, "alarms": [], "outliers": [], **more}


def test_the_same_in_rounds_in_a_row_is_one_incident_with_the_last_words():
    where = "site 'a', round {0}: student moved by {0}.5; update rejected"
    bad = [{"outcome": "rejected", "reason": where.format(r)} for r in (1, 2)]
    good = {"outcome": "admitted"}
    lines = [line(1, {"a": bad[0]}), line(2, {"a": bad[1]}), line(3, {"a": good})]
    (found,) = incidents(lines)
    assert (found.first, found.last, found.kind, found.site) == (1, 2, "rejected", "a")
    assert (found.rounds, found.words) == ("rounds 1 to 2", "student moved by 2.5")
    again = incidents([*lines, line(4, {"a": {"outcome": "absent", "reason": "not connected"}})])
    assert [i.rounds for i in again] == ["rounds 1 to 2", "round 4"]


def test_two_absences_with_a_good_round_between_are_two_incidents():
    away, here = {"outcome": "absent", "reason": "not connected"}, {"outcome": "admitted"}
    lines = [line(r, {"a": o}) for r, o in ((1, away), (2, here), (3, away), (4, away))]
    assert [i.rounds for i in incidents(lines)] == ["round 1", "rounds 3 to 4"]


def test_every_kind_is_told_in_time_order_with_its_site_and_words():
    sites = {
        "a": {"outcome": "silent", "reason": "no reply before the deadline"},
        "b": {"outcome": "error", "reason": "policy: no"},
        "c": {"outcome": "quarantined", "reason": "put there by the coordinator after round 1"},
        "d": {"outcome": "absent", "reason": "not connected"},
        "e": {"outcome": "rejected", "reason": "site 'e', round 1: a NaN; update rejected"},
        "f": {"outcome": "admitted", "scaled_by": 0.25},
        "g": {"outcome": "admitted", "asked": 2, "failures": ["it crashed"]},
    }
    outliers = [{"site": "f", "figure": "norm_ratio", "words": "site 'f': 12 times as long"}]
    alarms = ["site 'g': ct: collapse: embeddings are one point"]
    lines = [
        line(
            1, sites, outliers=outliers, alarms=alarms, refused_nodes=["gave no usable site name"]
        ),
        line(2, {"a": {"outcome": "rejected", "reason": "site 'a', round 2: x; update rejected"}}),
    ]
    found = [(i.first, i.kind, i.site, i.words) for i in incidents(lines)]
    assert found == [
        (1, "collapse", "g", "ct: collapse: embeddings are one point"),
        (1, "rejected", "e", "a NaN"),
        (1, "outlier", "f", "12 times as long; cut to 0.25 of its length"),
        (1, "quarantined", "c", "put there by the coordinator after round 1"),
        (1, "error", "b", "policy: no"),
        (1, "silent", "a", "no reply before the deadline"),
        (1, "absent", "d", "not connected"),
        (1, "asked again", "g", "it crashed"),
        (1, "refused", "", "gave no usable site name"),
        (2, "rejected", "a", "x"),
    ]
    assert {kind for _, kind, _, _ in found} == set(KINDS)


def test_a_reason_keeps_what_does_not_stand_beside_it():
    assert plain_reason("site 'a', round 3: bad; update rejected", "a", 3) == "bad"
    assert plain_reason("site 'b', round 3: bad", "a", 3) == "site 'b', round 3: bad"
