import json
import sys

import numpy as np
import pytest

from client.__main__ import main
from client.audit import Audit
from client.chain import link, read

STUDY, OTHER = "ab" * 16, "cd" * 16


@pytest.fixture
def site(tmp_path):
    """A site's file; two studies have left five lines."""
    file = tmp_path / "site.toml"
    file.write_text("name = 'st-mary'\nshards = ['data']\n")
    state = tmp_path / "state"
    Audit(state, STUDY).write("in", "query", "accepted")
    arrays = {"student/w": np.zeros((500, 2), np.float32)}
    Audit(state, STUDY, 7).write("in", "train", "accepted for checking", arrays=arrays)
    Audit(state, OTHER, 2).write("in", "train", "accepted for checking")
    Audit(state, STUDY, 7).write("out", "train", "trained and sent", arrays=arrays)
    Audit(state, STUDY, 7).write("out", "train", "stored reply sent again", arrays=arrays)
    return file


@pytest.fixture
def audit(monkeypatch, capfd):
    """Runs `fedmermed-site audit`; gives exit status, output and errors."""
    monkeypatch.setattr("client.__main__.console.width", 140)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedmermed-site", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


def rows(output):
    return [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]


def test_a_whole_file_is_a_table_with_its_head_and_status_0(site, audit):
    status, output, errors = audit(site)
    assert (status, errors) == (0, "")
    _, _, third, _, fifth = rows(output)
    assert third[3:] == [OTHER[:8], "2", "in", "train", "0", "accepted", "for", "checking"]
    assert third[1].startswith("20")
    assert fifth[3:] == [
        STUDY[:8], "7", "out", "train", "4,000", "stored", "reply", "sent", "again",
    ]  # fmt: skip
    assert "whole: lines 1 to 5 follow from one another" in output
    assert f"head: {read(site.parent / 'state').head.sha256} after line 5" in output


def test_a_study_is_shown_alone_and_all_is_verified(site, audit):
    status, output, _ = audit(site, "--study", "cd")
    assert (status, [row[0] for row in rows(output)]) == (0, ["3"])
    assert "lines 1 to 5 follow" in output
    file = site.parent / "state" / "audit.jsonl"
    file.write_text(file.read_text().replace('"query"', '"tales"', 1))
    status, output, _ = audit(site, "--study", "cd")
    assert (status, [row[0] for row in rows(output)]) == (1, ["3"])
    assert "broken: line 2 does not follow from line 1" in output
    assert "head: " not in output


def test_json_holds_everything(site, audit):
    status, output, _ = audit(site, "--json", "--study", STUDY)
    said = json.loads(output)
    entries = said.pop("entries")
    assert [entry["line"] for entry in entries] == [1, 2, 4, 5]
    assert entries[1]["arrays"] == {"student/w": [500, 2]}
    assert status == 0
    assert said == {
        "site": "st-mary",
        "whole": True,
        "problem": "",
        "first_chained": 1,
        "last_line_cut_short": False,
        "lines": 5,
        "head": read(site.parent / "state").head.sha256,
    }


def test_json_of_a_broken_chain_ends_with_status_1(site, audit):
    file = site.parent / "state" / "audit.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:4]))
    status, output, _ = audit(site, "--json")
    said = json.loads(output)
    assert (status, said["whole"]) == (1, False)
    assert said["problem"].startswith("line 5 is missing")


def test_a_noted_head_is_in_the_line_after_it(site, audit):
    noted = read(site.parent / "state").head.sha256
    Audit(site.parent / "state").write("in", "query", "accepted")
    *_, last = (site.parent / "state" / "audit.jsonl").read_text().splitlines()
    assert json.loads(last)["previous"] == noted
    assert read(site.parent / "state").head.sha256 == link(noted, last.encode())


@pytest.mark.parametrize("text", [None, "nonsense = [", "name = 'a'\nshards = ['d']\n"])
def test_unusable_input_is_one_line_and_status_2(text, tmp_path, audit):
    file = tmp_path / "site.toml"
    if text:
        file.write_text(text)
    status, _, errors = audit(file)
    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_lines_of_an_older_version_are_named(site, audit):
    file = site.parent / "state" / "audit.jsonl"
    old = [json.loads(line) for line in file.read_text().splitlines()]
    for line in old:
        del line["previous"]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    (site.parent / "state" / "audit.head").unlink()
    status, output, _ = audit(site)
    assert (status, len(rows(output))) == (0, 5)
    assert "lines 1 to 5 are unchained, from an older version: a change in them is not" in output
    assert "whole" not in output
    Audit(site.parent / "state").write("in", "query", "accepted")
    status, output, _ = audit(site)
    assert status == 0
    assert "lines 1 to 5 are unchained" in output
    assert "a change made before line 6 was written is not found" in output
    assert "whole: lines 6 to 6" in output


def test_what_a_message_said_cannot_steer_the_terminal(site, audit):
    Audit(site.parent / "state", "\x1b[2J[red]").write("in", "query", "\x1b]0;x\x07[bold]\nwhole:")
    status, output, _ = audit(site)
    assert status == 0
    assert not set("\x1b\x07") & set(output)
    assert "[bold]" in output


def test_a_line_of_any_shape_can_be_shown(site, audit):
    odd = [b"", b"\xff\x00", b"[]", b"{}", b'{"bytes": [1], "round": {}, "time": 5, "study": null}']
    with open(site.parent / "state" / "audit.jsonl", "ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    status, output, _ = audit(site)
    assert status == 1
    assert output.count("not readable") == 4
