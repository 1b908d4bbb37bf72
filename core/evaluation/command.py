"""`fedmermed-eval run`: from what was typed to a report, with progress and a table."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from core.device import resolve_device
from core.errors import UserError
from core.evaluation.files import open_data, read_columns, training_images, write_evaluation
from core.evaluation.models import open_model
from core.evaluation.run import Settings, checked_tasks, evaluate
from core.evaluation.tables import auroc_table, headline, methods
from core.evaluation.words import METHODS


def make_report(
    models: Sequence[str], data: str, out: Path, settings: Settings, *,
    subgroups: Path | None, device: str,
) -> None:  # fmt: skip
    """Measure models and write the report; everything that can be refused is refused first.

    Args:
        models: as `core.evaluation.models.open_model` takes them; the report is about the first.
        data: as `core.evaluation.files.open_data` takes it.
        out: directory for the report.
        settings: how to measure.
        subgroups: CSV for `core.evaluation.files.read_columns`.
        device: for `core.device.resolve_device`.
    """
    device = resolve_device(device)
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        bar = bars.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total or None)

        shards = [shard for site in open_data(data, show).values() for shard in site]
        checked_tasks(shards, report_leaks=settings.report_leaks)
        begun = partial(show, "pretraining on phantoms")
        loaded = [open_model(model, device, begun) for model in models]
        groups = read_columns(subgroups, shards) if subgroups else None
        evaluation = evaluate(loaded, shards, settings, columns=groups, on_part=show)
        training = training_images(loaded[0].path.parent) if loaded[0].kind == "run" else None
        report = write_evaluation(evaluation, out, training=training)
    _print(evaluation.results)
    Console().print(f"report: {report}", soft_wrap=True, highlight=False)


def percents(text: str) -> tuple[float, ...]:
    """Read label fractions such as "1,10,100".

    Raises:
        UserError: they are not percentages, or 100 is not among them.
    """
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 100 for value in values) or values[-1] < 100:
        raise UserError(
            f"--fractions '{text}': expected percentages that end in 100, such as 1,10,100"
        )
    return values


def _print(results: dict[str, Any]) -> None:
    console = Console()
    method = methods(results)[0]
    columns, rows = auroc_table(results, method)
    table = Table(title=f"AUROC with 95 % interval, {METHODS.get(method, method)}, test split")
    table.add_column("task")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (f"{cell.value}\n[dim]{cell.range}" for cell in row.cells)
        table.add_row(row.title, *cells, end_section=row in rows[-2:-1])
    console.print(table)
    for text in (headline(results), results["stability_conclusion"], *results["warnings"]):
        if text:
            console.print(text, soft_wrap=True, highlight=False)
