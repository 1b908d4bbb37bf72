"""What an evaluation reads and writes besides models: data, subgroup columns, the report."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import write_atomically, write_json
from core.errors import UserError
from core.evaluate import labelled_tasks
from core.evaluation.card import write_card
from core.evaluation.findings import Columns
from core.evaluation.html import write_report
from core.evaluation.run import Evaluation
from core.medmnist import SETS, SIZES, download_set
from core.shards import Shard
from core.sites import open_sites


def open_data(data: str, progress: Callable[[str, int, int], None]) -> dict[str, list[Shard]]:
    """Open a data directory, or the seven MedMNIST sets under the name `medmnist[-PX]`.

    Args:
        data: a path that `core.sites.open_sites` takes, or "medmnist" (28 px), "medmnist-64" and so
            on: the sets are downloaded into a directory of that name unless they lie there.
        progress: called with a file's name, bytes present and bytes in all.

    Raises:
        UserError: as `open_sites`; no such size; the download fails.
    """
    match = re.fullmatch(r"medmnist(?:-(\d+))?", data)
    if match and not (Path(data).is_dir() and not match[1]):
        px = int(match[1] or min(SIZES))
        if px not in SIZES:
            raise UserError(f"'{data}': MedMNIST has sizes {', '.join(map(str, SIZES))}")
        for name in SETS:
            download_set(Path(data), name, px, partial(progress, name))
    return open_sites(Path(data))


def read_columns(path: Path, shards: Sequence[Shard]) -> Columns:
    """Read subgroup columns: a CSV `shard,index,NAME...`, index being the image's row in the shard.

    Returns:
        Name -> task -> its value for each test image, "" where the file says nothing.

    Raises:
        UserError: the file is missing or not such a table, or names an image that is not there.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"subgroups '{path}' cannot be read: {error}") from None
    names = [name for name in (rows[0] if rows else ()) if name not in ("shard", "index")]
    if not names or not {"shard", "index"} <= set(rows[0]):
        raise UserError(
            f"subgroups '{path}': expected a header shard,index and at least one more column, as "
            "'fedmermed-eval embed' numbers the images"
        )
    sizes = {shard.name: len(shard.images) for shard in shards}
    values: dict[tuple[str, int], dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        shard, index = row["shard"], row["index"] or ""
        if shard not in sizes or not index.isdigit() or int(index) >= sizes[shard]:
            raise UserError(
                f"subgroups '{path}', line {number}: no image {index or 'without number'} in shard "
                f"'{shard}'; the shards are {', '.join(sizes)}"
            )
        values[shard, int(index)] = row
    columns: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for task in labelled_tasks(shards):
        for name in names:
            found = [values.get((task.shard.name, int(i)), {}).get(name) or "" for i in task.test]
            if any(found):
                columns[name][f"{task.name}/{task.shard.name}"] = found
    return columns


def training_images(run: Path) -> dict[str, int]:
    """Modality -> images the sites of a run directory trained on in its last round, if it says."""
    try:
        last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
        sites = [site["num_examples"] for site in last["sites"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    counts: Counter[str] = Counter()
    for site in sites:
        counts.update(site)
    return dict(counts)


def write_evaluation(
    evaluation: Evaluation, out: Path, *, training: Mapping[str, int] | None = None
) -> Path:
    """Write results.json, predictions.npz, maps.npz, model_card.md and last report.html.

    Args:
        evaluation: what was found.
        out: directory, made when missing.
        training: modality -> images the model was trained on, for the card.

    Returns:
        The report.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", evaluation.results)
    _write_npz(out / "predictions.npz", evaluation.predictions)
    _write_npz(out / "maps.npz", evaluation.maps)
    write_card(evaluation.results, out / "model_card.md", training=training)
    report = out / "report.html"
    write_report(evaluation.results, out / "predictions.npz", out / "maps.npz", report)
    return report


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    save: Callable[..., None] = np.savez_compressed  # its stub lets no array be named freely
    save(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
