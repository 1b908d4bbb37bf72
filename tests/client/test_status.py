"""What a site tells of itself, from its own files: at work, at rest, killed, tampered with."""

import fcntl
import json
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from rich.console import Console

from client import progress
from client.__main__ import main
from client.app import app
from client.audit import Audit
from client.progress import ProgressFile, read_progress
from client.site import load_site
from client.status import StatusReader, picture, show_status
from server.grid import FIRST_NODE_ID, InProcessGrid
from server.study import initial_state

STUDY, OTHER = "ab" * 16, "cd" * 16
ESCAPE = "\x1b[2J\x1b]0;owned\x07[red]x[/]\nfaked line"


@pytest.fixture
def site_file(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text("name = 'st-mary'\nshards = ['data']\n")
    return file


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def look(site_file):
    return StatusReader(load_site(site_file)).read


def answer(state, study, number, decision="trained and sent", count=500):
    arrays = {"student/w": np.zeros(count, np.float32)}
    Audit(state, study, number).write("in", "train", "accepted for checking", arrays=arrays)
    Audit(state, study, number).write("out", "train", decision, arrays=arrays)


def train(site_file, recipe):
    """A real round of the real app."""
    grid = InProcessGrid(app, [{"site": str(site_file)}])
    state = initial_state(recipe).to_arrays()
    config = {"study": STUDY, "round": 1, "step": 0, "recipe": recipe.to_json()}
    content = {
        "arrays": ArrayRecord({name: Array(array) for name, array in state.items()}),
        "config": ConfigRecord(config),
    }
    (reply,) = grid.send_and_receive([Message(RecordDict(content), FIRST_NODE_ID, "train")])
    return reply


def drawn(status, width=80):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(picture(status))
    return capture.get()


@contextmanager
def locked(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_before_the_first_message_there_is_nothing_to_tell(look):
    status = look()
    assert (status.studies, status.training, status.refusals) == ({}, {}, ())
    assert not status.joined
    assert "no message has reached this site yet" in drawn(status)


def test_rounds_replies_and_bytes_are_counted_by_study(state, look):
    Audit(state, STUDY).write("out", "query", "sent site 'st-mary' and version 1")
    answer(state, STUDY, 1)
    answer(state, STUDY, 2)
    answer(state, STUDY, 2, "stored reply sent again")
    answer(state, OTHER, 7, count=10)
    status = look()
    one, other = status.studies[STUDY], status.studies[OTHER]
    assert (one.rounds, one.last_round, one.sent, one.bytes) == (2, 2, 4, 3 * 2000)
    assert (other.rounds, other.last_round, other.sent, other.bytes) == (1, 7, 1, 40)
    assert one.epsilon is None
    assert "none" in drawn(status)
    assert status.audit_lines == 9
    assert "audit chain whole: 9 lines" in drawn(status)


def test_refusals_are_told_with_their_reason_the_last_ones_first_hand(state, look):
    for number in range(1, 8):
        Audit(state, STUDY, number).write("out", "train", f"not done: reason {number}")
    status = look()
    assert [one.reason for one in status.refusals] == [f"reason {n}" for n in range(1, 8)]
    assert (status.studies[STUDY].refused, status.studies[STUDY].rounds) == (7, 0)
    text = drawn(status)
    assert "round 7: reason 7" in text
    assert "reason 2" not in text
    assert "and 2 before" in text


def test_a_broken_chain_comes_first_and_gives_status_1(state, site_file, monkeypatch, capfd):
    answer(state, STUDY, 1)
    audit = state / "audit.jsonl"
    audit.write_text(audit.read_text().replace("2000", "1000"))
    monkeypatch.setattr(sys, "argv", ["fedmermed-site", "status", str(site_file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capfd.readouterr().out.startswith("! the audit chain is broken: line 2")


def test_a_round_in_training_is_told_as_long_as_its_process_lives(state, look):
    directory = state / "studies" / STUDY
    with locked(directory / "lock"):
        file = ProgressFile(directory, 3, 20, 8)
        assert "round 3 of study abababab: reads images" in drawn(look())
        file.step(1, 5.5)
        time.sleep(0.02)
        file.step(20, 4.25)
        found = look().training[STUDY]
        assert (found.round, found.step, found.steps, found.loss) == (3, 20, 20, 4.25)
        assert 0 < found.images_per_second <= 19 * 8 / 0.02
        assert found.gpu_bytes is None
        assert "step 20 of 20, loss 4.250" in drawn(look())
    assert look().training == {}  # killed: the file is there, nobody holds the lock
    assert read_progress(directory) is not None


def test_progress_is_written_at_most_once_a_second_and_at_the_last_step(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(
        progress, "write_atomically", lambda path, data, sync: writes.append(json.loads(data))
    )
    file = ProgressFile(tmp_path, 1, 10_000, 8)
    for step in range(1, 10_001):
        file.step(step, 1.0)
    assert writes[0]["step"] == 0
    assert writes[-1]["step"] == 10_000
    assert len(writes) <= 4


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_told_as_one(tmp_path, loss):
    ProgressFile(tmp_path, 1, 1, 8).step(1, loss)
    assert read_progress(tmp_path).loss is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_progress_file_is_as_none(tmp_path, content):
    (tmp_path / "progress.json").write_bytes(content)
    assert read_progress(tmp_path) is None


def test_a_disk_that_takes_no_progress_does_not_fail_the_round(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ProgressFile(tmp_path / "file", 1, 1, 8).step(1, 1.0)
    assert "cannot be written" in caplog.text


def test_a_real_round_writes_its_progress_and_leaves_none_behind(make_sites, recipe, monkeypatch):
    (file,) = make_sites({"st-mary": ["ct"]})
    steps = []
    monkeypatch.setattr(progress, "WRITE_SECONDS", 0.0)
    real = ProgressFile.step
    monkeypatch.setattr(
        ProgressFile,
        "step",
        lambda self, *args: (real(self, *args), steps.append(read_progress(self._file.parent))),
    )
    reply = train(file, recipe)
    assert not reply.has_error()
    assert [one.step for one in steps] == [0, 1, 2]
    assert not list(file.parent.rglob("progress.json"))
    status = StatusReader(load_site(file)).read()
    assert [study.rounds for study in status.studies.values()] == [1]


def test_nothing_that_a_coordinator_wrote_carries_escapes(state, look):
    Audit(state, ESCAPE, 1).write("out", "train", f"not done: {ESCAPE}")
    status = look()
    text = drawn(status, width=500)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[red]x[/]" in text  # shown, and not obeyed
    assert not any(row.startswith("faked") for row in text.splitlines())
    (study,) = status.studies
    assert study.isprintable()
    assert status.refusals[0].reason.isprintable()


def test_looking_changes_nothing(state, look):
    answer(state, STUDY, 1)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in state.rglob("*.*")}
    drawn(look())
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in state.rglob("*.*")} == before


def test_watching_sees_a_new_line_and_ends_with_ctrl_c(state, site_file, monkeypatch, capsys):
    answer(state, STUDY, 1)
    looks = iter([lambda: answer(state, STUDY, 2)])

    def sleep(seconds):
        try:
            next(looks)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(time, "sleep", sleep)
    assert show_status(load_site(site_file), Console(), watch=True, as_json=True)
    seen = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [one["studies"][STUDY]["rounds"] for one in seen] == [1, 2]


def test_it_fits_80_columns(state, look):
    for number in (1, 2):
        answer(state, STUDY, number, count=10_000_000)
    Audit(state, STUDY, 3).write("out", "train", "not done: " + "reason " * 40)
    assert max(map(len, drawn(look()).splitlines())) <= 80
