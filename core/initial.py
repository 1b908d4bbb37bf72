"""The global state before the first round."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from core.backbone import Network, initialise
from core.checkpoint import load_arrays
from core.config import Recipe
from core.errors import UserError
from core.randomness import torch_generator
from core.train import network_arrays
from core.wire import GlobalState


def initial_state(recipe: Recipe, on_step: Callable[[float], None] | None = None) -> GlobalState:
    """The state before round 1: drawn, pretrained on phantoms, or read from `model.init_file`.

    Args:
        recipe: The study.
        on_step: Progress of `model.phantom_steps`, called with the loss after each.

    Raises:
        UserError: the init file does not fit the backbone, or it cannot be pretrained.
    """
    if recipe.model.phantom_steps:
        from core.pretrain import Pretraining, pretrain

        network = pretrain(recipe, Pretraining(steps=recipe.model.phantom_steps), on_step=on_step)
    else:
        network = Network.of(recipe)
        initialise(network, torch_generator(recipe.seed, "initial"))
    if recipe.model.init_file:
        _load_pretrained(network, Path(recipe.model.init_file))
    arrays = network_arrays(network)
    return GlobalState(student=arrays, teacher={name: a.copy() for name, a in arrays.items()})


def _load_pretrained(network: Network, path: Path) -> None:
    """Copy a timm backbone's weights in; position embeddings are resampled to our grid."""
    arrays, _ = load_arrays(path)
    own = network.backbone.state_dict()
    weights = {name: torch.from_numpy(array) for name, array in arrays.items() if name in own}
    position = weights.get("pos_embed")
    if position is not None and position.shape != own["pos_embed"].shape:
        prefix = cast(int, network.backbone.num_prefix_tokens)
        side = int((own["pos_embed"].shape[1] - prefix) ** 0.5)
        weights["pos_embed"] = resample_abs_pos_embed(
            position, [side, side], num_prefix_tokens=prefix
        )
    wrong = sorted(n for n in own if n not in weights or weights[n].shape != own[n].shape)
    if wrong:
        raise UserError(
            f"model.init_file '{path}' does not fit the backbone: {len(wrong)} of {len(own)} "
            f"weights are missing or of another shape, first '{wrong[0]}'; give the file of the "
            "same timm model"
        )
    network.backbone.load_state_dict(weights)
