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
        total = np.zeros(count)
        for _ in range(DRAWS):
            pairs = (count + 1) // 2
            radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(pairs)))  # 1 - u is never 0
            angle = 2.0 * math.pi * self.uniform(pairs)
            both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
            total += both[:count]
        return total / math.sqrt(DRAWS)
