"""The report of an evaluation: one HTML file that needs nothing beside itself.

Everything from data passes through the template's escaping, and the page's own policy forbids it
scripts and the network.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import write_atomically
from core.errors import UserError
from core.evaluation import tables, words
from core.evaluation.figures import Look, Panel, look
from core.evaluation.figures_curves import (
    interval_chart,
    label_panel,
    reliability_panel,
    roc_panel,
)
from core.evaluation.figures_maps import (
    attention_strips,
    map_by_class,
    map_by_modality,
    neighbour_strips,
    prototype_strips,
)
from core.evaluation.page import page_environment
from core.evaluation.tables import Results
from core.evaluation.types import Prediction
from core.modalities import TITLES

Arrays = Mapping[str, NDArray[Any]]
Section = dict[str, Any]
KEYS = (
    *("created", "versions", "settings", "models", "tasks", "comparisons", "subgroups"),
    *("leakage", "stability_conclusion", "warnings"),
)
"""Of results.json, what the template asks for itself; absent ones leave their section out."""
FEWEST_IN_MAP = 8
"""Images of a task below which a 2-D map or a neighbour shows nothing."""


def write_report(results: Results, predictions: Path, maps: Path, out: Path) -> None:
    """Write the report.

    Args:
        results: the contents of results.json.
        predictions: npz with scores/, labels/, groups/ of "model|task|method|fraction|seed".
        maps: npz of at most some hundred test images a task: "model|task" features [n, D],
            "labels|task", "images|task" uint8; and, each optional, "groups|task" (patients),
            "attention|model|task" [n, rows, columns], "prototypes|modality" [K, D] with
            "counts|modality" [K] and "embeddings|task" [n, D].
        out: file to write. A section whose data are absent, as when one of the two files does not
            exist, is left out.

    Raises:
        UserError: one of the npz files is damaged.
    """
    environment = page_environment(Path(__file__).parent)
    environment.filters |= {
        "number": words.number, "signed": words.signed, "p_value": words.p_value,
        "interval": words.as_interval, "span": words.span,
    }  # fmt: skip
    models = tables.model_names(results)
    looks = {name: look(index) for index, name in enumerate(models)}
    ways = tables.methods(results)
    page = environment.get_template("report.html.j2").render(
        results=dict.fromkeys(KEYS) | results,
        subject=models[0] if models else "",
        looks=looks,
        method_titles=words.METHODS,
        metric_titles=words.METRICS,
        title_of=lambda task: tables.task_title(results, task),
        ways=ways,
        headline=tables.headline(results),
        chart=_headline_chart(results, ways, looks),
        auroc=[(way, *tables.auroc_table(results, way)) for way in ways],
        every_metric=[(way, tables.metric_rows(results, way)) for way in ways],
        label_panels=_label_panels(results, ways, looks),
        stability=tables.stability_tables(results),
        official=tables.official_tables(results),
        **_curves(results, _read(predictions), ways, looks),
        **_spaces(results, _read(maps), looks),
    )
    write_atomically(out, page.encode())


def _read(path: Path) -> Arrays:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is not a whole npz file: {error}; evaluate again") from None


def _headline_chart(
    results: Results, ways: Sequence[str], looks: Mapping[str, Look]
) -> Panel | None:
    found = {name: tables.mean(results, name, way) for way in ways[:1] for name in looks}
    rows = [(name, looks[name], interval) for name, interval in found.items() if interval]
    axis = "AUROC" if len(results.get("tasks", ())) == 1 else "mean AUROC over modalities"
    return interval_chart(rows, axis) if rows else None


def _curves(
    results: Results, arrays: Arrays, ways: Sequence[str], looks: Mapping[str, Look]
) -> Section:
    """ROC and calibration of the headline's method, a panel a task."""
    section: Section = {"roc": [], "calibration": []}
    full = tables.full_fraction(results)
    for task in results.get("tasks", ()):
        found: dict[str, Prediction] = {}
        for key in sorted(name.removeprefix("scores/") for name in arrays if name[:7] == "scores/"):
            model, name, way, fraction, seed = key.rsplit("|", 4)
            wanted = name == task["task"] and way in ways[:1] and float(fraction) == full
            if wanted and model in looks and model not in found:
                found[model] = Prediction(
                    model, name, way, full, int(seed), task["n"]["train"], arrays[f"scores/{key}"],
                    arrays[f"labels/{key}"], arrays[f"groups/{key}"], tuple(task["classes"]),
                )  # fmt: skip
        drawn = [(looks[model], found[model]) for model in looks if model in found]
        if drawn:
            title = tables.task_title(results, task["task"])
            section["roc"].append(roc_panel(title, drawn))
            section["calibration"].append(reliability_panel(title, drawn))
    return section


def _label_panels(results: Results, ways: Sequence[str], looks: Mapping[str, Look]) -> list[Panel]:
    """AUROC against the share of labels, for the first method that was run on several shares."""
    shown = [task["task"] for task in results.get("tasks", ())]
    if len(shown) > 1:
        shown.insert(0, "mean")
    for way in ways:
        rows = [row for row in results["results"] if row["method"] == way]
        if len({row["fraction"] for row in rows}) < 2:
            continue
        panels = []
        for task in shown:
            points = {model: tables.over_labels(results, model, task, way) for model in looks}
            drawn = [(looks[model], found) for model, found in points.items() if found]
            if drawn:
                panels.append(label_panel(tables.task_title(results, task), drawn))
        return panels
    return []


def _spaces(results: Results, arrays: Arrays, looks: Mapping[str, Look]) -> Section:
    """What is seen of the evaluated model's embedding space."""
    section: Section = {
        "map_all": None, "map_classes": [], "neighbours": [], "attention": [], "prototypes": [],
    }  # fmt: skip
    subject = next(iter(looks), "")
    features: dict[str, NDArray[np.float32]] = {}
    for task in results.get("tasks", ()):
        name, classes = task["task"], task["classes"]
        title = tables.task_title(results, name)
        if f"images|{name}" not in arrays or len(arrays[f"labels|{name}"]) < FEWEST_IN_MAP:
            continue
        images, labels = arrays[f"images|{name}"], arrays[f"labels|{name}"]
        rng = np.random.default_rng(0)
        if (own := arrays.get(f"{subject}|{name}")) is not None:
            features[title] = own
            groups = arrays.get(f"groups|{name}")
            section["map_classes"].append(map_by_class(title, own, labels, classes))
            strips = neighbour_strips(own, labels, images, classes, groups, rng)
            section["neighbours"].append((title, strips))
        attention = {
            model: arrays[key] for model in looks if (key := f"attention|{model}|{name}") in arrays
        }
        if attention:
            strips = attention_strips(attention, labels, images, classes, rng)
            section["attention"].append((title, strips))
    if len(features) > 1:
        section["map_all"] = map_by_modality(features, np.random.default_rng(0))
    section["prototypes"] = _prototypes(results, arrays)
    return section


def _prototypes(results: Results, arrays: Arrays) -> list[tuple[str, Any]]:
    section = []
    for modality, title in TITLES.items():
        tasks = [
            task for task in results.get("tasks", ())
            if task["modality"] == modality and f"embeddings|{task['task']}" in arrays
        ]  # fmt: skip
        if tasks and f"prototypes|{modality}" in arrays:
            strips = prototype_strips(
                arrays[f"prototypes|{modality}"],
                arrays[f"counts|{modality}"],
                np.concatenate([arrays[f"embeddings|{task['task']}"] for task in tasks]),
                [image for task in tasks for image in arrays[f"images|{task['task']}"]],
            )
            section.append((title, strips))
    return section
