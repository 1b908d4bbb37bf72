"""A whole federation on one machine: data, site files, engine, summary."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from core.checkpoint import read_json, write_atomically, write_json
from core.config import Recipe, load_recipe
from core.errors import UserError
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.shards import Shard, write_shard
from core.sites import open_site, open_sites, training_images
from server.engines import ENGINES, EngineName
from server.history import open_run, read_history
from server.privacy_cost import say_cost
from server.progress import shown_progress
from server.roster import SITE_NAME
from server.site_privacy import require_room
from server.summary import summarise

PHANTOM_PATIENTS = 105
PHANTOM_IMAGES = 3
"""Images of a patient: seven hospitals of 315 images, 225 of them to train on."""


def simulate(
    recipe_file: Path,
    *,
    data: Path | None = None,
    out: Path | None = None,
    engine: EngineName = EngineName.INPROCESS,
    seed: int | None = None,
) -> Path:
    """Run a federation to its end, or resume it; a finished one is only summed up.

    Args:
        recipe_file: The recipe.
        data: Directory of shards or npz files; without it seven phantom hospitals are drawn.
        out: Run directory; without it runs/<recipe name>.
        engine: What brings server and sites together.
        seed: Takes the place of the recipe's.

    Returns:
        The run directory, with summary.json, summary.png and model.safetensors.

    Raises:
        UserError: bad input, or a round missed its quorum.
    """
    recipe = load_recipe(recipe_file)
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    out = out or Path("runs") / recipe.name
    sites = open_sites(data) if data is not None else {}
    check_sites(list(sites) or _phantom_names(), recipe)
    run = open_run(out, recipe)
    console = Console()
    _remember_data(out, data)
    paths = place_data(out, data, sites) if data is not None else _draw_phantoms(out, recipe)
    site_files = [write_site_file(out, name, path, recipe) for name, path in paths.items()]
    done = len(read_history(out))
    if done < recipe.federation.rounds:
        say_cost(console, run, recipe)
        with shown_progress(console, recipe, len(site_files), done):
            ENGINES[engine](out, site_files)
    summarise(out, recipe, paths, engine=str(engine), console=console)
    return out


def check_sites(names: list[str], recipe: Recipe) -> None:
    """Refuse too few sites, too many, and names that cannot be a site's."""
    require_room(recipe, 1, len(names))
    if len(names) < recipe.federation.min_sites:
        raise UserError(
            f"the recipe needs {recipe.federation.min_sites} sites (federation.min_sites), but the "
            f"data hold {len(names)}; lower it or give more data"
        )
    for name in names:
        if not SITE_NAME.fullmatch(name):
            raise UserError(
                f"'{name}' cannot be a site's name; rename it: letters, digits, '.', '_' and '-'"
            )


def _phantom_names() -> list[str]:
    return [f"hospital-{modality}" for modality in MODALITIES]


def _remember_data(out: Path, data: Path | None) -> None:
    """Refuse to resume a run on other data than it began with."""
    facts, file = {"data": str(data.resolve()) if data else "phantoms"}, out / "data.json"
    if not file.exists():
        write_json(file, facts)
    elif (before := read_json(file)) != facts:
        raise UserError(
            f"'{out}' began with data '{before['data']}', now it is given '{facts['data']}'; "
            "give another --out, or the same --data"
        )


def place_data(out: Path, data: Path, sites: Mapping[str, list[Shard]]) -> dict[str, Path]:
    """Directory of each site's shards; npz files become shards under OUT/data first."""
    if (data / "manifest.json").exists():
        return dict.fromkeys(sites, data)
    if not any(data.glob("[!.]*.npz")):
        return {name: data / name for name in sites}
    for name, shards in sites.items():
        for shard in shards:
            if not (out / "data" / name / shard.name / "manifest.json").exists():
                write_shard(out / "data" / name / shard.name, shard)
    return {name: out / "data" / name for name in sites}


def _draw_phantoms(out: Path, recipe: Recipe) -> dict[str, Path]:
    """Seven phantom hospitals, a modality each; the same for every seed of a recipe."""
    paths = {name: out / "data" / name for name in _phantom_names()}
    for index, (modality, path) in enumerate(zip(MODALITIES, paths.values(), strict=True)):
        if not (path / "manifest.json").exists():
            shard = make_phantoms(
                modality,
                patients=PHANTOM_PATIENTS,
                images_per_patient=PHANTOM_IMAGES,
                px=recipe.views.global_px,
                seed=index,
            )
            write_shard(path, shard)
    return paths


def write_site_file(out: Path, name: str, shards: Path, recipe: Recipe) -> Path:
    """OUT/sites/NAME/site.toml, as a hospital would write it; one that is there is kept.

    Every engine gives a site the same number of threads, and one device: equal bits.
    """
    file = out / "sites" / name / "site.toml"
    path = str(shards.resolve())
    if file.exists():
        if tomllib.loads(file.read_text(encoding="utf-8")).get("shards") != [path]:
            raise UserError(f"'{file}' names other shards than '{path}'; give another --out")
        return file
    text = (
        f"name = {json.dumps(name)}\n"
        f"shards = [{json.dumps(path)}]\n"
        f"threads = {len(os.sched_getaffinity(0))}\ndevices = 1\n"
        "\n[policy]\n"
        f"min_patients_per_prototype = {recipe.federation.prototype_min_patients}\n"
    )
    if recipe.privacy.mode == "record":
        declared = training_images(open_site(shards))
        text += "".join(f"declared_images.{m} = {count}\n" for m, count in declared.items())
    write_atomically(file, text.encode())
    return file
