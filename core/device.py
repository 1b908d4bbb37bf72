"""Which device trains, in which precision, and how images get there."""

import torch
from torch import Tensor

from core.config import Recipe
from core.errors import UserError


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


def resolve_device(name: str) -> str:
    """Turn 'auto', 'cpu', 'cuda' or 'cuda:N' into a torch device name.

    Raises:
        UserError: a GPU is asked for and there is none, or the name is unknown.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise UserError(f"device '{name}' is unknown; give 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}' was asked for, but torch sees {torch.cuda.device_count()} usable "
            "GPU(s) here; install a driver and a CUDA build of torch, or give 'auto' or 'cpu'"
        )
    return name


def resolve_devices(name: str, count: int) -> list[str]:
    """The devices that share a site's training.

    Args:
        name: as for `resolve_device`.
        count: how many; 0: all GPUs that torch sees, or one process on the CPU.

    Returns:
        torch device names; of several GPUs those with the lowest numbers.

    Raises:
        UserError: there are fewer GPUs.
    """
    first = resolve_device(name)
    if first == "cpu":
        return [first] * max(count, 1)
    found = 1 if ":" in first else torch.cuda.device_count()
    if count > found:
        raise UserError(
            f"devices = {count} of '{name}' were asked for, but that is {found} GPU(s) here; lower "
            "'devices' in the site file, or leave it out to use all"
        )
    wanted = count or found
    return [first] if wanted == 1 else [f"cuda:{number}" for number in range(wanted)]
