"""`fedmermed-server provision`, `serve`, `admit`, `init`, `run`: a study over the network."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from core.address import Address
from core.errors import UserError
from server.serve import PartName


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


def admit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What serve runs from.")],
) -> None:
    """Have the running service admit every provisioned key, and refuse every retired one."""
    from server.admit import admit as run
    from server.control import control

    with control(directory) as calls:
        for line in run(calls, directory):
            typer.echo(line)


def init(
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml).")],
    run: Annotated[Path, typer.Argument(help="Run directory; made if missing.")],
) -> None:
    """Write a study's initial weights, where torch is installed: the service then needs none."""
    from rich.console import Console

    from server.history import read_recipe
    from server.launch import initialise
    from server.progress import shown_progress

    study = read_recipe(recipe)
    with shown_progress(Console(stderr=True), study, sites=0, done=0):
        file = initialise(study, run)
    typer.echo(f"{file}")


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
