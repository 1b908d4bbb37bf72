"""Weight files of others: out of the wrappings people save them in, into timm's architecture."""

import argparse
import difflib
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from core.errors import UserError

WRAPPINGS: Final = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "student")
"""Keys under which a checkpoint keeps weights, most wanted first: an average before its student."""
PREFIXES: Final = ("module.", "_orig_mod.", "teacher.", "student.", "backbone.")
"""Wrappers' prefixes; where some names have one, only those names belong to the backbone."""

UNCHECKED: Final = re.compile(r"dla|mobilenetv5|vit_\w+_siglip_gap")
"""Architectures for which timm takes a file that lacks weights."""


PARTS: Final = ("weight", "bias")


@dataclass(frozen=True)
class Weights:
    """Tensors under the architecture's names, and what was chosen to get them."""

    tensors: dict[str, Tensor]
    note: str


def read_weights(file: Path, classifiers: tuple[str, ...]) -> Weights:
    """Read .safetensors or a torch file.

    Args:
        file: the weight file.
        classifiers: modules whose weights are left out, as a decoder's are.

    Raises:
        UserError: the file is missing or damaged, would run code, or holds no weights.
    """
    if not file.is_file():
        raise UserError(f"weight file '{file}' does not exist; nothing is downloaded, give a file")
    content: Any = _safetensors(file) if file.suffix == ".safetensors" else _torch(file)
    notes = []
    while isinstance(content, Mapping) and not _is_flat(content):
        inside = [key for key in WRAPPINGS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        content = content[inside[0]]
        notes.append(f"took '{inside[0]}'" + (f" of {', '.join(inside)}" if inside[1:] else ""))
    if not isinstance(content, Mapping) or not _is_flat(content):
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content)
        raise UserError(
            f"'{file}' holds no table of weights, nor one under {', '.join(WRAPPINGS)}; found "
            f"{str(held)[:100]}"
        )
    tensors = {str(name): tensor for name, tensor in content.items()}
    while prefix := next((p for p in PREFIXES if any(n.startswith(p) for n in tensors)), ""):
        inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        notes.append(f"kept {len(inner)} of {len(tensors)} tensors, those of '{prefix}'")
        tensors = inner
    heads = (
        "decoder_",
        *(f"{name}." for name in classifiers),
    )  # the decoder of a masked autoencoder
    older = {f"{name.partition('.')[0]}.{part}" for name in classifiers for part in PARTS}
    if dropped := sorted(n for n in tensors if n.startswith(heads) or n in older):
        tensors = {name: tensors[name] for name in tensors if name not in dropped}
        more = f" and {len(dropped) - 2} more" if len(dropped) > 2 else ""
        notes.append(f"left out {', '.join(dropped[:2])}{more}: not the backbone")
    if not tensors:  # timm would take an empty table for a wish to download
        raise UserError(f"'{file}' holds no weights of a backbone")
    return Weights(tensors, "; ".join(notes))


def build(arguments: dict[str, Any], tensors: dict[str, Tensor], file: Path, px: int) -> nn.Module:
    """Let timm build and load: its filter of this architecture renames and resizes the weights.

    Args:
        arguments: of timm.create_model, "model_name" among them.
        tensors: as `read_weights` gives them.
        file: named in errors.
        px: side of the images that it must take.

    Raises:
        UserError: the weights are of another architecture.
    """
    name = arguments["model_name"]
    source = {
        "state_dict": dict(tensors), "url": "", "file": None, "hf_hub_id": None,
        "source": None, "custom_load": False,
        # As many classes as asked for: timm then checks every name and shape.
        "num_classes": 0, "label_offset": 0,
    }  # fmt: skip
    try:
        backbone: nn.Module = timm.create_model(
            **arguments, pretrained=True, pretrained_cfg_overlay=source
        )
        backbone.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
        with torch.inference_mode():
            shape = backbone.eval()(torch.zeros(1, 3, px, px)).shape
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:
        raise _other_architecture(file, name, px, _reason(error)) from None
    missing = [n for n in backbone.state_dict() if n not in tensors and "num_batches" not in n]
    if UNCHECKED.match(name) and missing:
        raise _other_architecture(file, name, px, f"missing '{missing[0]}'")
    if len(shape) != 2:
        raise UserError(f"timm's '{name}' has no pooled output (found shape {tuple(shape)})")
    return backbone


def _other_architecture(file: Path, name: str, px: int, reason: str) -> UserError:
    return UserError(
        f"'{file}' does not hold the weights of timm's '{name}' at {px} px: {reason}; give the "
        "architecture and input size that it was trained with"
    )


def _reason(error: Exception) -> str:
    """The first missing, unexpected and misshapen weights of torch's long message, in one line."""
    text, found = str(error), []
    for kind in ("Missing", "Unexpected"):
        if line := re.search(rf"{kind} key\(s\) in state_dict: (.*)", text):
            names = re.findall(r'"([^"]+)"', line[1])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{kind.lower()} '{names[0]}'{more}")
    if shapes := re.findall(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text):
        key, in_file, expected = shapes[0]
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        found.append(f"'{key}' is [{in_file}], expected [{expected}]{more}")
    return ", ".join(found) or f"{type(error).__name__}: {' '.join(text.split())[:160]}"


def check_name(name: str) -> None:
    """Refuse a model name that timm does not know.

    Raises:
        UserError: with the nearest names.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"timm does not know a model '{name}'; {hint}")
    if name != architecture and name not in timm.list_pretrained():
        raise UserError(f"timm knows '{architecture}' but not '{name}'; leave the tag away")


def _is_flat(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{file}' is not a whole safetensors file: {error}") from None


def _torch(file: Path) -> Any:
    try:
        # Training scripts keep their argparse options beside the weights; a Namespace is only data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"'{file}' is refused: reading it could run code ({reason[:120]}); save its "
            "state_dict as safetensors on a machine that trusts it"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"'{file}' is not a whole torch file: {' '.join(str(error).split())[:120]}"
        ) from None
