"""What the report shows of the network itself: where it looks, what its prototypes stand for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.backbone import Network
from core.checkpoint import Arrays, load_arrays, read_json
from core.config import recipe_from_json
from core.errors import UserError
from core.evaluate import pixel_batches
from core.evaluation.models import LoadedModel
from core.modalities import MEAN_STD
from core.wire import GlobalState

BATCH = 32
"""Images a pass: the attention of all heads is held in full."""


@torch.inference_mode()
def attention_maps(
    loaded: LoadedModel, images: NDArray[np.uint8], modality: str
) -> NDArray[np.float32] | None:
    """How much the class token of the last block attends to each patch, mean over heads.

    Args:
        loaded: the model; plain attention is switched on for the call, since fused attention
            never forms the matrix.
        images: uint8 [N, H, W, C].
        modality: whose mean and deviation normalise, unless the model has its own.

    Returns:
        float32 [N, rows, columns]; what is missing to a sum of 1 goes to the class token itself
        and to registers. None if the network has no class token or its last block no softmax
        attention.
    """
    backbone: Any = loaded.model.backbone
    attention: Any = getattr(getattr(backbone, "blocks", [None])[-1], "attn", None)
    if not hasattr(attention, "attn_drop") or getattr(backbone, "cls_token", None) is None:
        return None
    rows: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weights = output[:, :, 0, backbone.num_prefix_tokens :]  # [B, heads, patches]
        rows.append(weights.mean(1).float().cpu())

    device = next(backbone.parameters()).device
    statistics = loaded.mean_std or MEAN_STD[modality]
    fused = attention.fused_attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(keep)
    try:
        for pixels in pixel_batches(images, statistics, loaded.model.px, device, BATCH):
            backbone(pixels)
    finally:
        handle.remove()
        attention.fused_attn = fused
    flat = torch.cat(rows)
    side = round(flat.shape[1] ** 0.5)
    maps: NDArray[np.float32] = flat.reshape(len(flat), side, side).numpy()
    return maps


@torch.inference_mode()
def prototype_maps(run: Path, images: Mapping[str, NDArray[np.uint8]]) -> Arrays:
    """The prototypes of a run's last round, and where the images of each task lie among them.

    Args:
        run: a run directory.
        images: "modality/shard" -> uint8 [N, H, W, C].

    Returns:
        For the maps file: "prototypes|<modality>" [K, D] and "counts|<modality>" [K], patients
        behind each, of the modalities in `images`; "embeddings|<task>" [N, D], unit rows of the
        teacher. Empty if the run keeps no prototypes of these modalities.

    Raises:
        UserError: the directory holds no round.
    """
    rounds = sorted(run.glob("round-*.safetensors"))
    if not rounds:
        raise UserError(f"'{run}' holds no round-*.safetensors; give a run directory")
    state = GlobalState.from_arrays(load_arrays(rounds[-1])[0])
    kept = {task: m for task in images if (m := task.split("/")[0]) in state.prototypes.counts}
    if not kept:
        return {}
    file = run / "recipe.json"
    recipe = recipe_from_json(json.dumps(read_json(file)), f"'{file}'")
    px = recipe.views.global_px
    network = Network(recipe.model, px)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in state.teacher.items()})
    network.eval()
    arrays: Arrays = {}
    for task, modality in kept.items():
        arrays[f"prototypes|{modality}"] = state.prototypes.centroids[modality]
        arrays[f"counts|{modality}"] = state.prototypes.counts[modality]
        cpu = torch.device("cpu")
        batches = pixel_batches(images[task], MEAN_STD[modality], px, cpu, BATCH)
        arrays[f"embeddings|{task}"] = torch.cat([network(pixels) for pixels in batches]).numpy()
    return arrays
