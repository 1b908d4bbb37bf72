"""What mutations begin from: real files as they are, and drawn ones of the other formats."""

import gzip
import io
from pathlib import Path

import numpy as np
import tifffile
from mutations import CT_IMAGE, edited
from PIL import Image

from core.phantoms import make_phantoms

MAX_BYTES = 4 * 2**20
"""Larger files are left out: they only slow the mutations down."""


def load_seeds(directory: Path) -> list[bytes]:
    """All files of a directory, whatever they are, and one of each kind that may be missing.

    DICOM files that are none of the seven modalities come a second time as CT: their pixels would
    not be decoded otherwise.
    """
    seeds = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".csv" and 0 < path.stat().st_size <= MAX_BYTES:
            data = path.read_bytes()
            seeds.append(data)
            if as_ct := _as_ct(data):
                seeds.append(as_ct)
    return seeds + pictures() + volumes()


def pictures() -> list[bytes]:
    """PNG, JPEG, TIFF, BMP, GIF and WebP files, and a tiled pyramid as slide scanners write."""
    colour = _drawn("cfp", 96)
    grey = np.asarray(Image.fromarray(_drawn("us", 96)[:, :, 0]))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    files = [
        *(_saved(Image.fromarray(colour), kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP")),
        *(_saved(Image.fromarray(grey), kind) for kind in ("PNG", "JPEG", "TIFF")),
        _saved(deep, "PNG"),
        _saved(deep, "TIFF"),
        _saved(Image.fromarray(colour), "TIFF", compression="tiff_lzw"),
        _saved(Image.fromarray(colour), "JPEG", progressive=True),
        _saved(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        _saved(Image.fromarray(colour).quantize(16), "PNG"),
    ]
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as slide:
        level = np.asarray(Image.fromarray(_drawn("pathology", 128)).resize((512, 512)))
        facts = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate"}
        slide.write(level, description="Aperio Image Library\n|MPP = 0.5", **facts)
        slide.write(level[::4, ::4], subfiletype=1, **facts)
    return [*files, out.getvalue()]


def volumes() -> list[bytes]:
    """A NIfTI file, plain and compressed."""
    voxels = np.stack([_drawn("ct", 48)[:, :, 0]] * 4, axis=2).astype("<i2") - 100
    header = bytearray(352)
    header[0:4] = (348).to_bytes(4, "little")
    header[40:56] = np.array([3, *voxels.shape, 1, 1, 1, 1], "<i2").tobytes()
    header[70:74] = np.array([4, 16], "<i2").tobytes()
    header[76:108] = np.ones(8, "<f4").tobytes()
    header[108:120] = np.array([352, 1, 0], "<f4").tobytes()
    header[344:348] = b"n+1\0"
    data = bytes(header) + voxels.tobytes(order="F")
    return [data, gzip.compress(data, mtime=0)]


def _as_ct(data: bytes) -> bytes | None:
    if data[128:132] != b"DICM" or b"1.2.840.10008.5.1.4.1.1.2\0" in data[:4096]:
        return None
    return edited(data, [(0x00080016, CT_IMAGE.encode() + b"\0", "UI"), (0x00080060, b"CT", "CS")])


def _drawn(modality: str, px: int) -> np.ndarray:
    shard = make_phantoms(modality, patients=1, images_per_patient=1, px=px, seed=1)
    return shard.images[0]


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
