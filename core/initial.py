"""The global state before the first round."""

from pathlib import Path
from typing import cast

import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from core.backbone import BACKBONE, Network, initialise
from core.checkpoint import load_arrays
from core.config import Recipe
from core.errors import UserError
from core.randomness import torch_generator
from core.train import OnStep, network_arrays
from core.wire import TEACHER, GlobalState, take

POSITION = f"{BACKBONE}pos_embed"


def initial_state(
    recipe: Recipe,
    on_step: OnStep | None = None,
    *,
    device: str = "cpu",
    keep: Path | None = None,
) -> GlobalState:
    """The state before round 1: drawn, pretrained on phantoms, or read from `model.init_file`.

    Args:
        recipe: The study.
        on_step: Progress of `model.phantom_steps`.
        device: Where it pretrains, a torch device name; the state is on the CPU.
        keep: What pretraining goes on from if it is killed, as for `core.pretrain.pretrain`.

    Raises:
        UserError: the init file does not fit the backbone, or it cannot be pretrained.
    """
    if recipe.model.phantom_steps:
        from core.pretrain import Pretraining, pretrain

        settings = Pretraining.of(recipe)
        network = pretrain(recipe, settings, device=device, on_step=on_step, keep=keep)
    else:
        network = Network.of(recipe)
        initialise(network, torch_generator(recipe.seed, "initial"))
    if recipe.model.init_file:
        _load_pretrained(network, Path(recipe.model.init_file))
    arrays = network_arrays(network)
    return GlobalState(student=arrays, teacher={name: a.copy() for name, a in arrays.items()})


def _load_pretrained(network: Network, path: Path) -> None:
    """Copy weights in: those of a timm backbone, or all of another run's teacher.

    Position embeddings are resampled to our grid. Heads that the file has not, or in another shape,
    stay as they were drawn.
    """
    arrays, _ = load_arrays(path)
    teacher = take(arrays, TEACHER) or {f"{BACKBONE}{name}": a for name, a in arrays.items()}
    own = network.state_dict()
    weights = {name: torch.from_numpy(array) for name, array in teacher.items() if name in own}
    position = weights.get(POSITION)
    if position is not None and position.shape != own[POSITION].shape:
        prefix = cast(int, network.backbone.num_prefix_tokens)
        side = int((own[POSITION].shape[1] - prefix) ** 0.5)
        weights[POSITION] = resample_abs_pos_embed(position, [side, side], num_prefix_tokens=prefix)
    fits = {name: w for name, w in weights.items() if w.shape == own[name].shape}
    needed = [name for name in own if name.startswith(BACKBONE)]
    if wrong := sorted(set(needed) - set(fits)):
        raise UserError(
            f"model.init_file '{path}' does not fit the backbone: {len(wrong)} of {len(needed)} "
            f"weights are missing or of another shape, first '{wrong[0].removeprefix(BACKBONE)}'; "
            "give the file of the same timm model"
        )
    network.load_state_dict(own | fits)
