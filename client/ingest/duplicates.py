"""Pictures that the shard holds already: the same pixels, or a copy saved, scaled or lit anew.

Near copies are looked up by a 256-bit fingerprint: the signs of the picture's lowest 16 x 16
cosine frequencies. It is cut into bands that are stored in sqlite; a copy that flips few bits still
shares a band. What is found is believed only when the stored pixels agree too. Thresholds and the
choice of hash were measured on real images: see "Duplicates" in benchmarks/README.md.
"""

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMB_PX: Final = 32
FREQUENCIES: Final = 16
BANDS: Final = 12
BAND_BITS: Final = 21
"""12 bands of 21 bits: of 10^6 chest X-rays about thirty share one of them by chance."""
BAND_ORDER: Final = np.arange(BANDS * BAND_BITS) * 167 % 256
"""Steps of 10 rows and 7 columns through the 16 x 16 frequencies."""
MOST_BITS: Final = 24
"""Flipped bits of a near copy; measured copies flip 14 at most."""
MOST_LEVELS: Final = 2.5
"""Largest difference of grey levels, mean over one of 16 x 16 parts of the picture."""
MOST_RMS: Final = 0.8
"""The same, root mean square over the parts."""
MOST_RELATIVE: Final = 0.05
"""The same, as a share of the picture's contrast: two dark pictures are not yet alike."""
MOST_COLOUR: Final = 20.0
"""Largest difference of a colour channel over one part; colour suffers more from JPEG."""
MOST_IN_BAND: Final = 50
MOST_COMPARED: Final = 4
"""Bounds on the work for one picture, whatever the archive holds."""

PictureAt = Callable[[int], NDArray[np.uint8]]

SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS fingerprints"
    " (picture INTEGER PRIMARY KEY, exact BLOB NOT NULL, bits BLOB NOT NULL)",
    "CREATE INDEX IF NOT EXISTS fingerprints_by_exact ON fingerprints (exact)",
    "CREATE TABLE IF NOT EXISTS bands"
    " (band INTEGER NOT NULL, picture INTEGER NOT NULL, PRIMARY KEY (band, picture)) WITHOUT ROWID",
)

_COSINES: Final = np.cos(
    np.pi / THUMB_PX * np.outer(np.arange(1, FREQUENCIES + 1), np.arange(THUMB_PX) + 0.5)
)  # [16, 32]


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a picture to find its copies; it does not depend on the shard's channels."""

    exact: bytes
    """16 bytes of a hash of the pixels"""
    bits: bytes
    """256 bits, few of which differ between copies"""


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """The fingerprint of a picture; colour without colour has the one of the grey picture.

    Args:
        pixels: uint8 [px, px, C] with C 1 or 3.
    """
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    exact = hashlib.sha256(pixels.tobytes()).digest()[:16]
    thumb = Image.fromarray(_grey(pixels)).resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    frequencies = _COSINES @ np.asarray(thumb, dtype=np.float64) @ _COSINES.T  # [16, 16]
    # Above 1 and not 0: a frequency that is absent gives the same bit however it is summed.
    return Fingerprint(exact, np.packbits(frequencies > 1.0).tobytes())


class DuplicateIndex:
    """The fingerprints of the pictures kept so far, in two tables of the journal.

    It reads and writes inside the caller's transaction and never commits, so what it knows is
    always what the journal knows: after a resume it answers as if nothing had happened.
    """

    def __init__(self, connection: sqlite3.Connection, picture_at: PictureAt) -> None:
        """Create the tables if they are missing.

        Args:
            connection: The journal's.
            picture_at: Pixels, uint8 [px, px, C], of a picture that was added.
        """
        self._connection = connection
        self._picture_at = picture_at
        for statement in SCHEMA:
            connection.execute(statement)

    def find(self, found: Fingerprint, pixels: NDArray[np.uint8]) -> Literal["", "exact", "near"]:
        """Whether a picture that was added is the same as this one, or nearly."""
        query = "SELECT 1 FROM fingerprints WHERE exact = ? LIMIT 1"
        if self._connection.execute(query, (found.exact,)).fetchone():
            return "exact"
        near = sorted(self._candidates(found))[:MOST_COMPARED]
        return "near" if any(alike(self._picture_at(p), pixels) for _, p in near) else ""

    def add(self, picture: int, found: Fingerprint) -> None:
        """Remember a picture under its number."""
        self._connection.execute(
            "INSERT INTO fingerprints VALUES (?, ?, ?)", (picture, found.exact, found.bits)
        )
        self._connection.executemany(
            "INSERT INTO bands VALUES (?, ?)", [(band, picture) for band in _bands(found.bits)]
        )

    def _candidates(self, found: Fingerprint) -> set[tuple[int, int]]:
        """Pictures with a band in common, as (flipped bits, picture)."""
        query = (
            "SELECT picture, bits FROM bands JOIN fingerprints USING (picture)"
            " WHERE band = ? ORDER BY picture LIMIT ?"
        )
        own = int.from_bytes(found.bits, "big")
        candidates = set()
        for band in _bands(found.bits):
            for picture, bits in self._connection.execute(query, (band, MOST_IN_BAND)):
                flipped = (own ^ int.from_bytes(bits, "big")).bit_count()
                if flipped <= MOST_BITS:
                    candidates.add((flipped, picture))
        return candidates


def alike(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    """Whether two pictures differ by no more than compression, scaling and a little brightness.

    Compared are means over 16 x 16 parts: noise of compression goes there, and a change of content
    stays. An even shift of brightness does not count, and neither does one that ran into black or
    white.
    """
    one, other = _grey(first), _grey(second)
    difference = one - other
    parts = _parts(difference)
    shift = np.median(parts)
    if np.abs(parts - shift).max() > MOST_LEVELS + abs(shift):
        return False  # what follows lessens no part by more than the shift
    lit = difference - shift
    parts = _parts(np.where(np.abs(difference) < np.abs(lit), difference, lit))
    rms = np.sqrt((parts**2).mean())
    if np.abs(parts).max() > MOST_LEVELS or rms > MOST_RMS:
        return False
    if rms > MOST_RELATIVE * _parts(one).std():
        return False
    colour = first.astype(np.float32) - second  # broadcasts grey to colour
    return bool(np.abs(_parts(colour - shift)).max() <= MOST_COLOUR)


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Luma, [px, px]; that of grey in three channels is the grey itself, bit for bit."""
    if pixels.shape[2] == 1:
        return pixels[..., 0].astype(np.float32)
    weighted = pixels @ np.array([77, 150, 29], dtype=np.float32)  # whole numbers: exact
    return np.asarray(weighted / 256, dtype=np.float32)


def _parts(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over 16 x 16 parts of [px, px] or [px, px, C] (fewer when there are fewer pixels)."""
    px = len(values)
    starts = np.arange(min(16, px)) * px // min(16, px)
    sizes = np.diff(starts, append=px)
    sums = np.add.reduceat(np.add.reduceat(values, starts, axis=0), starts, axis=1)
    areas = np.outer(sizes, sizes).reshape(len(sizes), len(sizes), *[1] * (values.ndim - 2))
    return np.asarray(sums / areas, dtype=np.float32)


def _bands(bits: bytes) -> list[int]:
    """The bands as numbers, each with its position in front.

    A band draws its bits from all over the frequencies: low ones are much the same in all images
    of a modality, so a band of those alone would hold the whole archive.
    """
    flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8))[BAND_ORDER]
    values = flags.reshape(BANDS, BAND_BITS) @ (1 << np.arange(BAND_BITS))  # [12]
    return [int(band << BAND_BITS | value) for band, value in enumerate(values)]
