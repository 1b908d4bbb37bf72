"""Randomness for privacy: from the operating system alone, and never from a seed.

torch's CPU generator takes 32 bits of a seed and numpy's are no cryptographic generators: who knows
or guesses their state subtracts the noise.
"""

import math
import os
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

DRAWS: Final = 4
"""Normal draws added up for one value: the rounding of one alone tells which values the true sum
can have had (Mironov, CCS 2012; the sum of several as in Holohan and Braghin, 2021)."""

PART: Final = 8192
"""Pairs of normal draws made at a time: what they need meanwhile stays in the processor's cache."""


class PrivateRandom:
    """Draws of a ChaCha20 stream under a key of the operating system; each object has its own.

    **Guarantees**:
        - The key is 32 bytes of `os.urandom`; nothing else enters, and nothing can be set.
        - Two objects, in one process or in two, draw differently.
    """

    def __init__(self) -> None:
        nonce = bytes(16)  # a key is used for one stream alone
        self._stream = Cipher(ChaCha20(os.urandom(32), nonce), mode=None).encryptor()

    def uniform(self, count: int) -> Float64:
        """Independent draws [count] from [0, 1), of 53 bits."""
        integers = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        draws: Float64 = (integers >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return draws

    def normal(self, count: int) -> Float64:
        """Independent standard normal draws [count], by Box and Muller."""
        pairs = (count + 1) // 2
        total = np.empty((2, pairs))
        for start in range(0, pairs, PART):
            part = total[:, start : start + PART]
            radius, angle = self.uniform(part.size * DRAWS).reshape(2, DRAWS, -1)
            radius = np.sqrt(-2.0 / DRAWS * np.log(1.0 - radius))  # 1 - u is never 0
            angle *= 2.0 * math.pi
            part[0] = (radius * np.cos(angle)).sum(0)
            part[1] = (radius * np.sin(angle)).sum(0)
        return total.reshape(-1)[:count]
