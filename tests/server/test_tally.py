"""The history in few numbers: grown, damaged, written anew."""

import json

import pytest

from core.checkpoint import write_atomically
from server.tally import Tally


def line(number, **sites):
    outcomes = {name: {"outcome": what, "reason": f"why {number}"} for name, what in sites.items()}
    return {
        "round": number, "sites": outcomes, "metrics": {"loss/ct": number / 2}, "alarms": [],
        "outliers": [], "refused_nodes": [], "seconds": {"exchange": 2.0, "admit": 1},
        "bytes_up": 10, "bytes_down": 20,
    }  # fmt: skip


def write(run, lines, end=""):
    text = "".join(json.dumps(one) + "\n" for one in lines) + end
    write_atomically(run / "history.jsonl", text.encode())


def facts(tally):
    return {name: value for name, value in vars(tally).items() if name not in ("_inode",)}


@pytest.fixture
def lines():
    return [
        line(1, a="admitted", b="silent"),
        line(2, a="rejected", b="absent"),
        line(3, a="admitted", b="error", c="quarantined"),
    ]


def test_without_a_history_there_are_no_rounds(tmp_path):
    tally = Tally(tmp_path)
    tally.read()
    assert (tally.rounds, tally.sites, tally.damaged) == (0, {}, False)


def test_outcomes_are_counted_by_site(tmp_path, lines):
    write(tmp_path, lines)
    tally = Tally(tmp_path)
    tally.read()
    a, b = tally.sites["a"], tally.sites["b"]
    assert a.rounds == {"admitted": 2, "rejected": 1}
    assert (a.last_admitted, a.outcome, a.rejected_reason) == (3, "admitted", "why 2")
    assert b.rounds == {"silent": 1, "absent": 1, "error": 1}
    assert (b.last_admitted, b.outcome, b.reason) == (0, "error", "why 3")
    assert tally.sites["c"].rounds == {"quarantined": 1}
    assert tally.series == {"ct": {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}}
    assert (tally.seconds, tally.bytes_up, tally.bytes_down) == ([3.0] * 3, 30, 60)


def test_read_byte_by_byte_it_comes_to_the_same(tmp_path, lines):
    write(tmp_path, lines)
    whole, grown = Tally(tmp_path), Tally(tmp_path)
    whole.read()
    data = (tmp_path / "history.jsonl").read_bytes()
    (tmp_path / "history.jsonl").unlink()
    with open(tmp_path / "history.jsonl", "ab", buffering=0) as file:
        for byte in data:
            file.write(bytes([byte]))
            grown.read()
    assert facts(grown) == facts(whole)


def test_half_a_line_does_not_count_until_it_is_whole(tmp_path, lines):
    half = json.dumps(lines[1])
    write(tmp_path, lines[:1], half[:40])
    tally = Tally(tmp_path)
    tally.read()
    assert (tally.rounds, tally.damaged) == (1, False)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write(half[40:] + "\n")
    tally.read()
    assert tally.rounds == 2


@pytest.mark.parametrize("bad", ["{", "[]", "null", '{"round": 7}', "\x00\x1b", "[" * 100_000])
def test_a_damaged_line_ends_what_counts_and_is_told(tmp_path, lines, bad):
    write(tmp_path, lines[:1], f"{bad}\n{json.dumps(lines[1])}\n")
    tally = Tally(tmp_path)
    for _ in range(2):
        tally.read()
        assert (tally.rounds, tally.damaged) == (1, True)
    write(tmp_path, lines)  # as a server does that resumes
    tally.read()
    assert (tally.rounds, tally.damaged) == (3, False)


def test_a_history_that_lost_its_last_rounds_is_read_anew(tmp_path, lines):
    write(tmp_path, lines)
    tally = Tally(tmp_path)
    tally.read()
    write(tmp_path, lines[:1])
    tally.read()
    assert (tally.rounds, tally.bytes_up, set(tally.sites)) == (1, 10, {"a", "b"})


@pytest.mark.parametrize("odd", [None, 3, "x", [], {"a": 1}, {"a": None}, True])
def test_fields_of_another_kind_are_passed_over(tmp_path, lines, odd):
    names = ("sites", "metrics", "seconds", "bytes_up", "alarms", "outliers", "refused_nodes")
    write(tmp_path, [{**lines[0], **dict.fromkeys(names, odd)}])
    tally = Tally(tmp_path)
    tally.read()
    assert tally.rounds == 1


def test_a_history_that_was_cut_in_place_is_read_anew(tmp_path, lines):
    write(tmp_path, lines)
    tally = Tally(tmp_path)
    tally.read()
    first = json.dumps(lines[0]) + "\n"
    with open(tmp_path / "history.jsonl", "r+") as file:
        file.truncate(len(first))
    tally.read()
    assert tally.rounds == 1
