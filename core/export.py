"""The released form of a model: the teacher's backbone alone, under timm's names."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.backbone import BACKBONE, create_backbone, use_plain_attention
from core.checkpoint import load_arrays, read_json, save_arrays
from core.config import ModelConfig, Recipe, load_recipe, recipe_from_json
from core.errors import UserError
from core.initial import initial_state
from core.modalities import MEAN_STD
from core.wire import GlobalState

Counted = Callable[[int, int], None]
"""Progress: called with what is done and with all there is to do."""


@dataclass(frozen=True)
class Model:
    """A backbone ready to embed images of `px` pixels a side."""

    backbone: nn.Module
    px: int
    arguments: dict[str, Any] = field(default_factory=dict)
    """What timm.create_model takes to build the backbone anew."""


def export_teacher(recipe: Recipe, state: GlobalState, out: Path) -> str:
    """Write the teacher's backbone as safetensors that timm loads; returns the file's sha256.

    The metadata hold the arguments of `timm.create_model` (key "timm", JSON), the input size, and
    each modality's mean and deviation, so that the file can be used without our code.
    """
    weights = {
        name.removeprefix(BACKBONE): array
        for name, array in state.teacher.items()
        if name.startswith(BACKBONE)
    }
    metadata = {
        "format": "pt",
        "timm": json.dumps(_arguments(recipe.model, recipe.views.global_px), sort_keys=True),
        "mean_std": json.dumps(MEAN_STD, sort_keys=True),
        "study": recipe.name,
    }
    return save_arrays(out, weights, metadata)


def load_model(path: Path, device: str = "cpu", on_step: Counted | None = None) -> Model:
    """Load what an evaluator may hand over.

    Args:
        path: an exported file; a run directory (its last round) or one of its round files (the
            teacher); or a recipe (.toml): the weights before round 1.
        device: where to put it.
        on_step: progress of a recipe that begins on phantoms, called with steps done and in all.

    Raises:
        UserError: the path is none of these, or its weights do not fit.
    """
    if path.suffix == ".toml":
        return _from_recipe(load_recipe(path), device, on_step)
    if path.is_dir():
        rounds = sorted(path.glob("round-*.safetensors"))
        if not rounds:
            raise UserError(
                f"'{path}' holds no round-*.safetensors; give a run directory or a file"
            )
        path = rounds[-1]
    arrays, metadata = load_arrays(path)
    if "timm" in metadata:
        call = json.loads(metadata["timm"])
        px = call.pop("img_size")
        name = call.pop("model_name")
        options = {k: v for k, v in call.items() if k not in ("num_classes", "dynamic_img_size")}
        config = ModelConfig(backbone=name, options=options)
        weights = arrays
    else:
        if not (recipe_file := path.parent / "recipe.json").exists():
            raise UserError(
                f"'{path}' is neither an exported model nor a round of a run directory; make one "
                "with 'fedmermed-server export RUN OUT.safetensors'"
            )
        recipe = recipe_from_json(json.dumps(read_json(recipe_file)), f"'{recipe_file}'")
        teacher = GlobalState.from_arrays(arrays).teacher
        weights = {
            n.removeprefix(BACKBONE): a for n, a in teacher.items() if n.startswith(BACKBONE)
        }
        config, px = recipe.model, recipe.views.global_px
    backbone = create_backbone(config, px)
    try:
        backbone.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' does not fit its own architecture: {detail}") from None
    return _ready(backbone, config, px, device)


def _arguments(config: ModelConfig, px: int) -> dict[str, Any]:
    return {
        "model_name": config.backbone,
        "num_classes": 0,
        "img_size": px,
        "dynamic_img_size": True,
        **config.options,
    }


def _from_recipe(recipe: Recipe, device: str, on_step: Counted | None) -> Model:
    backbone = create_backbone(recipe.model, recipe.views.global_px)
    told = (lambda done, steps, loss: on_step(done, steps)) if on_step else None
    teacher = initial_state(recipe, told, device=device).teacher
    weights = {n.removeprefix(BACKBONE): a for n, a in teacher.items() if n.startswith(BACKBONE)}
    backbone.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    return _ready(backbone, recipe.model, recipe.views.global_px, device)


def _ready(backbone: nn.Module, config: ModelConfig, px: int, device: str) -> Model:
    if device == "cpu":
        use_plain_attention(backbone)
    return Model(backbone.to(device).eval(), px, _arguments(config, px))
