"""`fedmermed-server`: admit sites, run a federation, release its model, have sites measure it."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from core.address import Address
from core.console import new_app, run_command_line

# Flower reads these when it is imported: no call home from any of our commands.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# Threads that wait give way: spinning ones slow a machine that others use too by 2 to 30 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Below those lines, for that reason.
from core.errors import UserError
from server.engines import EngineName
from server.serve import PartName

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
    steps: Annotated[int, typer.Option(min=1, help="Steps of 14 pictures.")] = 1600,
    phantoms: Annotated[int, typer.Option(min=2, help="Pictures drawn of each modality.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="In place of the recipe's.")
    ] = None,
) -> None:
    """Pretrain a backbone on drawn pictures, for `model.init_file`: no data and no download."""
    from server.pretrain import pretrain_file

    digest = pretrain_file(recipe, out, steps=steps, phantoms=phantoms, device=device, seed=seed)
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
def provision(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The coordinator's directory; private.")
    ],
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where sites reach you; the first time."),
    ] = None,
    sites: Annotated[
        str, typer.Option(metavar="A,B,C", help="Sites that take part; only new ones are added.")
    ] = "",
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="Life of a server certificate made now.")
    ] = 365,
    renew_server: Annotated[
        bool, typer.Option("--renew-server", help="New server key and certificate, same CA.")
    ] = False,
    rotate: Annotated[
        str | None, typer.Option(metavar="SITE", help="Give a site a new key.")
    ] = None,
    revoke: Annotated[str | None, typer.Option(metavar="SITE", help="Retire a site's key.")] = None,
) -> None:
    """Make certificates, and a start-up kit a site; then serve, and admit the sites."""
    from server.provision import provision as run

    names = [name.strip() for name in sites.split(",") if name.strip()]
    for line in run(
        directory, address=address, sites=names, days=days, renew_server=renew_server,
        rotate=rotate, revoke=revoke,
    ):  # fmt: skip
        typer.echo(line)


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


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What provision made.")],
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Public address of the gateway; none: every interface, the port sites were given.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the SuperLink.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            help="Where the SuperLink listens. Its control service has no login: the loopback, or "
            "a network of the coordinator's parts alone."
        ),
    ] = "127.0.0.1",
    part: Annotated[
        PartName | None, typer.Option(help="Run one part alone, in the foreground.")
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where that part finds the SuperLink."),
    ] = None,
    secret: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the parts 'superlink' and 'apps' share; none: superexec.secret in DIR.",
        ),
    ] = None,
) -> None:
    """Run the coordinator's service: SuperLink, starter of studies, and the gateway for sites."""
    from server.serve import open_service, run_part
    from server.serve import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for address in filter(None, (listen, superlink)):
        check_address(address)
    parts = list(PartName) if part is None else [part]
    service = open_service(
        directory, parts, listen=listen, host=host, port=port, superlink=superlink, secret=secret
    )
    if part is None:
        run(service)
    else:
        run_part(service, part)


@app.command()
def admit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What serve runs from.")],
) -> None:
    """Have the running service admit every provisioned key, and refuse every retired one."""
    from server.admit import admit as run
    from server.control import control

    with control(directory) as calls:
        for line in run(calls, directory):
            typer.echo(line)


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml).")],
    run: Annotated[Path, typer.Argument(help="Run directory; made if missing.")],
) -> None:
    """Write a study's initial weights, where torch is installed: the service then needs none."""
    from server.history import read_recipe
    from server.launch import initialise

    typer.echo(f"{initialise(read_recipe(recipe), run)}")


@app.command()
def run(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What serve runs from.")],
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml).")],
    out: Annotated[Path | None, typer.Option(help="Run directory; none: DIR/runs/<name>.")] = None,
    sites: Annotated[
        int, typer.Option(min=0, help="Sites that the first round waits for, beyond the minimum.")
    ] = 0,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the study's run; run again, and it resumes.")
    ] = False,
) -> None:
    """Run a study on the service, or resume it; it goes on when this command is stopped."""
    from server.launch import run_on_service, stop_on_service

    if stop:
        stopped = stop_on_service(directory, recipe, out=out)
        typer.echo("stopped" if stopped else "the study was not running")
        return
    try:
        run_on_service(directory, recipe, out=out, sites=sites)
    except KeyboardInterrupt:
        typer.echo("the study goes on; run the same command again to follow it, or add --stop")
        raise typer.Exit(130) from None


def check_address(address: str) -> None:
    """Hold that an address is host:port."""
    try:
        TypeAdapter(Address).validate_python(address)
    except ValidationError:
        raise UserError(f"address '{address}' is not HOST:PORT, such as 0.0.0.0:443") from None


def main() -> None:
    """Entry point of the console script."""
    run_command_line(app)


if __name__ == "__main__":
    main()
