import json
import threading
import time

import pytest

from core.checkpoint import write_json
from core.errors import UserError
from core.wire import GlobalState
from server import launch
from server.control import APP, app_bundle
from server.history import open_run, read_history
from server.launch import follow, initialise


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(launch, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)


@pytest.fixture
def run(tmp_path, make_recipe):
    return open_run(tmp_path / "run", make_recipe(rounds=3))


def add_round(run):
    number = len(read_history(run.path)) + 1
    site = {"outcome": "admitted", "num_examples": {}}
    line = {"round": number, "sites": {"a": site}, "metrics": {}, "seconds": {}}
    with open(run.path / "history.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


class Service:
    """Starts a thread a run, as the service starts a ServerApp; `lives` tell what each does."""

    def __init__(self, run, *lives):
        self.directory = run.path.parent / "study"
        self.run, self.lives = run, list(lives)
        self.started, self.stopped, self.threads = [], [], {}

    def start_run(self, config):
        self.started.append(config)
        number = len(self.started)
        self.threads[number] = threading.Thread(target=self.live, args=(self.lives.pop(0),))
        self.threads[number].start()
        return number

    def live(self, act):
        if act == "never":
            return
        with self.run.locked():
            act(self.run)
            time.sleep(0.1)

    def run_ended(self, run_id):
        thread = self.threads.get(run_id)
        return "unknown" if thread is None else "" if thread.is_alive() else "failed"

    def stop_run(self, run_id):
        self.stopped.append(run_id)


def whole(run):
    while len(read_history(run.path)) < 3:
        add_round(run)


def fails(reason, final):
    return lambda run: run.fail(reason, final=final)


def test_a_study_is_submitted_once_and_followed_to_its_end(run):
    service = Service(run, whole)
    follow(service, run.path, 2)
    assert service.started == [
        {
            "recipe": str(run.path / "recipe.json"),
            "run-dir": str(run.path),
            "sites": 2,
            "registered": str(service.directory / "registered"),
        }
    ]


def test_who_waits_for_pretraining_is_told_so(tmp_path, make_recipe, caplog):
    recipe = make_recipe(rounds=3)
    model = recipe.model.model_copy(update={"phantom_steps": 6400})
    recipe = recipe.model_copy(update={"model": model})
    for name, begun in (("new", False), ("begun", True)):
        run = open_run(tmp_path / name, recipe)
        if begun:
            run.load(lambda: GlobalState(student={}, teacher={}))
        caplog.clear()
        with caplog.at_level("INFO"):
            follow(Service(run, whole), run.path, 0)
        told = "round 1 waits for 6400 steps of pretraining on phantoms" in caplog.text
        assert told == (not begun)


def test_a_server_app_that_died_is_followed_by_another_that_goes_on(run, caplog):
    service = Service(run, add_round, add_round, whole)
    follow(service, run.path, 0)
    assert len(service.started) == 3
    assert service.stopped == [1, 2]  # nothing of a dead run is left at the sites
    assert "the ServerApp has ended after round 2; starting another" in caplog.text


def test_a_study_that_runs_is_followed_and_not_submitted(run):
    service = Service(run)
    with run.locked():
        waiting = threading.Thread(target=follow, args=(service, run.path, 0))
        waiting.start()
        time.sleep(0.2)
        whole(run)
    waiting.join(10)
    assert service.started == []


def test_without_progress_it_gives_up_and_says_why(run, monkeypatch):
    monkeypatch.setattr(launch, "MAX_TRIES", 2)
    service = Service(run, add_round, "never", fails("OSError('disk full')", False))
    with pytest.raises(UserError, match=r"2 ServerApps in a row .*, the last by OSError\('disk"):
        follow(service, run.path, 0)
    assert len(service.started) == 3  # a round in between begins the count anew


def test_a_failure_that_needs_a_person_is_told_at_once(run):
    service = Service(run, fails("round 1: 1 of 2 sites admitted", True))
    with pytest.raises(UserError, match=r"^round 1: 1 of 2 sites admitted$"):
        follow(service, run.path, 0)
    assert len(service.started) == 1


def test_a_superlink_that_is_away_is_waited_for(run):
    class Away(Service):
        def __init__(self, *args):
            super().__init__(*args)
            self.away = 3

        def start_run(self, config):
            if self.away:
                self.away -= 1
                raise UserError("the SuperLink does not answer")
            return super().start_run(config)

    service = Away(run, whole)
    follow(service, run.path, 0)
    assert service.away == 0


def test_a_run_of_a_database_that_is_gone_is_submitted_anew(run):
    write_json(run.path / "run.json", {"run_id": 4711})
    service = Service(run, whole)
    follow(service, run.path, 0)
    assert len(service.started) == 1


def test_a_study_that_was_stopped_is_not_started_again_by_who_follows_it(run):
    def stopped(run):
        while not (run.path / "run.json").exists():
            time.sleep(0.01)
        write_json(run.path / "run.json", {"run_id": 1, "stopped": True})

    service = Service(run, stopped)
    with pytest.raises(UserError, match="the study was stopped; run again, and it resumes"):
        follow(service, run.path, 0)
    follow(again := Service(run, whole), run.path, 0)
    assert len(again.started) == 1


def test_the_cost_of_site_privacy_is_told_before_a_study_is_submitted(
    tmp_path, make_site_recipe, monkeypatch, capsys
):
    def away(directory):
        assert "has to be trusted" in (told := capsys.readouterr().out)
        assert "noise on the mean update" in told
        raise UserError("no service")

    monkeypatch.setattr(launch, "control", away)
    file = tmp_path / "recipe.json"
    file.write_text(make_site_recipe().to_json())
    with pytest.raises(UserError, match="no service"):
        launch.run_on_service(tmp_path, file)


def test_the_initial_weights_are_written_once_and_need_no_torch_afterwards(tmp_path, recipe):
    file = initialise(recipe, tmp_path / "run")
    before = file.read_bytes()
    assert initialise(recipe, tmp_path / "run").read_bytes() == before
    checkpoint = open_run(tmp_path / "run", recipe).load(pytest.fail)
    assert isinstance(checkpoint.state, GlobalState)
    assert checkpoint.round_number == 0


def test_the_app_that_is_submitted_is_one_file_with_one_fingerprint():
    content, digest = app_bundle()
    app_bundle.cache_clear()
    assert app_bundle() == (content, digest)
    assert len(content) < 2048
    assert APP.count("def ") == APP.count("import ") == 0
    # Sites may list it (allowed_apps): a change of it is a change for them.
    assert digest == "c8d5584553cd7df18c5a98e56e9076b501f054a27a114f0e2cbd71334a47e053"
