"""Files that survive a kill: written aside, synced, renamed; safetensors and JSON, never pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from core.errors import UserError

Arrays = dict[str, NDArray[Any]]

_TYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""numpy's names of types -> those of safetensors, in the order in which a file holds them."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666, sync: bool = True) -> None:
    """Replace `path` by `data`: after a crash at any instant it holds the old bytes or the new.

    Args:
        path: The file.
        data: Its new bytes.
        mode: Its permissions, less the umask; they hold before the first byte is written.
        sync: Without it that holds for a killed process and not for a power cut.
    """
    with _replaced(path, mode, sync=sync) as file:
        file.write(data)


@contextmanager
def _replaced(path: Path, mode: int = 0o666, *, sync: bool = True) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        yield file
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(aside, path)
    if sync:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable (POSIX needs the directory itself synced)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make a finished directory's files durable, and their names in it."""
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(directory)


def commit_directory(aside: Path, final: Path) -> None:
    """Sync a finished directory and rename it into place as one step."""
    sync_tree(aside)
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


def save_arrays(
    path: Path, arrays: Arrays, metadata: dict[str, str] | None = None, *, sync: bool = True
) -> str:
    """Write named arrays as safetensors, atomically; returns the sha256 of the file in hex.

    Arrays are stored in sorted order, so equal contents give equal files. They are written one by
    one: the library's own writer copies all of them, twice, and orders metadata at random. For
    `sync` see `write_atomically`.
    """
    digest = hashlib.sha256()
    with _replaced(path, sync=sync) as file:
        for data in _file_parts(arrays, metadata):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _file_parts(arrays: Arrays, metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    """A safetensors file: the header's length, the header, then each array's bytes."""
    ranks = list(_TYPES)
    order = sorted(arrays, key=lambda name: (ranks.index(arrays[name].dtype.name), name))
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _TYPES[arrays[name].dtype.name],
            "shape": arrays[name].shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns what follows to 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _plain_bytes(arrays[name])


def _plain_bytes(array: NDArray[Any]) -> memoryview:
    """An array's little-endian bytes in C order, without a copy where it lies so already."""
    plain = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    return plain.reshape(-1).view(np.uint8).data


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
