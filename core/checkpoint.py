"""Files that survive a kill: written aside, synced, renamed; safetensors and JSON, never pickle."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from core.errors import UserError

Arrays = dict[str, NDArray[Any]]


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace `path` by `data`: after a crash at any instant it holds the old bytes or the new.

    Args:
        path: The file.
        data: Its new bytes.
        mode: Its permissions, less the umask; they hold before the first byte is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable (POSIX needs the directory itself synced)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_directory(aside: Path, final: Path) -> None:
    """Sync a finished directory and rename it into place as one step."""
    for file in aside.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(aside)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    sync_directory(final.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by a person."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}") from None


def save_arrays(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> str:
    """Write named arrays as safetensors, atomically; returns the sha256 of the file in hex.

    Arrays are stored in sorted order, so equal contents give equal files.
    """
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    data = _with_sorted_metadata(save(ordered, metadata))
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def _with_sorted_metadata(data: bytes) -> bytes:
    """Rewrite the header: the library writes metadata in an order that differs by process."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if len(header.get("__metadata__", ())) < 2:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns what follows to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read arrays and metadata written by `save_arrays`.

    Raises:
        UserError: the file is missing, or is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is not a whole safetensors file: {error}") from None


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_arrays(arrays: Arrays) -> str:
    """A digest of names, types, shapes and bytes of a set of arrays, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
