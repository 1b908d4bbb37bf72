"""A study at a glance, from run directories in every condition."""

import fcntl
import json
import shutil
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from rich.console import Console

from core.checkpoint import save_arrays, write_json
from core.wire import GlobalState, Prototypes
from server.__main__ import main
from server.history import open_run
from server.live import Live
from server.overview_reader import OverviewReader
from server.page.view import StudyView
from server.status import picture, show_status

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def outcome(what="admitted", **fields):
    return {"outcome": what, "reason": "", "num_examples": {"ct": 50}, "seconds": 7.0,
            "bytes": 1000} | fields  # fmt: skip


def line(number, sites, **fields):
    means = {"loss/ct": 3.0, "loss_ceiling/ct": 4.0, "teacher_entropy/ct": 2.0,
             "mean_cosine/ct": 0.5, "rankme/ct": 9.0,
             "knn_auroc/ct": 0.5 + number / 50}  # fmt: skip
    return {"round": number, "sites": sites, "metrics": means, "alarms": [], "outliers": [],
            "refused_nodes": [], "seconds": {"exchange": 60.0}, "bytes_up": 2000,
            "bytes_down": 2000} | fields  # fmt: skip


@pytest.fixture
def run(tmp_path, make_recipe):
    open_run(tmp_path / "run", make_recipe(rounds=10))
    return tmp_path / "run"


def write(run, *lines):
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (run / "history.jsonl").write_text(text)


def look(run):
    view = OverviewReader(run).read()
    assert json.loads(json.dumps(view.as_json(), allow_nan=False))
    return view


