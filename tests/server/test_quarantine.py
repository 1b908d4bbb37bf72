"""Who is not asked any more, and how a site comes back."""

import json
import threading

import pytest

from core.checkpoint import read_json
from core.errors import UserError
from server.__main__ import main
from server.quarantine import manage, quarantined


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    return tmp_path


def history(*rounds):
    """Each round a word a site: g(ood), b(ad), l(ong), a(gainst), s(ilent), e(rror)."""
    names = {
        "g": "admitted",
        "l": "admitted",
        "a": "admitted",
        "b": "rejected",
        "s": "silent",
        "e": "error",
    }
    return [
        {
            "round": number,
            "sites": {
                site: {"outcome": names[word], "reason": f"site '{site}', round {number}: bad"}
                for site, word in sites.items()
            },
            "outliers": [
                {
                    "site": site,
                    "figure": {"l": "norm_ratio", "a": "cosine"}[word],
                    "words": f"site '{site}': odd",
                }
                for site, word in sites.items()
                if word in "la"
            ],
        }
        for number, sites in enumerate(rounds, start=1)
    ]


def words(text, site="x"):
    return history(*[{"a": "g", site: word} for word in text])


def write(run, lines):
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("", False), ("bb", False), ("bbb", True), ("blb", True), ("lll", True), ("aaaa", False),
        ("bba", False), ("bgbb", False),
        ("gbbb", True), ("bbgb", False), ("bsbeb", True), ("sss", False), ("eee", False),
        ("bbsg", False),
    ],
)  # fmt: skip
def test_so_many_bad_rounds_in_a_row_put_a_site_into_quarantine(run, text, held):
    assert list(quarantined(run, words(text), 3)) == (["x"] if held else [])
    assert (run / "quarantine.json").exists() == held


def test_the_reason_names_the_last_bad_round(run):
    assert quarantined(run, words("bbl"), 3) == {
        "x": "3 bad rounds in a row, the last: round 3: site 'x': odd"
    }


def test_zero_holds_nobody(run):
    assert quarantined(run, words("b" * 9), 0) == {}


def test_a_held_site_stays_held_while_it_is_not_asked(run):
    lines = words("bbb")
    quarantined(run, lines, 3)
    lines += [{**line, "round": 4 + i} for i, line in enumerate(words("g", site="b"))]
    lines[-1]["sites"]["x"] = {"outcome": "quarantined", "reason": ""}
    assert list(quarantined(run, lines, 3)) == ["x"]


def test_a_lost_file_or_a_lost_round_gives_the_same_sites_again(run):
    first = quarantined(run, words("bbb"), 3)
    (run / "quarantine.json").unlink()
    assert quarantined(run, words("bbb"), 3) == first
    assert quarantined(run, words("bb"), 3) == {}  # the last round's checkpoint was lost
    assert quarantined(run, words("bbb"), 3) == first


def test_a_released_site_starts_afresh(run):
    lines = write(run, words("bbb"))
    quarantined(run, lines, 3)
    assert manage(run, "x", release=True) == ["site 'x' is asked again from the next round on"]
    assert quarantined(run, lines, 3) == {}
    assert quarantined(run, words("bbbbb"), 3) == {}
    assert list(quarantined(run, words("bbbbbb"), 3)) == ["x"]


def test_a_coordinator_lists_adds_and_releases(run):
    write(run, words("g"))
    assert manage(run, None, release=False) == ["no site is in quarantine"]
    assert manage(run, "x", release=False) == ["site 'x' is not asked from the next round on"]
    assert quarantined(run, [], 0) == {"x": "put there by the coordinator after round 1"}
    assert manage(run, None, release=False) == ["x: put there by the coordinator after round 1"]
    manage(run, "x", release=True)
    assert quarantined(run, words("g"), 3) == {}
    assert read_json(run / "quarantine.json") == {"held": {}, "released": {"x": 1}}


def test_a_site_that_is_not_in_the_history_is_noted(run):
    note, _ = manage(run, "st-mary", release=False)
    assert note == "note: no site of that name is in the history (0 rounds done)"


def test_mistakes_are_told_in_plain_words(run, tmp_path):
    with pytest.raises(UserError, match=r"site 'x' is not in quarantine \(held: none\)"):
        manage(run, "x", release=True)
    with pytest.raises(UserError, match="cannot be a site's name"):
        manage(run, "../x", release=False)
    with pytest.raises(UserError, match="is not a run directory"):
        manage(tmp_path / "nowhere", None, release=False)


def test_server_and_command_take_turns(run):
    names = [f"s{i}" for i in range(24)]
    threads = [
        threading.Thread(target=manage, args=(run, name), kwargs={"release": False})
        for name in names
    ]
    threads += [threading.Thread(target=quarantined, args=(run, words("bbb"), 3))] * 1
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_json(run / "quarantine.json")["held"]) == {*names, "x"}


def test_the_command_shows_adds_and_releases(run, monkeypatch, capsys):
    write(run, words("g"))
    for arguments, shown in (
        ([], "no site is in quarantine"),
        (["x"], "site 'x' is not asked from the next round on"),
        ([], "x: put there by the coordinator after round 1"),
        (["x", "--release"], "site 'x' is asked again from the next round on"),
    ):
        monkeypatch.setattr("sys.argv", ["fedmermed-server", "quarantine", str(run), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert capsys.readouterr().out.strip() == shown
