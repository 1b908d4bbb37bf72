"""`fedmermed-site`: what a hospital's operator types. Each command is one small function."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.budget import budget
from client.data_commands import download, phantoms, prepare, show
from core.console import new_app, run_command_line
from core.errors import UserError

app = new_app("Prepare a site's images, look at them, and join a study.")
console = Console()

for command in (prepare, phantoms, download, show):
    app.command()(command)


@app.command()
def check(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's file.")],
    recipe: Annotated[
        Path | None, typer.Option(help="The study's recipe; without it, the site file's.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all as JSON.")
    ] = None,
) -> None:
    """Is this site ready for a study? Says what is not, and for each such line what to do.

    Reads every shard, tries the coordinator, and trains a few steps; nothing leaves the site. Ends
    with status 1 when a line is red.
    """
    from client.check.findings import Status
    from client.check.run import check_site
    from client.check.table import Board, as_json, table
    from client.site import load_site
    from core.checkpoint import write_json

    site = load_site(site_file)
    board = Board()
    with board.shown(console):
        study = check_site(board, site_file, site, recipe)
    console.print(table(board, f"site {site.name}"))
    green, yellow, red = (board.count(status) for status in Status)
    console.print(f"{green} green, {yellow} yellow, {red} red", highlight=False)
    if json_file:
        try:
            write_json(json_file, as_json(board, site.name, study.name if study else ""))
        except OSError as error:
            raise UserError(f"'{json_file}' cannot be written: {error}") from None
    if red:
        raise typer.Exit(1)


@app.command()
def join(
    kit: Annotated[
        Path, typer.Argument(metavar="SITE.toml|KIT", help="The site's file, or its directory.")
    ],
    port: Annotated[
        int, typer.Option(min=1, max=65_535, help="Port where the site's two parts meet.")
    ] = 9094,
    host: Annotated[
        str, typer.Option(help="Address on which the SuperNode listens for the trainer.")
    ] = "127.0.0.1",
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default="127.0.0.1:PORT",
            help="Where the trainer finds the SuperNode.",
        ),
    ] = None,
    secret: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="runtime.secret in the state directory",
            help="What the trainer shows to the SuperNode; made if missing.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="supernode|trainer",
            show_default="both",
            help="Run this part alone, in the foreground: for containers.",
        ),
    ] = None,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Take part in the study, until stopped.

    Runs two programs and starts either again when it ends: Flower's SuperNode, which speaks to the
    coordinator over TLS with this site's key, and the trainer, which answers each message by the
    installed app, never by one that is sent. Waits for a coordinator that is not there yet.
    """
    import logging

    from client.join import join as start
    from client.parts import Meeting
    from client.site import load_site

    if part not in (None, "supernode", "trainer"):
        raise UserError(f"--part is supernode or trainer, not '{part}'")
    logging.basicConfig(format="%(asctime)s join: %(message)s")
    logging.getLogger("fedmermed.join").setLevel(logging.INFO)
    site_file = kit / "site.toml" if kit.is_dir() else kit
    secret = secret or load_site(site_file).state_path / "runtime.secret"
    meet = Meeting(host, port, runtime or f"127.0.0.1:{port}", secret)
    start(site_file, meet, part, parent)


@app.command()
def status(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's file.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it anew each second, until Ctrl-C.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """What does this site do now, what did it answer, and what left it?

    From this site's files alone. Ends with status 1 when the audit chain is broken.
    """
    from client.site import load_site
    from client.status import show_status

    if not show_status(load_site(site_file), console, watch=watch, as_json=json_output):
        raise typer.Exit(1)


app.command()(budget)


@app.command()
def audit(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's file.")],
    study: Annotated[
        str, typer.Option(metavar="ID", help="Only a study's lines; its id's first digits do.")
    ] = "",
    json_output: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON, not as a table.")
    ] = False,
) -> None:
    """What came to this site and what left it; verifies the whole audit file.

    Ends with status 1 when a line was changed, removed, inserted or moved. The last line printed is
    the head: once noted elsewhere, it shows whether the file was written anew.
    """
    import json

    from client.audit_table import as_json, remarks, select, table
    from client.chain import read
    from client.site import load_site

    site = load_site(site_file)
    chain = read(site.state_path)
    lines = select(chain, study)
    if json_output:
        typer.echo(json.dumps(as_json(chain, site.name, lines), indent=1))
    else:
        console.print(table(lines))
        for remark in remarks(chain):
            console.print(remark, soft_wrap=True, highlight=False)
    if chain.problem:
        raise typer.Exit(1)


@app.command(name="audit-privacy")
def audit_privacy(
    recipe: Annotated[
        Path | None,
        typer.Option(help="A study's recipe: audit its noise, clip and way of the gradients."),
    ] = None,
    canaries: Annotated[
        int, typer.Option(min=100, max=20_000, help="The more, the smaller a leak is found.")
    ] = 2000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Does the installed private training leak more than its noise allows? Attacks it.

    Half of a few thousand canaries, patients who are as easy to see as can be, are trained on; who
    was in is then guessed from what would be sent. Needs no data of the site, touches none, and
    sends nothing. Takes seconds. Ends with status 1 when more is leaked than claimed.
    """
    import json

    from client.audit_privacy import LIMITS, as_json, report, what_to_audit
    from core.device import resolve_device
    from core.privacy.canaries import audit as attack

    privacy, steps = what_to_audit(recipe)
    place = resolve_device(device)
    if json_output:
        verdict = attack(privacy, canaries=canaries, steps=steps, device=place)
        typer.echo(json.dumps(as_json(verdict, privacy, steps, place), indent=1))
    else:
        with console.status(f"attacking {steps} private steps on {canaries:,} canaries"):
            verdict = attack(privacy, canaries=canaries, steps=steps, device=place)
        for line in (*report(verdict), LIMITS):
            console.print(line, soft_wrap=True, highlight=False)
    if verdict.flagged:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fedmermed-site` script."""
    run_command_line(app)


if __name__ == "__main__":
    main()
