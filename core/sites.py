"""Whose shards are whose: a data directory read as sites."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from core.errors import UserError
from core.import_npz import read_npz
from core.modalities import MODALITIES
from core.shards import Shard, open_shard

REPORT_SUFFIX: Final = ".report"
"""Ends the names of the directories that 'fedmermed-site prepare' writes beside its shards."""
MAKE_SHARDS: Final = "make shards with 'fedmermed-site prepare' or 'fedmermed-site phantoms'"


def open_site(directory: Path) -> list[Shard]:
    """Open one site's shards: the directory is a shard itself, or each sub-directory is one.

    Raises:
        UserError: the directory is missing or holds no shard, a shard cannot be opened, or the
            shards do not go together (see `open_sites`).
    """
    if not directory.is_dir():
        raise UserError(f"data directory '{directory}' does not exist; check the path")
    if (directory / "manifest.json").exists():
        return [open_shard(directory)]
    shards = [open_shard(path) for path in sub_directories(directory)]
    if not shards:
        raise UserError(f"'{directory}' holds no shard (no manifest.json); {MAKE_SHARDS}")
    _check_together(directory.name, shards)
    return shards


def open_sites(data: Path) -> dict[str, list[Shard]]:
    """Open a data directory, as `--data DIR` takes it: site name -> its shards.

    The directory is one of
    - npz files (MedMNIST keys) whose names begin with a modality or a MedMNIST set, such as
      `cxr_nih_64.npz`, `path_lung.npz`, `octmnist_64.npz`: one site a modality, named by it,
      with one shard in memory per file;
    - sub-directories: each is a site, and is a shard itself or holds several;
    - a single shard: one site, named by the shard.
    Names that begin with a dot and reports are passed over.

    Raises:
        UserError: the directory is missing or is none of these (or mixes them), a file cannot be
            read, or one site's shards differ in pixel size or in the classes of a modality.
    """
    if not data.is_dir():
        raise UserError(f"data directory '{data}' does not exist; check the path")
    if (data / "manifest.json").exists():
        shard = open_shard(data)
        return {shard.name: [shard]}
    files = sorted(data.glob("[!.]*.npz"))
    if not files:
        sites = {path.name: open_site(path) for path in sub_directories(data)}
        if not sites:
            raise UserError(f"'{data}' holds neither npz files nor shards; {MAKE_SHARDS}")
        return sites
    if any(data.glob("[!.]*/manifest.json")):
        raise UserError(f"'{data}' holds npz files and shards; keep one kind in a directory")
    return _npz_sites(files)


def sub_directories(directory: Path) -> list[Path]:
    """Where shards or sites may be: neither hidden directories nor reports of `prepare`."""
    return [p for p in sorted(directory.glob("[!.]*/")) if p.suffix != REPORT_SUFFIX]


def training_images(shards: Sequence[Shard]) -> dict[str, int]:
    """Modality -> images to train on."""
    counts: Counter[int] = Counter()
    for shard in shards:
        counts.update(shard.modality[shard.split == "train"].tolist())
    return {MODALITIES[modality]: counts[modality] for modality in sorted(counts)}


def training_patients(shards: Sequence[Shard]) -> dict[str, int]:
    """Modality -> patients of these images; one who is in two shards counts twice."""
    counts: Counter[str] = Counter()
    for shard in shards:
        for modality in training_images([shard]):
            rows = (shard.modality == MODALITIES.index(modality)) & (shard.split == "train")
            counts[modality] += len(set(shard.patient[rows].tolist()))
    return dict(counts)


def _npz_sites(files: list[Path]) -> dict[str, list[Shard]]:
    sites: dict[str, list[Shard]] = {}
    for file in files:
        shard = read_npz(file)
        sites.setdefault(next(iter(shard.classes)), []).append(shard)
    for name, shards in sites.items():
        _check_together(name, shards)
    return {name: sites[name] for name in sorted(sites, key=MODALITIES.index)}


def _check_together(site: str, shards: list[Shard]) -> None:
    px = {shard.name: shard.images.shape[1] for shard in shards}
    if len(set(px.values())) > 1:
        found = ", ".join(f"'{name}' {size} px" for name, size in px.items())
        raise UserError(f"site '{site}' mixes pixel sizes ({found}); keep one size in a site")
    labelled = [(m, shard) for shard in shards for m, names in shard.classes.items() if names]
    first: dict[str, Shard] = {}
    for modality, shard in labelled:
        other = first.setdefault(modality, shard)
        if other.classes[modality] != shard.classes[modality]:
            raise UserError(
                f"site '{site}': '{other.name}' and '{shard.name}' name different classes for "
                f"'{modality}'; make them two sites"
            )