def drawn(run, width=80):
    console = Console(width=width, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(picture(look(run)))
    return capture.get()


def kinds(view):
    return [(one.level, one.kind, one.site) for one in view.alarms if one.kind != "disk"]


@contextmanager
def served(run):
    """A server that lives, as far as the run directory tells."""
    with open(run / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Live(run, 10)


def command(monkeypatch, *words):
    """Runs `fedmermed-server status`; gives its exit status."""
    monkeypatch.setattr(sys, "argv", ["fedmermed-server", "status", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_what_is_no_run_directory_is_refused_by_exit_code_2(tmp_path, monkeypatch, capfd):
    assert command(monkeypatch, tmp_path / "nowhere") == 2
    assert command(monkeypatch, tmp_path) == 2
    assert capfd.readouterr().err.count("is not a run directory") == 2


def test_a_failed_study_is_shown_with_exit_code_0_as_table_and_as_json(run, monkeypatch, capfd):
    write_json(run / "failure.json", {"reason": "no sites", "final": True})
    assert command(monkeypatch, run) == 0
    assert "the study failed: no sites" in capfd.readouterr().out
    assert command(monkeypatch, run, "--json") == 0
    assert json.loads(capfd.readouterr().out)["state"] == "failed"


def test_a_study_that_has_not_begun(run):
    view = look(run)
    assert (view.state, view.rounds_done, view.rounds, view.sites) == ("not started", 0, 10, {})
    assert kinds(view) == []
    assert "not started, 0 of 10 rounds done" in drawn(run)


def test_one_round_and_no_server(run):
    write(run, line(1, {"a": outcome(), "b": outcome(num_examples={"ct": 30})}))
    view = look(run)
    assert (view.state, view.rounds_done, view.seconds_left) == ("stopped", 1, None)
    ct = view.modalities["ct"]
    assert (ct.images, ct.sites, ct.verdict) == (80, 2, "too early")
    assert (ct.figures["loss"].last, ct.figures["loss"].change) == (3.0, None)
    a = view.sites["a"]
    assert (a.state, a.last_admitted, a.seconds, a.bytes_up) == ("admitted", 1, 7.0, 1000)


def test_a_running_study_says_what_it_does_and_when_it_ends(run):
    write(run, *(line(n, {"a": outcome(), "b": outcome()}) for n in (1, 2, 3)))
    with served(run) as live:
        live.begin_round(4)
        live.site("a", "asked")
        live.site("b", "admitted")
        live.phase("training", seconds=600, beat_seconds=3)
        view, text = look(run), drawn(run)
    assert (view.state, view.phase, view.round) == ("running", "training", 4)
    assert view.seconds_left == pytest.approx(7 * 60, abs=10)
    assert view.modalities["ct"].verdict == "better"
    assert (view.sites["a"].state, view.sites["b"].state) == ("asked", "admitted")
    assert "1 of 2 sites have answered" in text
    assert "about 7 min left" in text


def test_a_server_that_was_killed_is_told_from_a_busy_one_and_from_one_that_ended(run):
    write(run, line(1, {"a": outcome(), "b": outcome()}))
    with served(run) as live:
        live.begin_round(2)
        live.phase("aggregating")  # promises no beat, however long it takes
        facts = json.loads((run / "live.json").read_text())
        write_json(run / "live.json", facts | {"written": time.time() - 7200})
        assert kinds(look(run)) == []
    assert look(run).state == "not heard of"
    assert kinds(look(run)) == [("stop", "server", "")]
    live.phase("stopped")
    assert (look(run).state, kinds(look(run))) == ("stopped", [])


def test_a_server_that_hangs_is_an_alarm(run):
    with served(run) as live:
        live.phase("training", beat_seconds=3)
        facts = json.loads((run / "live.json").read_text())
        write_json(run / "live.json", facts | {"written": time.time() - 90})
        assert kinds(look(run)) == [("act", "server", "")]


def test_pretraining_is_told_by_its_steps_and_the_time_that_the_others_take(run):
    with served(run) as live:
        live.pretraining(0, 6400)
        view = look(run)
        assert (view.state, view.phase) == ("running", "pretraining")
        assert (view.steps, view.steps_left) == ((0, 6400), None)
        facts, now = json.loads((run / "live.json").read_text()), time.time()
        write_json(run / "live.json", facts | {"steps": [400, 6400], "first_step": 400})
        assert look(run).steps_left is None  # one step tells no rate
        told = {"since": now - 100, "written": now, "steps": [1600, 6400], "first_step": 400}
        write_json(run / "live.json", facts | told)
        assert look(run).steps_left == pytest.approx(400, rel=0.01)
        words = " ".join(drawn(run, width=200).split())
        assert "before round 1: step 1,600 of 6,400 of pretraining on phantoms" in words
        assert "about 7 min more" in words
        shown = StudyView(run).look().parts["head"].html
        assert "step 1,600 of 6,400 of pretraining on phantoms, about 7 min more" in shown
        live.phase("waiting for sites")
        assert (look(run).steps, look(run).steps_left) == (None, None)
        assert "phantoms" not in drawn(run)


def test_the_server_before_does_not_speak_for_the_one_that_starts(run):
    Live(run, 10).phase("failed")
    with served(run):
        assert look(run).state == "starting"


def test_a_failed_study_says_why_and_shows_the_round_that_failed(run):
    write(run, line(1, {"a": outcome(), "b": outcome()}))
    write_json(run / "failure.json", {"reason": "round 2: 1 of 2 sites admitted", "final": True})
    live = Live(run, 10)
    live.begin_round(2)
    live.site("b", "silent", "no reply before the deadline")
    live.phase("failed")
    view = look(run)
    assert (view.state, view.state_words) == ("failed", "round 2: 1 of 2 sites admitted")
    assert kinds(view) == [("stop", "server", ""), ("act", "absent", "b")]
    assert view.sites["b"].state == "silent"
    assert "it resumes after the last round" in drawn(run)


def test_every_trouble_of_a_round_is_an_alarm_the_gravest_first(run):
    words = "site 'a': ct: collapse: embeddings are one point; stop, then raise loss.koleo_weight"
    sites = {
        "a": outcome(), "b": outcome("rejected", reason="site 'b', round 1: not finite"),
        "c": outcome("error", reason="no disk"), "d": outcome("silent"), "e": outcome("absent"),
        "f": outcome("quarantined"), "g": outcome(),
    }  # fmt: skip
    found = {"site": "g", "figure": "cosine", "words": "site 'g': points against the others"}
    write(run, line(1, sites, alarms=[words], outliers=[found], refused_nodes=["no such key"]))
    held = {"f": {"reason": "3 bad rounds in a row", "after_round": 1, "by_hand": False}}
    write_json(run / "quarantine.json", {"held": held, "released": {}})
    view = look(run)
    assert kinds(view) == [
        ("stop", "collapse", "a"), ("act", "quarantine", "f"), ("act", "rejected", "b"),
        ("act", "error", "c"), ("act", "absent", "d"), ("act", "absent", "e"),
        ("look", "quorum", ""), ("look", "outlier", "g"), ("look", "refused", ""),
    ]  # fmt: skip
    assert view.modalities["ct"].verdict == "collapse"
    collapse = view.alarms[0]
    assert collapse.what_to_do == "stop, then raise loss.koleo_weight"
    assert "not finite" in view.alarms[2].words
    assert f"quarantine {run} f --release" in view.alarms[1].what_to_do
    assert all(one.words and one.what_to_do for one in view.alarms)


def test_a_modality_that_no_site_trains_on_any_more_is_an_alarm_until_one_does(run):
    ultrasound = outcome(num_examples={"us": 40, "ct": 0})
    both, one = {"a": outcome(), "b": ultrasound}, {"a": outcome(), "b": outcome("absent")}
    history = [line(1, both), line(2, both), *(line(number, one) for number in range(3, 7))]
    write(run, *history[:5])
    assert "modality" not in [kind for _, kind, _ in kinds(look(run))]
    write(run, *history)
    view = look(run)
    assert (view.modalities["us"].verdict, view.modalities["ct"].verdict) == ("untrained", "better")
    (alarm,) = (alarm for alarm in view.alarms if alarm.kind == "modality")
    assert (alarm.level, alarm.site) == ("look", "")
    assert alarm.words == (
        "no site has trained on ultrasound since round 2; the model may lose what it knew of it"
    )
    assert alarm.what_to_do == (
        "bring back b, or measure the model on its images with fedmermed-eval before you use it"
    )
    write(run, *history, line(7, both))
    assert look(run).modalities["us"].verdict == "unlabelled"
    assert "modality" not in [kind for _, kind, _ in kinds(look(run))]


def test_a_collapse_of_the_mean_is_an_alarm_too(run):
    means = {"loss/ct": 4.0, "loss_ceiling/ct": 4.0, "teacher_entropy/ct": 4.0,
             "mean_cosine/ct": 0.999}  # fmt: skip
    write(run, line(1, {"a": outcome(), "b": outcome()}, metrics=means))
    assert kinds(look(run)) == [("stop", "collapse", "")]


def test_too_few_sites_are_told_while_the_study_waits_for_them(run):
    with served(run) as live:
        live.begin_round(1)
        live.site("a", "connected")
        live.phase("waiting for sites", seconds=600, beat_seconds=1)
        view = look(run)
    assert view.state == "waiting for sites"
    assert kinds(view) == [("act", "quorum", "")]
    assert "1 of at least 2 sites are connected" in view.alarms[0].words


def test_a_disk_that_will_not_hold_the_next_rounds_is_an_alarm(run, monkeypatch):
    save_arrays(run / "round-0000.safetensors", {"student/w": np.zeros(1000, np.float32)})
    usage = type("Usage", (), {"free": 15_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert [one.kind for one in look(run).alarms] == ["disk"]
    usage.free = 50_000
    assert look(run).alarms == ()


def test_prototypes_are_counted_in_the_newest_checkpoint(run):
    state = GlobalState(
        student={}, teacher={},
        prototypes=Prototypes({"ct": np.ones((3, 2), np.float32)},
                              {"ct": np.array([10, 20, 12], np.float32)}),
    )  # fmt: skip
    save_arrays(run / "round-0001.safetensors", state.to_arrays())
    write(run, line(1, {"a": outcome(), "b": outcome()}))
    ct = look(run).modalities["ct"]
    assert (ct.prototypes, ct.prototype_patients) == (3, 42)


@pytest.mark.parametrize("file", ["live.json", "failure.json", "quarantine.json", "study.json",
                                  "run.json", "history.jsonl",
                                  "round-0000.safetensors"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\x00", b"[" * 100_000,
                                     b'{"held": 3, "reason": [1]}\n'])  # fmt: skip
def test_no_damaged_file_stops_the_look(run, file, content):
    (run / file).write_bytes(content)
    assert look(run).rounds_done == 0
    assert "tiny" in drawn(run)


def test_no_text_of_a_site_or_a_file_carries_a_terminals_escapes(run):
    bad = f"{ESCAPE}[red]x[/]\nfaked line"
    sites = {"a": outcome("error", reason=bad), "b": outcome("rejected", reason=bad),
             ESCAPE: outcome()}  # fmt: skip
    found = {"site": "a", "figure": "cosine", "words": bad}
    write(run, line(1, sites, alarms=[bad], outliers=[found], refused_nodes=[bad]))
    write_json(run / "failure.json", {"reason": bad, "final": True})
    entry = {"reason": bad, "after_round": 1, "by_hand": True}
    write_json(run / "quarantine.json", {"held": {"b": entry, ESCAPE: entry}, "released": {}})
    write_json(run / "study.json", {"study": bad, "began": bad})
    site = {"state": "error", "since": 1, "reason": bad}
    write_json(run / "live.json", {"round": 2, "rounds": 10, "phase": "failed", "since": 1,
                                   "written": 1, "sites": {"a": site, ESCAPE: site}})  # fmt: skip
    view, text = look(run), drawn(run, width=2000)
    assert set(view.sites) == {"a", "b"}
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[red]x[/]" in text  # shown, and not obeyed
    assert not any(row.startswith("faked") for row in text.splitlines())

    def texts(value):
        if isinstance(value, dict):
            return [t for k, v in value.items() for t in (k, *texts(v))]
        if isinstance(value, list | tuple):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    assert all(t.isprintable() for t in texts(view.as_json()))


def test_nothing_of_a_site_is_told_but_the_closed_list(run):
    extra = {"pixels": "secret", "metrics": {"patient": "secret"}, "digest": "secret"}
    sites = {"a": outcome(num_examples={"ct": 5, "secret": 7}, **extra)}
    write(run, line(1, sites, secret="secret", metrics={"secret/ct": 1.0, "loss/secret": 1.0}))
    site = {"state": "asked", "since": 1, "reason": "", "secret": "secret"}
    write_json(run / "live.json", {"round": 2, "rounds": 10, "phase": "training", "since": 1,
                                   "written": 1, "secret": 1, "sites": {"a": site}})  # fmt: skip
    view = look(run)
    assert "secret" not in json.dumps(view.as_json())
    assert set(view.as_json()["sites"]["a"]) == {
        "state", "since", "reason", "last_admitted", "rounds", "rejected_reason", "seconds",
        "bytes_up", "images", "quarantine", "epsilon",
    }  # fmt: skip


def test_looking_changes_nothing(run):
    write(run, line(1, {"a": outcome(), "b": outcome()}))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.iterdir()}
    drawn(run)
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in run.iterdir()} == before


def test_every_line_fits_80_columns_and_no_name_is_cut(run):
    name = "x" * 64
    figures = {"num_examples": {"ct": 1_234_567, "dermatology": 1_234_567}}
    write(run, line(1, {name: outcome(**figures), "b": outcome("error", reason="y " * 140)}))
    text = drawn(run)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("x") >= 64
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_watching_ends_with_ctrl_c(run, monkeypatch, capsys):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    show_status(run, Console(width=80), watch=True)
    assert "not started" in capsys.readouterr().out
    show_status(run, Console(width=80), watch=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == "not started"
