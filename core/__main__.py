"""`fedmermed-eval`: measure a model on labelled images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from core.console import new_app, run_command_line
from core.errors import UserError

app = new_app("Measure a model on labelled images.")

MODEL_HELP = (
    "Exported model, run directory, round file, recipe (before round 1), Hugging Face directory, "
    "or TIMM_NAME[@PX]:WEIGHTS with a local weight file."
)
ModelPath = Annotated[
    Path,
    typer.Argument(help="Exported model, run directory, round file, or recipe (before round 1)."),
]
DataPath = Annotated[Path, typer.Option("--data", help="Directory of shards or of npz files.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command()
def knn(
    model: ModelPath,
    data: DataPath,
    json: JsonPath = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Images that vote.")] = 20,
    device: Device = "auto",
) -> None:
    """Nearest-neighbour vote on frozen features of the last block."""
    from core.evaluate import evaluate_knn

    _run(
        "kNN", model, data, json, device,
        lambda *arguments: evaluate_knn(*arguments, neighbours=neighbours),
    )  # fmt: skip


@app.command()
def probe(
    model: ModelPath,
    data: DataPath,
    json: JsonPath = None,
    last_blocks: Annotated[int, typer.Option(min=1, help="Blocks whose tokens it sees.")] = 3,
    device: Device = "auto",
) -> None:
    """Linear probe (L2 logistic regression, strength chosen on val) on frozen features."""
    from core.evaluate import evaluate_probe

    _run(
        "linear probe", model, data, json, device,
        lambda *arguments: evaluate_probe(*arguments, last_blocks=last_blocks),
    )  # fmt: skip


@app.command()
def run(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    data: Annotated[
        str,
        typer.Option(help="Directory of shards or npz files; medmnist or medmnist-64: official."),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the report; made if missing.")],
    fractions: Annotated[
        str, typer.Option(help="Label fractions in percent, comma-separated.")
    ] = "1,10,30,50,100",
    seeds: Annotated[int, typer.Option(min=1, help="Label subsets drawn at each fraction.")] = 3,
    draws: Annotated[int, typer.Option(min=100, help="Of patients, for the intervals.")] = 1000,
    last_blocks: Annotated[int, typer.Option(min=1, help="Blocks whose tokens it sees.")] = 3,
    fine_tune: Annotated[bool, typer.Option(help="Also fine-tune in full (slow).")] = False,
    baselines: Annotated[
        bool, typer.Option(help="Also measure random weights, pixels and hand-made features.")
    ] = True,
    stability: Annotated[
        bool, typer.Option(help="Also perturb the test images and vary other choices.")
    ] = True,
    subgroups: Annotated[
        Path | None, typer.Option(help="CSV shard,index,COLUMN...: AUROC by its values.")
    ] = None,
    report_leaks: Annotated[
        bool, typer.Option(help="Go on where train and test overlap, and say so.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Measure models against baselines, with intervals, and write a report to look at."""
    with _needs_extra():
        from core.evaluation.command import make_report, percents
        from core.evaluation.run import Settings

    settings = Settings(
        fractions=percents(fractions), seeds=tuple(range(seeds)), bootstrap_draws=draws,
        last_blocks=last_blocks, fine_tune=fine_tune, baselines=baselines, stability=stability,
        report_leaks=report_leaks,
    )  # fmt: skip
    make_report(models, data, out, settings, subgroups=subgroups, device=device)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="File to write (.npz or .parquet).")],
    data: DataPath,
    last_blocks: Annotated[int, typer.Option(min=1, help="Blocks whose tokens to write.")] = 1,
    patients: Annotated[bool, typer.Option(help="Also write each image's patient number.")] = False,
    device: Device = "auto",
) -> None:
    """Write an embedding of every image; a stopped run goes on where it was."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from core.device import resolve_device
    from core.evaluation.embed import embed as write
    from core.evaluation.models import open_model
    from core.sites import open_sites

    sites = open_sites(data)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        bar = bars.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        begun = partial(show, "pretraining on phantoms")
        loaded = open_model(model, resolve_device(device), begun)
        rows = write(
            loaded, sites, out, last_blocks=last_blocks, patients=patients,
            progress=partial(show, "images"),
        )  # fmt: skip
    typer.echo(f"{out}: {rows:,} embeddings")


class ExportFormat(StrEnum):
    """What `export` writes."""

    ONNX = "onnx"
    HUGGING_FACE = "huggingface"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="File (onnx) or directory (huggingface) to write.")],
    format: Annotated[
        ExportFormat, typer.Option(help="ONNX file, or a directory as Hugging Face lays it out.")
    ],
    results: Annotated[
        Path | None, typer.Option(help="results.json of a run, for the model card.")
    ] = None,
) -> None:
    """Write a model in a form that other programs read, checked to give the same features."""
    from core.checkpoint import read_json
    from core.evaluation.card import model_card
    from core.evaluation.exports import export_hugging_face, export_onnx
    from core.evaluation.models import open_model

    loaded = open_model(model)
    if format is ExportFormat.ONNX:
        difference = export_onnx(loaded, out)
    else:
        difference = export_hugging_face(
            loaded, out, model_card(read_json(results) if results else {})
        )
    typer.echo(f"{out}: features differ from ours by at most {difference:.1e}")


@contextmanager
def _needs_extra() -> Iterator[None]:
    """Say how to install what only evaluators need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; pip install 'fedmermed[eval]'") from None


def _run(
    title: str, model_path: Path, data: Path, json_path: Path | None, device: str,
    evaluate: Callable[..., dict[str, dict[str, float]]],
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.progress import Progress

    from core.checkpoint import sha256_file, write_json
    from core.device import resolve_device
    from core.evaluate import check_task, labelled_tasks, mean_over_modalities
    from core.export import load_model
    from core.sites import open_sites

    device = resolve_device(device)
    tasks = labelled_tasks([shard for shards in open_sites(data).values() for shard in shards])
    if not tasks:
        raise UserError(f"'{data}' holds no labelled image; nothing can be measured")
    for task in tasks:
        check_task(task)
    rows: dict[str, dict[str, float]] = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading", total=None)

        def pretrained(done: int, total: int) -> None:
            bars.update(bar, description="pretraining on phantoms", completed=done, total=total)

        model = load_model(model_path, device, pretrained)
        bars.reset(bar, description=title, total=len(tasks))
        for task in tasks:
            rows |= evaluate(model, [task])
            bars.advance(bar)
    result: dict[str, Any] = {
        "measure": title,
        "model": str(model_path),
        "sha256": sha256_file(model_path) if model_path.is_file() else None,
        "tasks": rows,
        "mean": mean_over_modalities(rows),
    }
    _print_table(title, result)
    if json_path is not None:
        write_json(json_path, result)


def _print_table(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}, test split: {result['model']}")
    for column in ("task", "AUROC", "accuracy", "balanced accuracy", "train", "test"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, row in {**result["tasks"], "mean over modalities": result["mean"]}.items():
        figures = [f"{row[key]:.3f}" for key in ("auroc", "accuracy", "balanced_accuracy")]
        sizes = [str(int(row[key])) if key in row else "" for key in ("train", "test")]
        table.add_row(name, *figures, *sizes, end_section=name == list(result["tasks"])[-1])
    Console().print(table)


def main() -> None:
    """Entry of the console script."""
    run_command_line(app)


if __name__ == "__main__":
    main()
