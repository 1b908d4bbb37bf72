"""A backbone for other people's tools: ONNX, and the directory layout of the Hugging Face Hub.

Both are checked against the model that we measured before anything is put in place.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from torch import Tensor, nn

from core.checkpoint import commit_directory, save_arrays, write_atomically, write_json
from core.errors import UserError
from core.evaluation.models import BY_MODALITY, LoadedModel
from core.modalities import MEAN_STD

TOLERANCE: Final = 1e-4
"""Largest accepted difference of a feature, in units of the largest feature."""
LAYOUT: Final = ("README.md", "config.json", "model.safetensors")


def export_onnx(loaded: LoadedModel, out: Path) -> float:
    """Write the backbone as one ONNX file: normalised images [B, 3, px, px] -> features [B, d].

    The features are the backbone's pooled output. The batch size is free. The file's metadata hold
    the pixel statistics, as JSON, and the sha256 of the weight file.

    Returns:
        The largest difference between onnxruntime's features and ours, on batches of 1 and 3.

    Raises:
        UserError: a library is missing, the exporter cannot translate the network, or onnxruntime
            gives other features; `out` is then left as it was.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter asks for it)
    except ImportError as error:
        raise UserError(f"{error}; pip install 'fedmermed[eval]' to export ONNX") from None
    backbone, px = copy.deepcopy(loaded.model.backbone).cpu().eval(), loaded.model.px
    try:
        program: Any = torch.onnx.export(
            backbone, (torch.zeros(2, 3, px, px),), dynamo=True, verbose=False,
            input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False,
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model '{loaded.name}' cannot be exported to ONNX: {reason}") from None
    data = _finished(program.model_proto, loaded)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def theirs(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    difference = _difference(loaded, backbone, theirs, f"onnxruntime, for '{out}'")
    try:
        write_atomically(out, data)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error}") from None
    return difference


def _finished(proto: Any, loaded: LoadedModel) -> bytes:
    """The model's bytes, with what a reader needs and without the exporter's stack traces."""
    for node in proto.graph.node:
        del node.metadata_props[:]  # they hold paths of the machine that exported
    facts = {"px": str(loaded.model.px), "mean_std": json.dumps(_statistics(loaded))}
    facts |= {"sha256_of_weights": loaded.sha256}
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _statistics(loaded: LoadedModel) -> Any:
    """Mean and deviation by modality, or the one pair that the model was trained with."""
    return MEAN_STD if loaded.mean_std is None else loaded.mean_std


def export_hugging_face(loaded: LoadedModel, out: Path, card: str) -> float:
    """Write a directory that `timm.create_model("local-dir:OUT", pretrained=True)` loads.

    It can be uploaded to the Hub as it is. config.json follows timm's layout; where the model
    expects each modality's own pixel statistics, they stand under "mean_std_by_modality", and
    timm's single mean and deviation are their averages.

    Args:
        loaded: the model.
        out: target; one that was written here before is replaced.
        card: text of README.md.

    Returns:
        The largest difference between the features of the directory's model and ours.

    Raises:
        UserError: the target holds something else, or timm gives other features; it is then left
            as it was.
    """
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(LAYOUT)):
        raise UserError(
            f"'{out}' exists and holds more than {', '.join(LAYOUT)}; it is left as it is: give "
            "another target"
        )
    out = out.absolute()
    aside = out.with_name(f".{out.name}.partial")
    backbone = copy.deepcopy(loaded.model.backbone).cpu().eval()
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_json(aside / "config.json", _config(loaded))
        weights = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
        save_arrays(aside / "model.safetensors", weights, {"format": "pt"})
        write_atomically(aside / "README.md", card.encode())
        again = timm.create_model(f"local-dir:{aside}", pretrained=True).eval()
        difference = _difference(loaded, backbone, again, f"timm, for '{out}'")
        commit_directory(aside, out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference


def _config(loaded: LoadedModel) -> dict[str, Any]:
    arguments = dict(loaded.model.arguments)
    name, _, tag = arguments.pop("model_name").partition(".")
    arguments.pop("num_classes")
    backbone: Any = loaded.model.backbone
    mean, std = loaded.mean_std or np.mean(list(MEAN_STD.values()), axis=0).round(4).tolist()
    known = backbone.pretrained_cfg
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": tag or loaded.kind,
            "num_classes": 0,
            "input_size": [3, loaded.model.px, loaded.model.px],
            "fixed_input_size": "img_size" in arguments,
            "pool_size": None,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": mean,
            "std": std,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }
    if loaded.mean_std is None:
        config[BY_MODALITY] = MEAN_STD
        config["mean_std_note"] = (
            "The model expects images normalised by the mean and deviation of their modality; "
            "those of pretrained_cfg are the averages and cost accuracy."
        )
    return config


def _difference(loaded: LoadedModel, ours: nn.Module, theirs: Any, where: str) -> float:
    """Largest difference on random images; batches of 1 and 3 show that the batch size is free."""
    draws = torch.Generator().manual_seed(0)
    worst = 0.0
    with torch.inference_mode():
        for batch in (1, 3):
            images = torch.randn(batch, 3, loaded.model.px, loaded.model.px, generator=draws)
            expected = ours(images)
            difference = float((theirs(images) - expected).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(
                    f"{where}: the features differ from those of '{loaded.name}' by up to "
                    f"{difference:.2g}, more than rounding explains; nothing is written"
                )
            worst = max(worst, difference)
    return worst
