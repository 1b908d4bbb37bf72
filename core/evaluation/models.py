"""Any backbone an evaluator may hand over: ours, or a timm name with a local weight file.

Nothing is ever downloaded, and no pickle is run: torch files are read with `weights_only=True`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import nn

from core.backbone import use_plain_attention
from core.checkpoint import read_json, sha256_file
from core.config import load_recipe
from core.errors import UserError
from core.evaluate import Features, MeanStd, extract, pixel_batches
from core.evaluation.weights import build, check_name, read_weights
from core.export import Counted, Model, load_model
from core.modalities import MEAN_STD

HUGGING_FACE_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
BY_MODALITY: Final = "mean_std_by_modality"
"""Key of our config.json: the model expects each modality's own pixel statistics."""


@dataclass(frozen=True)
class LoadedModel:
    """A backbone ready to be measured, and where it came from.

    Attributes:
        name: for tables.
        kind: "run", "export", "random" or "start" (a recipe's weights before round 1,
            drawn or pretrained) or "timm".
        model: backbone, input size, and the arguments of timm.create_model.
        path: the file whose content decides.
        sha256: of that file.
        parameters: how many numbers the backbone holds.
        mean_std: pixel statistics it was trained with; None: those of each modality.
        note: what was chosen while reading the file, for the reader; often empty.
    """

    name: str
    kind: str
    model: Model
    path: Path
    sha256: str
    parameters: int
    mean_std: MeanStd | None = None
    note: str = ""


def open_model(spec: str, device: str = "cpu", on_step: Counted | None = None) -> LoadedModel:
    """Load a backbone.

    Args:
        spec: a path that `core.export.load_model` takes; a directory with timm's config.json and
            weights; or `NAME:WEIGHTS`, a timm name and a .safetensors or torch file, such as
            `vit_small_patch16_224:dino.pth`. `NAME@64:WEIGHTS` asks for an input of 64 pixels
            instead of the size the weights were trained at; position embeddings are resized.
        device: a torch device name.
        on_step: as for `core.export.load_model`.

    Raises:
        UserError: nothing is there, timm does not know the name, the file cannot be read without
            running code from it, or its weights are of another architecture.
    """
    path = Path(spec)
    if path.is_dir() and (path / "config.json").exists():
        return _hugging_face(path, device)
    if path.exists() or ":" not in spec:
        return _own(path, device, on_step)
    name, _, file = spec.partition(":")
    name, at, px = name.partition("@")
    if at and not (px.isdigit() and int(px) > 0):
        raise UserError(f"'{spec}': expected a number of pixels after '@', found '{px}'")
    return _timm(name, Path(file), device, px=int(px) if at else None)


