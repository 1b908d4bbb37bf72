"""`fedmermed-site prepare`, `phantoms`, `download`, `show`: from an archive to a shard."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from core.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from core.shards import Shard

console = Console()


def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE... SHARD",
            help="Directories, files, CSV lists, or npz files; last, the shard directory to write.",
        ),
    ],
    modality: Annotated[
        str | None,
        typer.Option(help="Of files that do not tell: neither their header, folder nor CSV."),
    ] = None,
    px: Annotated[
        int | None, typer.Option(show_default="64", help="Side of the square pictures.")
    ] = None,
    ct_window: Annotated[
        str | None,
        typer.Option(
            metavar="CENTRE,WIDTH",
            show_default="40,400",
            help="Hounsfield units that CT shows from black to white.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The study's recipe: gives pixels and CT window.")
    ] = None,
    labels: Annotated[
        str,
        typer.Option(metavar="none|folder", help="folder: the one that holds a file is its class."),
    ] = "none",
    patients: Annotated[
        str,
        typer.Option(
            metavar="file|folder",
            help="Whose a file without a PatientID is: a patient's of its own, or its folder's.",
        ),
    ] = "file",
    burned_in: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=POLICY",
            show_default="declared=skip screen=skip ultrasound=mask photo=mask other=mask",
            help="What to do with text in the pixels: skip, mask or accept, for a class of images: "
            "declared, screen, ultrasound, photo or other; repeat it, or give one policy for all.",
        ),
    ] = None,
    duplicates: Annotated[
        str, typer.Option(metavar="remove|keep", help="Copies and near copies of pictures.")
    ] = "remove",
    frames: Annotated[int, typer.Option(help="Most pictures of one cine or volume.")] = 16,
    tiles: Annotated[int, typer.Option(help="Most pictures of one slide.")] = 200,
    jobs: Annotated[
        int | None, typer.Option(min=1, show_default="one a core", help="Files read at a time.")
    ] = None,
    memory: Annotated[
        float, typer.Option(min=1, help="GiB of memory that reading one file may take.")
    ] = 4,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that reading one file may take.")
    ] = 120,
    secret: Annotated[
        Path | None,
        typer.Option(
            show_default="patients.secret beside the shard",
            help="Key that turns patients into hashes; drawn if missing. Keep it safe.",
        ),
    ] = None,
    sheets: Annotated[
        bool, typer.Option("--sheets/--no-sheets", help="Sample pictures in the report.")
    ] = True,
    name: Annotated[
        str | None, typer.Option(help="Name of the shard; its folder's name if not given.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, whatever has been prepared there.")
    ] = False,
) -> None:
    """Turn an archive of images into one shard that trains, and a report beside it.

    Name the sources first and the shard directory to write last. Sources may hold DICOM, PNG, JPEG
    and TIFF files, NIfTI volumes and whole slides in any order; what is no image, damaged or
    unwanted is counted with its reason. After a stop or a crash, the same command continues.

    A first folder below a source that is named like a modality (ct, cxr, us, pathology, cfp, oct,
    dermatology) gives its files that modality. A CSV has the columns
    image_path,modality[,label,split,patient]. npz files are joined as they are.
    """
    from client.ingest.command import join_npz, prepare_files
    from client.ingest.options import parse_rules

    if len(paths) < 2:
        raise UserError("expected at least one SOURCE and then the SHARD to write; see --help")
    *sources, target = paths
    name = name or target.absolute().name
    rules = parse_rules(
        modality=modality,
        px=px,
        ct_window=ct_window,
        recipe=recipe,
        labels=labels,
        patients=patients,
        burned_in=burned_in or (),
        duplicates=duplicates,
        frames=frames,
        tiles=tiles,
    )
    if any(source.suffix == ".npz" for source in sources):
        if px is not None or recipe is not None:
            raise UserError("npz files keep their pixels; leave --px and --recipe out")
        _print_summary(join_npz(sources, target, name, modality, console, restart), target)
        return
    prepare_files(
        sources,
        target,
        name,
        rules,
        secret or target.absolute().with_name("patients.secret"),
        console,
        jobs=jobs,
        memory_gib=memory,
        timeout_s=timeout,
        sheets=sheets,
        restart=restart,
    )


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
