"""RUN/live.json: what the server says of itself while it works, and what a reader makes of it."""

import json
import time

import pytest

from server import live
from server.live import Live, read_live


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(live, "WRITE_SECONDS", 0.0)


def test_a_kill_at_any_instant_leaves_a_whole_file(tmp_path, kill_points):
    def write():
        for number in range(3):
            now = Live(tmp_path, 9)
            now.begin_round(number + 1)
            now.phase("training", seconds=60)

    Live(tmp_path, 9).phase("waiting for sites")
    killed = 0
    for was_killed in kill_points(write):
        killed += was_killed
        assert read_live(tmp_path)["phase"] in {"waiting for sites", "training"}
    assert killed >= 3
    assert read_live(tmp_path)["round"] == 3


def test_a_reason_cannot_carry_escapes_or_a_second_line(tmp_path):
    now = Live(tmp_path, 1)
    now.site("a", "error", "\x1b[2Jgone\nAll is well")
    now.phase("training")
    assert read_live(tmp_path)["sites"]["a"]["reason"] == " [2Jgone All is well"
    assert "\\u001b" not in (tmp_path / "live.json").read_text()


def test_of_a_file_that_somebody_else_wrote_only_the_known_names_are_read(tmp_path):
    site = {"state": "asked", "since": 1, "reason": "\x1b[31m", "pixels": [1]}
    facts = {
        "round": 1, "rounds": 2, "phase": "training", "since": 1, "written": 2, "secret": "x",
        "deadline": None, "beat_seconds": 3, "sites": {"a": site, "\x1b[2J": site},
    }  # fmt: skip
    (tmp_path / "live.json").write_text(json.dumps(facts))
    found = read_live(tmp_path)
    assert found.pop("sites") == {"a": {"state": "asked", "since": 1.0, "reason": " [31m"}}
    assert set(found) == {"round", "rounds", "phase", "since", "written", "deadline",
                          "beat_seconds", "steps", "first_step"}  # fmt: skip


def test_pretraining_counts_from_its_first_step_and_not_from_the_drawing_before(tmp_path, told):
    now, since = Live(tmp_path, 9), []
    for done in (0, 1, 2):
        now.pretraining(done, 5)
        since.append((read_live(tmp_path)["since"], read_live(tmp_path)["first_step"]))
        time.sleep(0.02)
    assert since[0][0] < since[1][0]
    assert since[1] == since[2]
    assert [first for _, first in since] == [None, 1, 1]


def test_pretraining_that_goes_on_counts_from_the_step_with_which_it_does(tmp_path, told):
    now = Live(tmp_path, 9)
    for done in (0, 4, 5):
        now.pretraining(done, 5)
    assert read_live(tmp_path)["first_step"] == 4


@pytest.mark.parametrize("steps", [[7, 3], [-1, 3], [1], 12, [1, "x"]])
def test_steps_that_cannot_be_are_as_no_file(tmp_path, steps):
    Live(tmp_path, 9).pretraining(1, 3)
    assert read_live(tmp_path)["steps"] == (1, 3)
    facts = json.loads((tmp_path / "live.json").read_text())
    (tmp_path / "live.json").write_text(json.dumps(facts | {"steps": steps}))
    assert read_live(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"round": 1}',
        '{"sites": []}',
        "[" * 100_000,
        "\x00",
        '{"round": 1e999, "rounds": 1, "phase": "training", "since": 1, "written": 1, "sites": {}}',
        '{"round": 1, "rounds": 1, "phase": "training", "since": NaN, "written": 1, "sites": {}}',
    ],
)
def test_a_damaged_file_is_as_none(tmp_path, text):
    (tmp_path / "live.json").write_text(text)
    assert read_live(tmp_path) is None


def test_it_is_written_at_most_twice_a_second_and_at_each_phase(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(
        live, "write_atomically", lambda path, data, sync: writes.append(json.loads(data))
    )
    now = Live(tmp_path, 1)
    now.phase("training", beat_seconds=0.01)
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        now.site("a", "asked", str(time.monotonic()))
        now.beat()
    assert 2 <= len(writes) <= 4
    now.phase("screening")
    assert writes[-1]["phase"] == "screening"


def test_a_beat_is_written_though_nothing_changes_where_it_was_promised(tmp_path, told):
    now = Live(tmp_path, 1)
    now.phase("screening")
    first = read_live(tmp_path)["written"]
    now.beat()
    assert read_live(tmp_path)["written"] == first
    now.phase("training", beat_seconds=0.05)
    first = read_live(tmp_path)["written"]
    time.sleep(0.06)
    now.beat()
    assert read_live(tmp_path)["written"] > first


def test_a_full_disk_does_not_end_a_study(tmp_path, caplog):
    Live(tmp_path / "live.json" / "no directory", 1)
    (tmp_path / "file").write_text("")
    Live(tmp_path / "file", 1).phase("training")
    assert "cannot be written" in caplog.text
