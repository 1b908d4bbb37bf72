import itertools
import json
import sys
import threading

import pytest

from core.errors import UserError
from server import events
from server.events import write_events
from server.history import read_history

TWO = {"st-mary": ("ct", "us"), "city": ("cxr",)}


def opened(directory):
    """Tag -> [(round, value, time)], as TensorBoard's own reader has them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value), e.wall_time) for e in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def values(found, tag):
    return [(step, value) for step, value, _ in found[tag]]


def test_tensorboard_reads_figures_by_modality_and_site(make_study, tmp_path):
    def change(number, sites, line):
        if number == 2:
            sites["city"] = {"outcome": "silent", "reason": "no reply"}

    run = make_study(TWO, rounds=3, change=change)
    out = write_events(run, tmp_path / "logs")
    assert out == tmp_path / "logs" / "run"
    found = opened(out)
    assert values(found, "loss/ct") == [(1, 3.99), (2, 3.98), (3, 3.97)]
    assert values(found, "loss_ceiling/cxr") == [(1, 4.159), (3, 4.159)]
    assert values(found, "loss/cxr/city") == [(1, 3.99), (3, 3.97)]
    assert values(found, "knn_auroc/us") == [(0, 0.7), (2, 0.7)]
    assert values(found, "site_update_norm/city") == [(1, 1.1), (3, 1.1)]
    assert values(found, "site_seconds_train/st-mary") == [(1, 2), (2, 2), (3, 2)]
    assert values(found, "sites/admitted") == [(1, 2), (2, 1), (3, 2)]
    assert values(found, "sites/silent") == [(2, 1)]
    assert values(found, "seconds/exchange") == [(1, 45), (2, 45), (3, 45)]
    times = [time for _, _, time in found["loss/ct"]]
    assert [b - a for a, b in itertools.pairwise(times)] == [47, 47]


def test_writing_again_replaces_what_was_written_and_nothing_else(make_study, tmp_path):
    run = make_study(TWO)
    out = write_events(run, tmp_path / "logs")
    (ours,) = out.iterdir()
    ours.rename(out / "events.out.tfevents.1.host.fedmermed")  # of another second
    other = out / "events.out.tfevents.1.somebody-else"
    other.write_bytes(b"")
    write_events(run, tmp_path / "logs")
    assert other.exists()
    assert len(list(out.glob("*.fedmermed"))) == 1
    other.unlink()
    assert values(opened(out), "loss/ct") == [(1, 3.99), (2, 3.98)]


def test_following_ends_with_the_last_round_and_writes_each_once(make_study, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "POLL_SECONDS", 0.05)
    run = make_study(TWO, rounds=3)
    file = run / "history.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text(first)
    follower = threading.Thread(
        target=write_events, args=(run, tmp_path / "logs"), kwargs={"follow": True}
    )
    follower.start()
    follower.join(0.3)
    assert follower.is_alive()
    file.write_text(first + "".join(rest))
    follower.join(20)
    assert not follower.is_alive()
    assert values(opened(tmp_path / "logs" / "run"), "loss/ct") == [(1, 3.99), (2, 3.98), (3, 3.97)]


def test_a_round_that_was_dropped_and_done_again_comes_again(make_study, tmp_path, monkeypatch):
    run = make_study(TWO, rounds=3)
    file = run / "history.jsonl"
    first, second, third = file.read_text().splitlines(keepends=True)
    states = iter([first + second, first, first + second + third])
    file.write_text(next(states))
    monkeypatch.setattr("time.sleep", lambda seconds: file.write_text(next(states)))
    out = write_events(run, tmp_path / "logs", follow=True)
    assert [step for step, _ in values(opened(out), "loss/ct")] == [1, 2, 2, 3]


def test_a_metric_that_is_on_no_list_is_not_written(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"] |= {"secret/cxr": 1.0}

    (line, *_) = read_history(make_study(TWO, change=change))
    assert "secret" in json.dumps(line)
    assert not [tag for tag, _, _ in events.scalars(line) if "secret" in tag]


def test_what_is_missing_is_said_in_plain_words(make_study, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not a run directory"):
        write_events(tmp_path, tmp_path / "logs")
    run = make_study(TWO)
    with pytest.raises(UserError, match="holds the run directory itself"):
        write_events(run, run.parent)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'fedmermed\[tensorboard\]'"):
        write_events(run, tmp_path / "logs")
