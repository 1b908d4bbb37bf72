"""Random streams that need no saved state: each is a function of what it is for.

A generator made from (seed, site, purpose, step) gives the same draws after any crash and on any
engine, so a checkpoint holds no generator state. Never used for privacy noise.
"""

import hashlib

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a list of names and numbers."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for this purpose; draws are moved to the device, so devices agree."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(derive_seed(*parts))
