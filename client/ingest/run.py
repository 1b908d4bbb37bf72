"""A whole preparation: list, read, put in place, report; it continues where a kill left it."""

import contextlib
import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from client.ingest.finish import put_in_place, rejected_files, sample, summarise
from client.ingest.journal import Journal, open_journal
from client.ingest.patients import key_check
from client.ingest.pool import Pool
from client.ingest.progress import FileProgress
from client.ingest.read import read
from client.ingest.recorder import Recorder
from client.ingest.report import check_report, write_report
from client.ingest.sources import list_sources
from client.ingest.types import Item, Reading, Reason, Rules, Summary
from client.ingest.worker import Setup
from core.errors import UserError
from core.shards import check_target
from core.sites import REPORT_SUFFIX

MAX_FOLDER_CLASSES: Final = 1000

Read = Callable[[Item, Rules], Reading]


def prepare_archive(
    sources: Sequence[Path],
    target: Path,
    name: str,
    rules: Rules,
    *,
    jobs: int,
    memory_gib: float,
    timeout_s: float,
    secret: bytes,
    console: Console,
    sheets: bool = True,
    restart: bool = False,
    read: Read = read,
) -> Summary:
    """Turn files of any kind into a shard and a report beside it.

    What is done is kept in `.NAME.preparing` beside the shard until that is in place: after a kill
    at any instant the same call continues, and ends with the same bits as one that never stopped.

    Args:
        sources: Files, directories and CSV tables; see `client.ingest.sources.list_sources`.
        target: Directory of the shard.
        name: Name of the shard.
        rules: How files become pictures.
        jobs: Files read at a time.
        memory_gib: Address space of each process that reads files.
        timeout_s: Longest time for one file.
        secret: Hashes the patients; see `client.ingest.patients.load_secret`.
        console: Where progress goes.
        sheets: Whether the report has sample pictures.
        restart: Begin anew, whatever is there.
        read: Reads one file.

    Returns:
        What became of the files. The report is in `report_directory(target)`.

    Raises:
        UserError: nothing to read, no file gave a picture (then the report is written all the
            same), the target holds something else or the shard already, another preparation was
            begun there with other settings, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    sources = [source.absolute() for source in sources]
    work = work_directory(target)
    check_places(sources, target, name, restart=restart)
    shutil.rmtree(_done_directory(target), ignore_errors=True)  # a kill may have left it
    settings = {
        "SOURCE": [str(source) for source in sources],
        "--secret": key_check(secret),
        "--name": name,
        **{f"--{key.replace('_', '-')}": value for key, value in asdict(rules).items()},
    }
    items = list_sources(sources, rules)
    with _disk_errors(work), open_journal(work, settings, restart=restart) as journal:
        try:
            if journal.listed is None:
                _list_files(journal, items, rules, secret, console)
        except UserError:
            shutil.rmtree(work)
            raise
        setup = Setup(rules, secret, int(memory_gib * 1024**3), timeout_s, read)
        seconds, count = _read_files(journal, sources, setup, jobs, console)
        summary = summarise(journal, name, seconds, count)
        _finish(journal, target, name, rules, summary, console, sheets=sheets)
    if not summary.pictures:
        raise UserError(
            f"no picture came out of {summary.files:,} files ({_main_reasons(summary)}); "
            f"see {report_directory(target) / 'report.html'}"
        )
    return summary


def work_directory(target: Path) -> Path:
    """Where the work on a shard is kept until it is in place."""
    return target.with_name(f".{target.name}.preparing")


def _done_directory(target: Path) -> Path:
    return target.with_name(f".{target.name}.prepared")


def report_directory(target: Path) -> Path:
    """Where the report on a shard is: beside it."""
    return target.with_name(target.name + REPORT_SUFFIX)


def check_places(sources: Sequence[Path], target: Path, name: str, *, restart: bool) -> None:
    """Refuse what cannot be read from or written to.

    Raises:
        UserError: a source is missing, or the target holds something else, is a shard already, or
            lies in a source.
    """
    for source in sources:
        if not source.exists():
            raise UserError(f"source '{source}' does not exist; check the path")
    target = Path(os.path.realpath(target))
    check_target(target, name)
    check_report(report_directory(target))
    prepared = (target / "manifest.json").exists() and not work_directory(target).exists()
    if prepared and not restart:
        raise UserError(
            f"shard '{target}' is prepared already; --restart prepares it anew, "
            "or give another target"
        )
    for source in sources:
        if target.is_relative_to(os.path.realpath(source)):
            raise UserError(
                f"the shard '{target}' would lie in its own source '{source}'; "
                "give a target outside of it"
            )


def _list_files(
    journal: Journal, items: Iterator[Item], rules: Rules, secret: bytes, console: Console
) -> None:
    with console.status("listing files") as status:
        for count in journal.list_items(items, secret):
            status.update(f"listing files: {count:,}")
    if not journal.listed:
        raise UserError("the sources hold no file; check the paths")
    if rules.labels == "folder":
        classes = journal.one("SELECT count(DISTINCT label) FROM items")
        if classes > MAX_FOLDER_CLASSES:
            raise UserError(
                f"--labels folder finds {classes:,} classes, expected at most "
                f"{MAX_FOLDER_CLASSES:,}: are the folders named after patients? name the classes "
                "in a CSV, or leave --labels out"
            )
    console.print(f"{journal.listed:,} files listed")


def _read_files(
    journal: Journal, sources: Sequence[Path], setup: Setup, jobs: int, console: Console
) -> tuple[float, int]:
    """Read the files that have no outcome yet; gives the seconds it took and their number."""
    start, total, done = time.monotonic(), journal.listed or 0, journal.done
    if done == total:
        return 0.0, 0
    if done:
        console.print(f"continuing: {done:,} of {total:,} files are done")
    used = journal.one("SELECT count(*) FROM outcomes WHERE reason IS NULL")
    with (
        Recorder(journal, setup.rules) as recorder,
        Pool(setup, min(jobs, total - done)) as pool,
        FileProgress(console, total, used, done - used) as progress,
    ):
        for item, outcome in pool.outcomes(journal.items_left()):
            lost = outcome.reason in (Reason.UNREADABLE, Reason.TIMED_OUT)
            if lost and not os.path.lexists(item.path):
                _check_still_there(sources)
            reason = recorder.record(item.label, item.split, outcome)
            progress.count(used=reason is None)
        recorder.commit()
    return time.monotonic() - start, total - done


def _check_still_there(sources: Sequence[Path]) -> None:
    """Stop when a disk or share was taken away, before all its files count as unreadable."""
    for source in sources:
        try:
            gone = not source.exists() or (source.is_dir() and not os.listdir(source))
        except OSError:
            gone = True
        if gone:
            raise UserError(
                f"source '{source}' is not there any more; connect it again and "
                "give the same command: it continues"
            )


def _finish(
    journal: Journal,
    target: Path,
    name: str,
    rules: Rules,
    summary: Summary,
    console: Console,
    *,
    sheets: bool,
) -> None:
    with console.status("putting the shard in place") as status:
        some = None
        if summary.pictures:
            put_in_place(journal, target, name, rules, status.update)
            some = sample(journal, name, rules)
        status.update("writing the report")
        rejected = rejected_files(journal)
        write_report(report_directory(target), summary, rules, some, rejected, sheets=sheets)
        # Renamed first: half of a work directory could be taken for one to continue.
        os.rename(journal.work, _done_directory(target))
    journal.close()
    shutil.rmtree(_done_directory(target))


def _main_reasons(summary: Summary) -> str:
    most = sorted(summary.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in most[:3])


@contextlib.contextmanager
def _disk_errors(work: Path) -> Iterator[None]:
    """Turn what the disk of the work directory refuses into a line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "")
        if code in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise UserError(f"'{work}' is damaged ({error}); begin anew with --restart") from None
        if not code or code in ("SQLITE_ERROR", "SQLITE_MISUSE", "SQLITE_CONSTRAINT"):
            raise  # a mistake of ours
        raise _refused(work, error, full=code == "SQLITE_FULL") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _refused(work, error, full=full) from None


def _refused(work: Path, error: Any, *, full: bool) -> UserError:
    why = "the disk is full" if full else f"'{work}' cannot be written ({error})"
    cure = "make room" if full else "mend that"
    return UserError(f"{why}; {cure} and give the same command: what is done is kept in '{work}'")
