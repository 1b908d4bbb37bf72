"""A first backbone from drawn pictures, as a file for `model.init_file`."""

from pathlib import Path

from rich.console import Console

from core.config import load_recipe
from core.console import counting
from core.errors import UserError


def pretrain_file(
    recipe_file: Path,
    out: Path,
    *,
    steps: int,
    batch: int,
    phantoms: int,
    device: str,
    seed: int | None,
) -> str:
    """Pretrain a recipe's backbone on phantoms and write it; returns the file's sha256.

    Killed and called again, it goes on where it was a minute before, from OUT.pretraining.

    Args:
        recipe_file: whose model, views and seed count; its `init_file` does not.
        out: an exported model (.safetensors), which `fedmermed-eval` measures too.
        steps: how many.
        batch: pictures of each, 7 or more.
        phantoms: different pictures of each modality.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        seed: in place of the recipe's.

    Raises:
        UserError: torch is not installed, or the backbone has no class token or no square grid.
    """
    recipe = load_recipe(recipe_file)
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    try:
        from core.device import resolve_device
        from core.export import export_teacher
        from core.pretrain import Pretraining, pretrain
        from core.train import network_arrays
    except ModuleNotFoundError as error:
        raise UserError(
            f"pretraining needs torch and timm, but '{error.name}' is not installed; install "
            "fedmermed[site], or run this command where they are and bring the file here"
        ) from None
    from core.wire import GlobalState

    settings = Pretraining(steps, phantoms, batch)
    keep = out.with_name(f"{out.name}.pretraining")
    with counting(Console(stderr=True), "phantoms", steps, transient=True) as count:
        network = pretrain(
            recipe, settings, device=resolve_device(device), keep=keep,
            on_step=lambda done, steps, loss: count(done),
        )  # fmt: skip
    arrays = network_arrays(network)
    digest = export_teacher(recipe, GlobalState(student={}, teacher=arrays), out)
    keep.unlink(missing_ok=True)
    return digest
