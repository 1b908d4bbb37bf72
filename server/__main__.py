"""`fedmermed-server`: admit sites, run a federation, release its model, have sites measure it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from core.console import new_app, run_command_line

# Flower reads these when it is imported: no call home from any of our commands.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# Threads that wait give way: spinning ones slow a machine that others use too by 2 to 30 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Below those lines, for that reason.
from server.engines import EngineName
from server.service_commands import admit, check_address, init, provision, run, serve

app = new_app(
    "Coordinate a study: admit sites, simulate a federation, export and evaluate its model."
)


@app.command()
def simulate(
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml).")],
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of shards or npz files; none: seven phantom hospitals."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; none: runs/<name>.")] = None,
    engine: Annotated[
        EngineName, typer.Option(help="What brings server and sites together.")
    ] = EngineName.INPROCESS,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="In place of the recipe's.")
    ] = None,
) -> None:
    """Run a whole federation on this machine; run again on the same directory, it resumes."""
    from server.simulate import simulate as run

    run(recipe, data=data, out=out, engine=engine, seed=seed)


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml): its model, views and seed.")],
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of one batch each.")] = 1600,
    batch: Annotated[int, typer.Option(min=7, help="Pictures a step; many on a GPU.")] = 14,
    phantoms: Annotated[int, typer.Option(min=2, help="Pictures drawn of each modality.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="In place of the recipe's.")
    ] = None,
) -> None:
    """Pretrain a backbone on drawn pictures, for `model.init_file`: no data, no download.

    Killed and run again, it goes on where it was a minute before.
    """
    from server.pretrain import pretrain_file

    digest = pretrain_file(
        recipe, out, steps=steps, batch=batch, phantoms=phantoms, device=device, seed=seed
    )
    typer.echo(f"{out}: backbone pretrained on phantoms, sha256 {digest}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
) -> None:
    """Write the last round's teacher backbone as safetensors that timm.create_model loads."""
    from server.summary import export_model

    digest, round_number = export_model(run, out)
    typer.echo(f"{out}: teacher after round {round_number}, sha256 {digest}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write (.html); none: report.html in RUN.")
    ] = None,
) -> None:
    """Write the report of a study, one HTML file: curves, sites, incidents, cost, model card."""
    from server.report import write_report

    file = out or run / "report.html"
    write_report(run, file)
    typer.echo(f"{file}")


@app.command()
def metrics(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Beyond the loopback, a token is needed.")
    ] = "127.0.0.1:9109",
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds what readers show as 'Authorization: Bearer'."),
    ] = None,
) -> None:
    """Serve a study's figures to Prometheus at /metrics, read-only, until stopped."""
    from server.metrics_server import serve_metrics

    check_address(listen)
    serve_metrics(run, listen, token_file)


@app.command()
def page(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or directories of such."),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Beyond the loopback, a token is needed.")
    ] = "127.0.0.1:9110",
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds what browsers ask for as a password."),
    ] = None,
) -> None:
    """Show studies in a browser while they run or after, read-only, until stopped."""
    from server.page.serve import serve_page

    check_address(listen)
    serve_page(runs, listen, token_file)


@app.command()
def tensorboard(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    logdir: Annotated[Path, typer.Argument(help="What tensorboard --logdir is given.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with new rounds until the study is over.")
    ] = False,
) -> None:
    """Write a study's figures as event files for TensorBoard."""
    from server.events import write_events

    typer.echo(f"{write_events(run, logdir, follow=follow)}")


@app.command()
def mlflow(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    uri: Annotated[
        str,
        typer.Option(metavar="URI", help="Where MLflow keeps its records: sqlite:///..., http."),
    ],
    experiment: Annotated[str, typer.Option(help="MLflow's experiment.")] = "fedmermed",
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with new rounds until the study is over.")
    ] = False,
) -> None:
    """Send a study's recipe, figures and final model to MLflow; what is there is not sent again."""
    from server.tracking import track

    typer.echo(f"run {track(run, uri, experiment, follow=follow)}")


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Exported model, run directory, round file, or recipe.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of NAME/site.toml, shards or npz files; none: the run's own sites."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures here (.json).")] = None,
    probe_data: Annotated[
        Path | None,
        typer.Option(
            help="Your labelled images: a probe fitted on them scores all sites alike, which a "
            "pooled AUROC needs."
        ),
    ] = None,
    last_blocks: Annotated[int, typer.Option(min=1, help="Blocks whose tokens probes see.")] = 3,
    neighbours: Annotated[int, typer.Option(min=1, help="Images that vote.")] = 20,
) -> None:
    """Have each site measure a model on its own labels; features and labels stay there."""
    from server.evaluation import evaluate as run

    run(
        model, data=data, out=out, probe_data=probe_data, last_blocks=last_blocks,
        neighbours=neighbours,
    )  # fmt: skip


@app.command()
def quarantine(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    site: Annotated[
        str | None, typer.Argument(help="Not to be asked any more; none: list.")
    ] = None,
    release: Annotated[bool, typer.Option("--release", help="Ask it again.")] = False,
) -> None:
    """List sites in quarantine, put one there, or release it; also while the study runs."""
    from server.quarantine import manage

    for line in manage(run, site, release=release):
        typer.echo(line)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it anew each second, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Is a study alive, does it learn in every modality, who is missing, when will it end?"""
    from rich.console import Console

    from server.status import show_status

    show_status(run, Console(), watch=watch, as_json=as_json)


for command in (provision, serve, admit, init, run):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    run_command_line(app)


if __name__ == "__main__":
    main()
