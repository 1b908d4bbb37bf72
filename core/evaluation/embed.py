"""Embeddings of every image of a data directory, in one table; killed at any moment, it resumes.

Finished parts lie beside the output in `.NAME.parts` with a description of model and data, until
all are joined. Images, parts and the joined table are read and written piece by piece, so memory
does not grow with the number of images.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import (
    load_arrays,
    read_json,
    save_arrays,
    sha256_arrays,
    sync_directory,
    write_json,
)
from core.errors import UserError
from core.evaluation.models import LoadedModel, features
from core.modalities import MODALITIES
from core.shards import Shard

FORMATS: Final = (".npz", ".parquet")
PIXELS_A_PART: Final = 4096 * 64**2
"""As much work a part at any input size, but no less than 256 images: what a kill loses."""

FEATURES: Final = "class token, patch tokens' mean and deviation, or pooled; over mirror images"
"""Of `core.evaluation.models.features`: parts of another kind are not gone on with."""


@dataclass(frozen=True)
class _Part:
    """Consecutive images of one shard."""

    file: Path
    site: str
    shard: Shard
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def labels(self) -> list[str]:
        """Class names, "" where there is none."""
        pairs = zip(self.shard.modality[self.rows], self.shard.label[self.rows], strict=True)
        return [self.shard.classes[MODALITIES[m]][y] if y >= 0 else "" for m, y in pairs]


Columns = Mapping[str, Callable[[_Part], NDArray[Any]]]
Write = Callable[[Path, Sequence[_Part], Columns, dict[str, Any]], None]

COLUMNS: Final[Columns] = {
    "site": lambda part: np.full(part.stop - part.start, part.site),
    "shard": lambda part: np.full(part.stop - part.start, part.shard.name),
    "index": lambda part: np.arange(part.start, part.stop),
    "modality": lambda part: np.array(MODALITIES)[part.shard.modality[part.rows]],
    "split": lambda part: part.shard.split[part.rows],
    "label": lambda part: np.array(part.labels, dtype=np.str_),
    "embedding": lambda part: load_arrays(part.file)[0]["embedding"],
}


def embed(
    loaded: LoadedModel,
    sites: Mapping[str, Sequence[Shard]],
    out: Path,
    *,
    last_blocks: int = 1,
    patients: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a row an image: site, shard, index, modality, split, label, embedding.

    Args:
        loaded: the model.
        sites: site name -> shards, as `core.sites.open_sites` gives them.
        out: target, .npz (one array a column, a label "" is none) or .parquet (null is none);
            replaced as one atomic step.
        last_blocks: see `core.evaluation.models.features`.
        patients: whether to add the column `patient`, a number within the shard.
        progress: called with images done and images in all.

    Returns:
        How many rows were written.

    Raises:
        UserError: unknown ending, an unfinished run of another model or data lies there, another
            process works on it, an embedding is not finite, or the disk refuses.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"'{out}': expected a name that ends in {' or '.join(FORMATS)}")
    write = _write_npz if out.suffix == ".npz" else _parquet_writer()
    out = out.absolute()
    directory = out.with_name(f".{out.name}.parts")
    columns = dict(COLUMNS)
    if patients:
        columns["patient"] = lambda part: part.shard.patient[part.rows]
    try:
        with _locked(directory):
            size = max(256, PIXELS_A_PART // loaded.model.px**2)
            about = _about(loaded, last_blocks)
            _check_same_job(directory / "job.json", about, {"data": _data(sites), "size": size})
            parts = list(_cut(sites, directory, size))
            total, done = sum(part.stop - part.start for part in parts), 0
            for part in parts:
                if not part.file.exists():
                    save_arrays(part.file, {"embedding": _embedding(loaded, part, last_blocks)})
                done += part.stop - part.start
                progress(done, total)
            write(directory / "joined", parts, columns, about)
            _commit(directory / "joined", out)
            shutil.rmtree(directory)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error}") from None
    return total


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working in '{directory}'; wait for it, stop it, or give "
                "another target"
            ) from None
        yield


def _cut(sites: Mapping[str, Sequence[Shard]], directory: Path, size: int) -> Iterator[_Part]:
    number = 0
    for site, shards in sites.items():
        for shard in shards:
            for start in range(0, len(shard.images), size):
                file = directory / f"part-{number:06d}.safetensors"
                yield _Part(file, site, shard, start, min(start + size, len(shard.images)))
                number += 1


def _embedding(loaded: LoadedModel, part: _Part, last_blocks: int) -> NDArray[np.float32]:
    modality, images = part.shard.modality[part.rows], part.shard.images[part.rows]
    held = np.unique(modality)
    if len(held) == 1:
        result = features(loaded, images, MODALITIES[held[0]], last_blocks=last_blocks)
    else:
        found = [np.flatnonzero(modality == m) for m in held]
        rows = [
            features(loaded, images[i], MODALITIES[m], last_blocks=last_blocks)
            for i, m in zip(found, held, strict=True)
        ]
        result = np.empty((len(images), rows[0].shape[1]), np.float32)
        result[np.concatenate(found)] = np.concatenate(rows)
    if wrong := int((~np.isfinite(result)).any(1).sum()):
        raise UserError(
            f"model '{loaded.name}', shard '{part.shard.name}': embeddings of {wrong} of "
            f"{len(result)} images are NaN or infinite; check the weights in '{loaded.path}'"
        )
    return result


def _about(loaded: LoadedModel, last_blocks: int) -> dict[str, Any]:
    state = loaded.model.backbone.state_dict()
    return {
        "model": loaded.name,
        "sha256": loaded.sha256,
        "weights": sha256_arrays({name: value.cpu().numpy() for name, value in state.items()}),
        "px": loaded.model.px,
        "mean_std": loaded.mean_std,
        "last_blocks": last_blocks,
        "features": FEATURES,
    }


def _data(sites: Mapping[str, Sequence[Shard]]) -> list[list[str]]:
    return [[site, shard.name, _digest(shard)] for site in sites for shard in sites[site]]


def _digest(shard: Shard) -> str:
    """A digest of all that a shard says; takes a hundredth of the time of the embeddings."""
    digest = hashlib.sha256(json.dumps([shard.images.shape, shard.classes]).encode())
    for start in range(0, len(shard.images), 1024):
        digest.update(shard.images[start : start + 1024].tobytes())
    for column in (shard.modality, shard.label, shard.patient, shard.split.astype("U8")):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _check_same_job(file: Path, model: dict[str, Any], data: dict[str, Any]) -> None:
    """Write what is being done; refuse to go on with what was begun with another model or data."""
    job = json.loads(json.dumps({"of the model": model, "of the data": data}))
    if not file.exists():
        write_json(file, job)
    begun = read_json(file)
    if changed := " and ".join(key for key in job if begun.get(key) != job[key]):
        raise UserError(
            f"'{file.parent}' holds the beginnings of another extraction (a change {changed}); "
            "remove that directory to start anew, or give another target"
        )


def _commit(joined: Path, out: Path) -> None:
    with open(joined, "rb") as file:
        os.fsync(file.fileno())
    os.replace(joined, out)
    sync_directory(out.parent)


def _write_npz(file: Path, parts: Sequence[_Part], columns: Columns, about: dict[str, Any]) -> None:
    """The format of numpy.savez, whose own writer would want each column whole in memory."""
    count = sum(part.stop - part.start for part in parts)
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, dtype: Any, shape: tuple[int, ...], chunks: Iterable[Any]) -> None:
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(np.ascontiguousarray(chunk, dtype).tobytes())

        for name, column in columns.items():
            first = column(parts[0])
            of_text = parts if first.dtype.kind == "U" else ()  # its width is that of the longest
            dtype = np.result_type(first, *(column(part).dtype for part in of_text))
            add(name, dtype, (count, *first.shape[1:]), (column(part) for part in parts))
        text = np.array(json.dumps(about))
        add("about", text.dtype, (), [text])


def _parquet_writer() -> Write:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{error}; pip install 'fedmermed[eval]' to write Parquet, or give a name in .npz"
        ) from None

    def write(file: Path, parts: Sequence[_Part], columns: Columns, about: dict[str, Any]) -> None:
        def table(part: _Part) -> Any:
            arrays = {}
            for name, column in columns.items():
                values = column(part)
                if name == "embedding":
                    flat, width = pa.array(values.ravel()), values.shape[1]
                    arrays[name] = pa.FixedSizeListArray.from_arrays(flat, width)
                else:
                    missing = values == "" if name == "label" else None
                    arrays[name] = pa.array(values, mask=missing)
            return pa.table(arrays).replace_schema_metadata({"fedmermed": json.dumps(about)})

        with pq.ParquetWriter(file, table(parts[0]).schema) as writer:
            for part in parts:
                writer.write_table(table(part))

    return write
