"""`fedmermed-site`: what a hospital's operator types. Each command is one small function."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from core.console import new_app, run_command_line
from core.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from core.shards import Shard

app = new_app("Prepare a site's images, look at them, and join a study.")
console = Console()


@app.command()
def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE... SHARD",
            help="npz files, one image folder, or one CSV; last, the shard directory to write.",
        ),
    ],
    modality: Annotated[
        str | None,
        typer.Option(help="Modality of all images, where names or folders do not tell it."),
    ] = None,
    px: Annotated[
        int, typer.Option(help="Side of the square images to make from a folder or CSV, in pixels.")
    ] = 64,
    name: Annotated[
        str | None, typer.Option(help="Name of the shard; its folder's name if not given.")
    ] = None,
) -> None:
    """Turn npz files, a folder of images, or a CSV list of images into one shard.

    Name the sources first and the shard directory to write last.

    A folder is laid out as modality/class/file or modality/file; with --modality, as class/file.
    A CSV has the columns image_path,modality[,label,split,patient].
    """
    from client.prepare import read_sources
    from core.shards import check_target, write_shard

    if len(paths) < 2:
        raise UserError("expected at least one SOURCE and then the SHARD to write; see --help")
    *sources, target = paths
    name = name or target.absolute().name
    check_target(target, name)  # before hours of decoding
    shard = read_sources(sources, name, px, modality, console)
    write_shard(target, shard)
    _print_summary(shard, target)


@app.command()
def phantoms(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write one site for each modality.")
    ],
    patients: Annotated[int, typer.Option(help="Patients of each site.")] = 40,
    images_per_patient: Annotated[int, typer.Option(help="Images of each patient.")] = 5,
    px: Annotated[int, typer.Option(help="Side of the square images, in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
) -> None:
    """Draw seven sites of synthetic, labelled images into DIR: a first run needs no download."""
    from core.modalities import MODALITIES, TITLES
    from core.phantoms import make_phantoms
    from core.shards import write_shard

    for modality in MODALITIES:
        with console.status(f"drawing {TITLES[modality]}"):
            shard = make_phantoms(
                modality, patients=patients, images_per_patient=images_per_patient, px=px, seed=seed
            )
            write_shard(directory / modality, shard)
        console.print(f"{TITLES[modality]}: {len(shard.images):,} images in {directory / modality}")


@app.command()
def download(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the npz files.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="A MedMNIST set; repeat for more. All seven if not given."),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the images: 28, 64, 128 or 224 pixels.")] = 28,
) -> None:
    """Download MedMNIST sets into DIR from their official record; a stopped download continues."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from core.medmnist import SETS, check_set

    names = sets or list(SETS)
    for name in names:
        check_set(name, size)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        for name in names:
            _download_with_bar(bars, directory, name, size)
    console.print(f"{len(names)} checked files in {directory}; train with --data {directory}")


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="SHARD", help="A shard directory.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a picture of sample images to this PNG file.")
    ] = None,
) -> None:
    """Check every byte of the shard directory SHARD and say what it holds."""
    from client.contact_sheet import write_sheet
    from core.shards import open_shard

    shard = open_shard(directory, verify=True)
    _print_summary(shard, directory)
    if sheet:
        write_sheet(sheet, shard)
        console.print(f"sample images: {sheet}")


def _download_with_bar(bars: "Progress", directory: Path, name: str, size_px: int) -> None:
    from core.medmnist import download_set

    task = bars.add_task(name, total=None)

    def show_progress(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total or None)

    path = download_set(directory, name, size_px, show_progress)
    whole = path.stat().st_size
    bars.update(task, completed=whole, total=whole)


def _print_summary(shard: "Shard", where: Path) -> None:
    """A table of images by modality, class and split."""
    from rich.table import Table

    from core.modalities import MODALITIES, TITLES
    from core.shards import SPLITS

    table = Table(title=f"shard {shard.name}", title_justify="left")
    for heading in ("modality", "class"):
        table.add_column(heading)
    for heading in (*SPLITS, "all"):
        table.add_column(heading, justify="right")
    columns = (shard.modality.tolist(), shard.label.tolist(), shard.split.tolist())
    counts = Counter(zip(*columns, strict=True))
    for modality, classes in shard.classes.items():
        index = MODALITIES.index(modality)
        for label, name in [*enumerate(classes), (-1, "no label")]:
            row = [counts[index, label, split] for split in SPLITS]
            if any(row):
                table.add_row(TITLES[modality], name, *(f"{n:,}" for n in (*row, sum(row))))
    console.print(table)
    px, channels = shard.images.shape[1], shard.images.shape[3]
    console.print(
        f"{len(shard.images):,} images of {len(set(shard.patient.tolist())):,} patients, {px} px, "
        f"{'grey' if channels == 1 else 'colour'}: {where}",
        soft_wrap=True,
    )


def main() -> None:
    """Entry point of the `fedmermed-site` script."""
    run_command_line(app)


if __name__ == "__main__":
    main()