def features(
    loaded: LoadedModel, images: NDArray[np.uint8], modality: str, *, last_blocks: int
) -> Features:
    """Frozen features of images of one modality, float32 [N, F].

    Vision transformers with a class token give what `core.evaluate.extract` gives; every other
    network gives its pooled output, whatever `last_blocks` says, over the two mirror images too.

    Args:
        loaded: the model.
        images: uint8 [N, H, W, C]; a memory map is read batch by batch.
        modality: whose mean and deviation normalise, unless the model has its own.
        last_blocks: how many blocks to take; all, if there are fewer.
    """
    backbone, px = loaded.model.backbone, loaded.model.px
    device = next(backbone.parameters()).device
    # About as many pixels a pass at any size; a GPU wants more at once.
    batch_size = 256 if device.type == "cuda" else max(8, 128 * 64**2 // px**2)
    if _has_tokens(backbone):
        return extract(
            backbone, images, modality, px,
            last_blocks=last_blocks, batch_size=batch_size, mean_std=loaded.mean_std,
        )  # fmt: skip
    with torch.inference_mode():
        statistics = loaded.mean_std or MEAN_STD[modality]
        batches = pixel_batches(images, statistics, px, device, batch_size)
        rows = [
            ((backbone(pixels) + backbone(pixels.flip(-1))) / 2).float().cpu().numpy()
            for pixels in batches
        ]
    return np.concatenate(rows)


def feature_blocks(loaded: LoadedModel, last_blocks: int) -> int:
    """Of how many equal parts `features` makes a row: blocks taken, or 1 for a pooled output."""
    backbone = loaded.model.backbone
    return min(last_blocks, len(backbone.blocks)) if _has_tokens(backbone) else 1  # type: ignore[arg-type]


def _has_tokens(backbone: nn.Module) -> bool:
    """Whether `extract` can serve it: blocks, a class token, and both kinds of tokens returned."""
    forward = getattr(backbone, "forward_intermediates", None)
    return (
        hasattr(backbone, "blocks")
        and getattr(backbone, "cls_token", None) is not None
        and forward is not None
        and "return_prefix_tokens" in inspect.signature(forward).parameters
    )


def _own(path: Path, device: str, on_step: Counted | None) -> LoadedModel:
    if not path.exists():
        _refuse_name_alone(str(path))
    kind, name = _kind_and_name(path)
    file = max(path.glob("round-*.safetensors"), default=path) if path.is_dir() else path
    return _loaded(name, kind, load_model(file, device, on_step), file)


def _kind_and_name(path: Path) -> tuple[str, str]:
    stem, parent = path.stem, path.resolve().parent.name
    if path.suffix == ".toml":
        model = load_recipe(path).model
        drawn = not (model.phantom_steps or model.init_file)
        return ("random", f"random init ({stem})") if drawn else ("start", f"start ({stem})")
    if path.is_dir():
        return "run", path.resolve().name
    if (path.parent / "recipe.json").exists() and stem.startswith("round-"):
        return "run", f"{parent} {stem}"
    try:
        with safe_open(path, framework="numpy") as file:
            ours = "timm" in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = path.suffix == ".safetensors"  # damaged: load_model says how
    if not ours:
        raise UserError(
            f"'{path}' does not say its architecture; put its timm name before it, such as "
            f"'vit_small_patch16_224:{path}'"
        )
    return "export", parent if stem == "model" else stem


def _hugging_face(directory: Path, device: str) -> LoadedModel:
    config = read_json(directory / "config.json")
    files = [directory / name for name in HUGGING_FACE_WEIGHTS if (directory / name).exists()]
    if not files or not isinstance(config, dict) or "architecture" not in config:
        raise UserError(
            f"'{directory}' is not a timm model directory: expected config.json with "
            f"'architecture' and one of {', '.join(HUGGING_FACE_WEIGHTS)}"
        )
    statistics = config.get("pretrained_cfg", config)
    return _timm(
        config["architecture"], files[0], device,
        px=int(statistics["input_size"][-1]) if "input_size" in statistics else None,
        options=config.get("model_args", {}),
        mean_std=(tuple(statistics["mean"]), tuple(statistics["std"]))
        if "mean" in statistics and "std" in statistics else None,
        by_modality=BY_MODALITY in config, name_shown=directory.resolve().name,
    )  # fmt: skip


def _timm(
    name: str, file: Path, device: str, *, px: int | None = None,
    options: Mapping[str, Any] | None = None, mean_std: MeanStd | None = None,
    by_modality: bool = False, name_shown: str = "",
) -> LoadedModel:  # fmt: skip
    check_name(name)
    config = timm.get_pretrained_cfg(name) or PretrainedCfg()
    classifiers = [config.classifier] if isinstance(config.classifier, str) else config.classifier
    weights = read_weights(file, tuple(classifiers or ()))
    px = px or int(config.input_size[-1])
    arguments = {**(options or {}), "model_name": name, "num_classes": 0}
    if config.fixed_input_size:
        arguments["img_size"] = px
    backbone = build(arguments, weights.tensors, file, px)
    if device == "cpu":
        use_plain_attention(backbone)
    model = Model(backbone.to(device).eval(), px, arguments)
    mean_std = None if by_modality else mean_std or (tuple(config.mean), tuple(config.std))
    return _loaded(name_shown or name, "timm", model, file, mean_std, weights.note)


def _refuse_name_alone(spec: str) -> None:
    if timm.is_model(spec.partition("@")[0].partition(".")[0]):
        raise UserError(
            f"'{spec}' is a timm name without weights, and nothing is downloaded; give a local "
            f"file: '{spec}:WEIGHTS.safetensors'"
        )
    raise UserError(f"model '{spec}' does not exist; check the path, or give TIMM_NAME:WEIGHTS")


def _loaded(
    name: str, kind: str, model: Model, file: Path, mean_std: MeanStd | None = None, note: str = ""
) -> LoadedModel:
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    return LoadedModel(
        name, kind, model, file, sha256_file(file), parameters, mean_std=mean_std, note=note
    )
