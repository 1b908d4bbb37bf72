"""How a device trains a recipe: in which precision, and how images get there."""

import torch
from torch import Tensor

from core.config import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether this device trains the recipe under bf16 autocast."""
    if recipe.optim.precision == "auto":
        # On a CPU both kinds of bf16 unit pay from a width of 128 on, by 1.5 to 2 times.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return device.type == "cuda" or fast
    return recipe.optim.precision == "bf16"


def precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context in which this device passes images through the recipe's networks."""
    dtype = torch.bfloat16 if uses_bf16(recipe, device) else None
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images where they are worked on."""
    if device.type == "cuda":  # pinned memory lets the copy run beside the kernels
        return images.pin_memory().to(device, non_blocking=True)
    return images.to(device)
