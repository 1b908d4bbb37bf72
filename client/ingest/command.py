"""What `fedmermed-site prepare` does with its parsed options, and what it says at the end."""

import os
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from client.ingest.npz import read_npz_files
from client.ingest.patients import load_secret
from client.ingest.report import summary_table
from client.ingest.run import check_places, prepare_archive, report_directory
from client.ingest.types import Rules
from core.errors import UserError
from core.shards import Shard, write_shard


def prepare_files(
    sources: Sequence[Path],
    target: Path,
    name: str,
    rules: Rules,
    secret_file: Path,
    console: Console,
    *,
    jobs: int | None,
    memory_gib: float,
    timeout_s: float,
    sheets: bool,
    restart: bool,
) -> None:
    """Prepare an archive; see `client.ingest.run.prepare_archive`.

    The secret is drawn if `secret_file` is missing; `jobs` None is one for each core.

    Raises:
        UserError: see `prepare_archive`.
        typer.Exit: it was stopped by Ctrl-C.
    """
    check_places(sources, target, name, restart=restart)  # before a secret is drawn
    try:
        summary = prepare_archive(
            sources,
            target,
            name,
            rules,
            jobs=jobs or _cores(),
            memory_gib=memory_gib,
            timeout_s=timeout_s,
            secret=load_secret(secret_file),
            console=console,
            sheets=sheets,
            restart=restart,
        )
    except KeyboardInterrupt:
        again = "the same command without --restart" if restart else "the same command"
        console.print(f"stopped; {again} continues")
        raise typer.Exit(130) from None
    console.print(summary_table(summary))
    report = report_directory(target)
    lines = [f"shard:  {target}", f"report: {report / 'report.html'}"]
    if summary.files > summary.used:
        lines.append(
            f"{summary.files - summary.used:,} of {summary.files:,} files gave no picture; "
            f"each with its reason: {report / 'rejected.csv'}"
        )
    if sheets:
        lines.append("look at the sample pictures in the report before you train")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def join_npz(
    sources: Sequence[Path],
    target: Path,
    name: str,
    modality: str | None,
    console: Console,
    restart: bool,
) -> Shard:
    """Join npz files in one shard.

    Raises:
        UserError: other files are among them, one cannot be read, or the target is taken.
    """
    others = [source for source in sources if source.suffix != ".npz"]
    if others:
        raise UserError(
            f"npz files are prepared by themselves; give '{others[0]}' a shard of its own"
        )
    check_places(sources, target, name, restart=restart)
    shard = read_npz_files(sources, name, modality, console)
    write_shard(target, shard)
    return shard


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
