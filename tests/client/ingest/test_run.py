"""Whole preparations: killed anywhere and continued, refused, out of disk, cut off their source."""

import errno
import hashlib
import io
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from client.ingest.journal import _connect as journal_connect
from client.ingest.run import prepare_archive, report_directory, work_directory
from client.ingest.types import Item, Outcome, Reason, Rules, Summary
from client.ingest.worker import Setup, read_item
from core.errors import UserError
from core.shards import open_shard

ROOT = Path(__file__).parents[3]
SECRET = bytes(32)
RULES = Rules(px=16)
Points = Callable[[Callable[[], None]], Iterator[bool]]


class Inline:
    """Reads in this process: for tests of what is around the pool."""

    def __init__(self, setup: Setup, jobs: int) -> None:
        self.setup = setup

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def outcomes(self, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
        for item in items:
            yield item, read_item(item, self.setup)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.ingest.run.Pool", Inline)
    monkeypatch.setattr("client.ingest.recorder.COMMIT_SECONDS", 0.0)


def image(path: Path, seed: int, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (24, 30) if mode == "L" else (24, 30, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def archive(folder: Path, count: int) -> Path:
    """Images of two modalities, some of them copies, with files between that are none."""
    for number in range(count):
        modality, mode = ("ct", "L") if number % 3 else ("cfp", "RGB")
        seed = 1 if number % 6 == 4 else number
        image(folder / modality / f"{number:03}.png", seed, mode)
    (folder / "ct" / "001a.html").write_text("<html>")
    (folder / "ct" / "empty.png").touch()
    (folder / "ct" / "cut.png").write_bytes((folder / "ct" / "001.png").read_bytes()[:60])
    return folder


def prepare(source: Path, target: Path, **options: Any) -> Summary:
    settings: dict[str, Any] = {"jobs": 2, "memory_gib": 2, "timeout_s": 30, "secret": SECRET}
    rules = options.pop("rules", RULES)
    console = options.pop("console", Console(file=io.StringIO()))
    return prepare_archive(
        [source], target, target.name, rules, console=console, **settings | options
    )


def digests(shard: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shard.iterdir()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_an_archive_becomes_a_shard_and_a_report_and_nothing_else(tmp_path: Path) -> None:
    summary = prepare(archive(tmp_path / "in", 14), tmp_path / "out" / "s")
    shard = open_shard(tmp_path / "out" / "s", verify=True)
    assert len(shard.images) == 12
    assert shard.images.shape[1:] == (16, 16, 3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["s", "s.report"]
    assert (summary.files, summary.used, summary.read) == (17, 12, 17)
    assert summary.reasons == {
        Reason.DUPLICATE: 2,
        Reason.NOT_AN_IMAGE: 1,
        Reason.EMPTY: 1,
        Reason.TRUNCATED: 1,
    }


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    archive(tmp_path / "in", 40)
    for jobs in (1, 3):
        prepare(tmp_path / "in", tmp_path / str(jobs) / "s", jobs=jobs)
    assert digests(tmp_path / "1" / "s") == digests(tmp_path / "3" / "s")


@pytest.mark.usefixtures("inline")
def test_killed_at_any_file_operation_it_continues_to_the_same_bits(
    tmp_path: Path, kill_points: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_syncs(monkeypatch)
    monkeypatch.setattr("client.ingest.report._page", lambda *_: "")  # slow to make
    source = archive(tmp_path / "in", 5)
    prepare(source, tmp_path / "whole" / "s")
    whole = digests(tmp_path / "whole" / "s")
    target = tmp_path / "cut" / "s"
    deaths = 0
    for killed in kill_points(lambda: prepare(source, target, sheets=False) and None):
        deaths += killed
        if work_directory(target).exists() or not target.exists():
            prepare(source, target, sheets=False)
        assert digests(target) == whole
        assert (report_directory(target) / "report.html").exists()
        with pytest.raises(UserError, match="is prepared already"):
            prepare(source, target)
        shutil.rmtree(tmp_path / "cut")
    assert deaths > 20


def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes most of the time, and a kill of the process does not need it."""

    def connect(work: Path) -> sqlite3.Connection:
        connection = journal_connect(work)
        for statement in ("COMMIT", "PRAGMA synchronous = OFF", "BEGIN IMMEDIATE"):
            connection.execute(statement)
        return connection

    monkeypatch.setattr("client.ingest.journal._connect", connect)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_killed_at_random_times_it_continues_to_the_same_bits(tmp_path: Path) -> None:
    source, target = archive(tmp_path / "in", 60), tmp_path / "cut" / "s"
    command = [sys.executable, "-m", "client", "prepare", str(source), "--px", "16", "--jobs", "2"]
    secret = ["--secret", str(tmp_path / "secret")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(out: Path, seconds: float | None = None) -> int:
        """Runs the command and kills it so long after it began to work."""
        process = subprocess.Popen(
            [*command, str(out), *secret], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        while seconds is not None and process.poll() is None:
            if (work_directory(out) / "journal.sqlite").exists():
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait()

    assert run(tmp_path / "whole" / "s") == 0
    times = random.Random(4)
    ends = [run(target, times.uniform(0.0, 1.2)) for _ in range(5)]
    assert ends.count(-signal.SIGKILL) >= 2
    if not target.exists() or work_directory(target).exists():
        assert run(target) == 0
    assert digests(target) == digests(tmp_path / "whole" / "s")
    open_shard(target, verify=True)


@pytest.mark.usefixtures("inline")
def test_a_finished_shard_is_not_prepared_again_by_accident(tmp_path: Path) -> None:
    source, target = archive(tmp_path / "in", 4), tmp_path / "out" / "s"
    prepare(source, target)
    before = (target / "manifest.json").stat().st_ino
    with pytest.raises(UserError, match="is prepared already; --restart prepares it anew"):
        prepare(source, target)
    assert (target / "manifest.json").stat().st_ino == before
    image(source / "ct" / "new.png", 77)
    prepare(source, target, restart=True)
    assert len(open_shard(target, verify=True).images) == 5


@pytest.mark.usefixtures("inline")
def test_an_empty_directory_may_become_the_shard(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    prepare(archive(tmp_path / "in", 3), tmp_path / "s")
    assert len(open_shard(tmp_path / "s", verify=True).images) == 3


@pytest.mark.usefixtures("inline")
def test_a_restart_that_was_stopped_continues_without_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = archive(tmp_path / "in", 6), tmp_path / "out" / "s"
    prepare(source, target)
    old = digests(target)
    image(source / "ct" / "new.png", 77)
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(source, target, restart=True)
    assert digests(target) == old
    monkeypatch.setattr("client.ingest.run.Pool", Inline)
    assert prepare(source, target).read == 7
    assert len(open_shard(target, verify=True).images) == 6


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    class Stopping(Inline):
        def outcomes(self, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
            for number, pair in enumerate(super().outcomes(items)):
                if number == count:
                    raise error
                yield pair

    monkeypatch.setattr("client.ingest.run.Pool", Stopping)


@pytest.mark.usefixtures("inline")
def test_other_settings_do_not_continue_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = archive(tmp_path / "in", 6), tmp_path / "out" / "s"
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(source, target)
    for options, message in [
        ({"rules": Rules(px=32)}, "--px was 16 and now is 32"),
        ({"secret": bytes([1] * 32)}, "the secret has changed"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(source, target, **options)
    with pytest.raises(UserError, match=r"SOURCE was .*/in and now is .*/other"):
        prepare(archive(tmp_path / "other", 3), target)
    monkeypatch.setattr("client.ingest.run.Pool", Inline)
    prepare(source, target, jobs=7, timeout_s=999)


@pytest.mark.usefixtures("inline")
def test_when_nothing_is_an_image_the_report_says_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text("no image")
    (tmp_path / "in" / "x").touch()
    message = r"no picture came out of 4 files \(3 not an image file we know, 1 empty file\); see "
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "in", tmp_path / "out" / "s")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["s.report"]
    assert "empty file" in (tmp_path / "out" / "s.report" / "rejected.csv").read_text()


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (
            lambda d: (d / "in").mkdir() or (d / "out").mkdir(),  # type: ignore[func-returns-value]
            "the sources hold no file; check the paths",
        ),
        (lambda d: None, "source '.*/in' does not exist; check the path"),
        (lambda d: (archive(d / "in", 3), image(d / "out" / "s" / "x.png", 0)), "is not a shard"),
        (
            lambda d: (archive(d / "in", 3), image(d / "out" / "s.report" / "x.png", 0)),
            "exists and is not a report",
        ),
    ],
)
def test_what_cannot_be_begun_is_refused_and_leaves_nothing(
    tmp_path: Path, arrange: Callable[[Path], None], message: str
) -> None:
    arrange(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "in", tmp_path / "out" / "s")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_does_not_go_into_its_own_source(tmp_path: Path) -> None:
    archive(tmp_path / "in", 3)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for target in (tmp_path / "in" / "s", tmp_path / "link" / "s"):
        with pytest.raises(UserError, match="would lie in its own source"):
            prepare(tmp_path / "in", target)


@pytest.mark.usefixtures("inline")
def test_folders_of_patients_are_not_taken_for_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ingest.run.MAX_FOLDER_CLASSES", 2)
    for name in ("DOE_JANE", "ROE_RICHARD", "MUSTER_MAX"):
        image(tmp_path / "in" / "ct" / name / "1.png", 0)
    with pytest.raises(
        UserError, match=r"finds 3 classes, .* are the folders named after patients"
    ):
        prepare(tmp_path / "in", tmp_path / "s", rules=Rules(px=16, labels="folder"))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("inline")
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = archive(tmp_path / "in", 9), tmp_path / "out" / "s"
    prepare(source, tmp_path / "whole" / "s")
    pwrite, room = os.pwrite, [3000]

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(descriptor, data[: room[0]], offset)
        room[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full; make room and give the same command"):
        prepare(source, target)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert prepare(source, target).read < 12
    assert digests(target) == digests(tmp_path / "whole" / "s")


@pytest.mark.usefixtures("inline")
def test_a_share_that_is_taken_away_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = archive(tmp_path / "in", 9), tmp_path / "out" / "s"
    prepare(source, tmp_path / "whole" / "s")

    class Unmounting(Inline):
        def outcomes(self, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
            for number, item in enumerate(items):
                if number == 4:
                    source.rename(tmp_path / "away")
                    source.mkdir()
                yield item, read_item(item, self.setup)

    monkeypatch.setattr("client.ingest.run.Pool", Unmounting)
    with pytest.raises(UserError, match="is not there any more; connect it again"):
        prepare(source, target)
    source.rmdir()
    (tmp_path / "away").rename(source)
    monkeypatch.setattr("client.ingest.run.Pool", Inline)
    prepare(source, target)
    assert digests(target) == digests(tmp_path / "whole" / "s")


@pytest.mark.usefixtures("inline")
def test_a_file_that_went_away_since_it_was_listed_is_one_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive(tmp_path / "in", 5)

    class Deleting(Inline):
        def outcomes(self, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
            (source / "ct" / "004.png").unlink()
            yield from super().outcomes(items)

    monkeypatch.setattr("client.ingest.run.Pool", Deleting)
    assert prepare(source, tmp_path / "s").reasons[Reason.UNREADABLE] == 1


@pytest.mark.usefixtures("inline")
def test_a_log_file_gets_lines_and_a_terminal_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ingest.progress.LINE_SECONDS", 0.0)
    source, log, screen = archive(tmp_path / "in", 6), io.StringIO(), io.StringIO()
    prepare(source, tmp_path / "a", console=Console(file=log))
    lines = log.getvalue().splitlines()
    assert lines[0] == "9 files listed"
    assert lines[1].startswith("1 of 9 files, ")
    assert "files/s, 0:00:00 left, 5 used, 4 rejected" in lines[-1]
    assert "\x1b" not in log.getvalue()
    prepare(source, tmp_path / "b", console=Console(file=screen, force_terminal=True, width=120))
    assert "9/9" in screen.getvalue()
