from server.summary import outlier_report


def line(number, outcome="admitted", words=()):
    return {
        "round": number,
        "sites": {
            "charite": {"outcome": "admitted"},
            "st-mary": {"outcome": outcome, "reason": f"site 'st-mary', round {number}: NaN"},
        },
        "outliers": [{"site": "st-mary", "words": text} for text in words],
    }


def test_sites_that_stood_out_are_named_with_how_often_and_the_last_reason():
    odd = ["site 'st-mary': too long", "site 'st-mary': against all"]
    lines = [line(1), line(2, words=odd), line(3, "rejected"), line(4, "silent")]
    assert outlier_report(lines) == [
        "site 'st-mary' was rejected or stood out in 2 of 4 rounds; the last time: site 'st-mary', "
        "round 3: NaN"
    ]
    assert outlier_report(lines[:2])[0].endswith("against all")
    assert outlier_report(lines[:1]) == []


def test_a_history_from_before_outliers_were_reported_has_none():
    old = {key: value for key, value in line(1).items() if key != "outliers"}
    assert outlier_report([old]) == []
