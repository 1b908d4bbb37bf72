"""The order of the checks, and which need which."""

from collections.abc import Sequence
from pathlib import Path

from client.check import data, machine, network, training
from client.check.connection import target_of
from client.check.findings import Finding, Status, from_error, green, yellow
from client.check.table import Board
from client.join import check_private_key
from client.site import Coordinator, SiteConfig
from core.config import Recipe, load_recipe
from core.errors import UserError
from core.shards import Shard


def check_site(
    board: Board, site_file: Path, site: SiteConfig, recipe_file: Path | None
) -> Recipe | None:
    """Run all checks in turn; each leaves its finding on the board.

    Args:
        board: Where findings go.
        site_file: The site's file.
        site: The same, read.
        recipe_file: The study's recipe; without it, the one that the site file names.

    Returns:
        The recipe, if there is a readable one.
    """
    board.run("site file", data.site_file, site_file, site)
    board.run("state directory", data.state_directory, site.state_path)
    recipe = _recipe(board, site.coordinator, recipe_file)
    directories, shards = _shards(board, site)
    whole = len(shards) == len(directories)
    if recipe and whole:
        board.run("picture size", data.picture_size, recipe, shards)
        board.run("CT window", data.ct_window, recipe, directories, shards)
        board.run("policy", data.policy, site, recipe, shards)
        board.run("patients", data.patients, site, recipe, shards)
    board.run("rounds left", data.budget, site, recipe)
    if recipe:
        board.run("privacy", data.privacy, site, recipe)
    _coordinator(board, site.coordinator)
    _machine(board, site_file, site, recipe, whole=whole)
    return recipe


def _recipe(board: Board, coordinator: Coordinator, given: Path | None) -> Recipe | None:
    path = given or (Path(coordinator.recipe) if coordinator.recipe else None)
    if path is None:
        board.findings["recipe"] = yellow(
            "none given: size, policy, training step and its memory, disk and time not tried",
            "Ask the coordinator for the study's recipe and type: "
            "fedmermed-site check SITE.toml --recipe RECIPE",
        )
        return None
    try:
        recipe = load_recipe(path)
    except UserError as error:
        board.findings["recipe"] = from_error(error)
        return None
    board.run("recipe", data.recipe_facts, recipe)
    return recipe


def _shards(board: Board, site: SiteConfig) -> tuple[list[Path], Sequence[Shard]]:
    directories = [d for path in site.shard_paths for d in data.shard_directories(path)]
    opened: list[Shard] = []
    for number, directory in enumerate(directories, start=1):
        name = f"shard {directory.name}"
        if name in board.findings:  # two entries may hold directories of one name
            name += f" ({number})"
        board.run(name, data.read_shard, directory, opened)
    return directories, opened


def _coordinator(board: Board, coordinator: Coordinator) -> None:
    if coordinator.superlink is None:
        board.findings["coordinator"] = yellow(
            "not configured: port, TLS, fleet path and clock not tried",
            "Add [coordinator] with superlink and root_certificates to the site file; see "
            "configs/sites/example.toml.",
        )
    else:
        target = target_of(coordinator.superlink, coordinator.root_certificates)
        steps = {
            "coordinator": network.reach,
            "TLS": network.certificate,
            "fleet path": network.fleet,
        }
        for name, check in steps.items():
            if board.run(name, check, target).status == Status.RED:
                break
        else:
            board.run("control path", network.control, target)
        if (tls := board.findings.get("TLS")) and tls.status != Status.RED:
            board.run("clock", network.clock, target)
    if coordinator.private_key is not None:
        board.run("site key", _site_key, Path(coordinator.private_key))
    if coordinator.health is not None:
        board.run("health", network.health, coordinator.health)


def _site_key(file: Path) -> Finding:
    check_private_key(file)
    return green(f"'{file}', private")


def _machine(
    board: Board, site_file: Path, site: SiteConfig, recipe: Recipe | None, *, whole: bool
) -> None:
    board.run("CPU", machine.processors, site)
    board.run("shared memory", machine.shared_memory)
    trains = recipe is not None and whole
    with board.running("one training step" if trains else "device"):
        measured = training.measure(site_file, recipe if trains else None)
    board.run("device", machine.device, site, measured)
    if measured.foretold_bytes and measured.free_bytes:
        board.run("step memory", training.step_fits, measured)
    if trains and measured.device:
        board.run("training step", training.step, measured)
    elif recipe:
        board.findings["training step"] = yellow(
            "not tried", "Mend the shards and the device first; they are red above."
        )
    if recipe and measured.step_seconds:
        board.run("memory", machine.memory, measured)
        board.run("time", training.round_time, recipe, measured)
    board.run("disk", machine.disk, site.state_path, measured)
