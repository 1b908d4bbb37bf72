"""`fedmermed-eval`: measure a model on labelled images."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from core.console import new_app, run_command_line
from core.errors import UserError

app = new_app("Measure a model on labelled images.")

ModelPath = Annotated[
    Path, typer.Argument(help="Exported model, run directory, round file, or recipe (random init).")
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


def _run(
    title: str, model_path: Path, data: Path, json_path: Path | None, device: str,
    evaluate: Callable[..., dict[str, dict[str, float]]],
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.progress import track

    from core.checkpoint import sha256_file, write_json
    from core.evaluate import check_task, labelled_tasks, mean_over_modalities
    from core.export import load_model
    from core.site_round import resolve_device
    from core.sites import open_sites

    device = resolve_device(device)
    tasks = labelled_tasks([shard for shards in open_sites(data).values() for shard in shards])
    if not tasks:
        raise UserError(f"'{data}' holds no labelled image; nothing can be measured")
    for task in tasks:
        check_task(task)
    model = load_model(model_path, device)
    console = Console(stderr=True)
    rows: dict[str, dict[str, float]] = {}
    for task in track(tasks, description=title, console=console, transient=True):
        rows |= evaluate(model, [task])
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
