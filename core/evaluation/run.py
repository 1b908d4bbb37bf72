"""The whole evaluation of models on labelled images: results.json and what a report draws."""

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import UserError
from core.evaluate import Task, check_task, labelled_tasks
from core.evaluation.attention import attention_maps, prototype_maps
from core.evaluation.baselines import HAND_MADE, PIXELS, random_weights
from core.evaluation.findings import STABILITY_METHOD, Columns, Findings
from core.evaluation.finetune import finetune
from core.evaluation.leakage import find_leaks, refuse_leaks
from core.evaluation.models import LoadedModel
from core.evaluation.official import official_figures
from core.evaluation.protocol import (
    METHODS,
    PERCENTS,
    FeatureSource,
    TaskData,
    embed_task,
    model_source,
    predict_from,
    scarce_classes,
)
from core.evaluation.stability import perturbation_rows, run_variants
from core.randomness import numpy_generator
from core.shards import Shard

MOST_IN_MAPS: Final = 400
"""Test images of a task in the report's maps."""

OnPart = Callable[[str, int, int], None]
"""Called with what comes next, parts done and parts asked for."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        fractions: of the labels, in percent.
        seeds: label subsets at each fraction below 100.
        bootstrap_draws: of patients, for the intervals.
        last_blocks: of a transformer, whose tokens the probe sees.
        fine_tune: also fine-tune the models in full, on all labels.
        baselines: also measure random weights of the first model's shape, pixels, hand-made ones.
        stability: perturb the test images and vary other choices.
        report_leaks: go on where splits overlap, and say so in the report.
    """

    fractions: tuple[float, ...] = PERCENTS
    seeds: tuple[int, ...] = (0, 1, 2)
    bootstrap_draws: int = 1000
    last_blocks: int = 3
    fine_tune: bool = False
    baselines: bool = True
    stability: bool = True
    report_leaks: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What was found: `results` is JSON, the others are arrays by name for the report."""

    results: dict[str, Any]
    predictions: dict[str, NDArray[Any]]
    maps: dict[str, NDArray[Any]]


def evaluate(
    models: Sequence[LoadedModel],
    shards: Sequence[Shard],
    settings: Settings,
    *,
    columns: Columns | None = None,
    on_part: OnPart = lambda what, done, total: None,
) -> Evaluation:
    """Measure models and baselines on the test splits of all labelled modalities.

    Args:
        models: the first is the one the report is about, the others are compared with it.
        shards: of one data directory.
        settings: how.
        columns: for disparities between subgroups.
        on_part: progress.

    Raises:
        UserError: nothing is labelled, a split cannot be measured, splits overlap, features are
            not finite, or two models have one name.
    """
    tasks, leaks = checked_tasks(shards, report_leaks=settings.report_leaks)
    networks = list(models)
    if settings.baselines and models[0].kind != "random":
        networks.append(random_weights(models[0], settings.seeds[0]))
    sources = [model_source(m, last_blocks=settings.last_blocks) for m in networks]
    sources += [PIXELS, HAND_MADE] if settings.baselines else []
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"two models have one name ({', '.join(names)}); rename a file")

    findings, widths = Findings(settings.bootstrap_draws, columns or {}), dict[str, int]()
    maps: dict[str, NDArray[Any]] = {}
    warnings = {model.note for model in networks if model.note}
    run = _run_directory(models[0])
    variants = run_variants(run, models[0]) if run and settings.stability else {}
    total = len(tasks) * len(sources)
    for number, task in enumerate(tasks):
        chosen = _map_images(task, maps)
        for place, source in enumerate(sources):
            on_part(f"{source.name}: {task.name}", number * len(sources) + place, total)
            data = embed_task(source, task)
            widths[source.name] = data.features["test"].shape[1]
            warnings |= set(scarce_classes(data, settings.fractions))
            for p in predict_from(data, METHODS, settings.fractions, settings.seeds):
                findings.add(p)
            if settings.stability:
                findings.rows += perturbation_rows(source, task, data, method=STABILITY_METHOD)
            if place < len(models) and settings.fine_tune:
                findings.add(finetune(models[place], task, seed=settings.seeds[0]))
            if place < len(networks):
                _map_features(networks[place], task, data, chosen, maps)
        for level, variant in variants.items():
            known = embed_task(model_source(variant, last_blocks=1), task)
            findings.add_variant(level, *predict_from(known, [STABILITY_METHOD], [100], [0]))
    on_part("joining", total, total)
    if run:
        images = {name.split("|")[1]: a for name, a in maps.items() if name.startswith("images|")}
        maps |= prototype_maps(run, images)
    stability, sentence = findings.stability(names) if settings.stability else ([], "")
    results = {
        "created": datetime.date.today().isoformat(),
        "versions": _versions(),
        "settings": dataclasses.asdict(settings) | {"neighbours": [11, 20]},
        "models": _describe(networks, sources, widths),
        "tasks": [_describe_task(task) for task in tasks],
        "results": findings.results,
        "means": findings.means(),
        "comparisons": findings.comparisons(names),
        "subgroups": findings.subgroups,
        "leakage": [dataclasses.asdict(leak) for leak in leaks],
        "stability": stability,
        "stability_conclusion": sentence,
        "warnings": sorted(warnings),
    }
    return Evaluation(results, findings.arrays, maps)


def checked_tasks(shards: Sequence[Shard], *, report_leaks: bool) -> tuple[list[Task], list[Any]]:
    """The labelled modalities, refused where they cannot be measured, and where splits overlap.

    Raises:
        UserError: nothing is labelled, a split holds one class, a class one training image, or
            splits overlap and that was not asked to be reported only.
    """
    tasks = labelled_tasks(shards)
    if not tasks:
        raise UserError("the data hold no labelled image; nothing can be measured")
    for task in tasks:
        check_task(task)
    leaks = find_leaks(shards)
    refuse_leaks(leaks, report_only=report_leaks)
    return tasks, leaks


def _run_directory(loaded: LoadedModel) -> Path | None:
    return loaded.path.parent if loaded.kind == "run" else None


def _map_images(task: Task, maps: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Keep the test images that the report shows, and return their positions in the split."""
    name, everything = f"{task.name}/{task.shard.name}", np.arange(len(task.test))
    chosen = everything
    if len(chosen) > MOST_IN_MAPS:
        draws = numpy_generator("maps", name)
        chosen = np.sort(draws.choice(everything, MOST_IN_MAPS, replace=False))
    indices = task.test[chosen]
    maps[f"images|{name}"] = np.asarray(task.shard.images[indices])
    maps[f"labels|{name}"] = task.labels(indices)
    maps[f"groups|{name}"] = task.shard.patient[indices]
    return chosen


def _map_features(
    loaded: LoadedModel, task: Task, data: TaskData, chosen: NDArray[np.int64],
    maps: dict[str, NDArray[Any]],
) -> None:  # fmt: skip
    """Features of the last block, and attention, of the images that the report shows."""
    last = data.features["test"].shape[1] // data.blocks
    maps[f"{loaded.name}|{data.task}"] = data.features["test"][chosen][:, -last:]
    attention = attention_maps(loaded, maps[f"images|{data.task}"], task.name)
    if attention is not None:
        maps[f"attention|{loaded.name}|{data.task}"] = attention


def _describe(
    networks: Sequence[LoadedModel], sources: Sequence[FeatureSource], widths: dict[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for place, source in enumerate(sources):
        row: dict[str, Any] = dict.fromkeys(("path", "sha256", "parameters", "px"))
        row |= {"name": source.name, "kind": "hand-made", "features": widths[source.name]}
        if place < len(networks):
            loaded = networks[place]
            row |= {"kind": loaded.kind, "parameters": loaded.parameters, "px": loaded.model.px}
            if loaded.kind != "random":
                row |= {"path": str(loaded.path), "sha256": loaded.sha256}
        rows.append(row)
    return rows


def _describe_task(task: Task) -> dict[str, Any]:
    splits = {"train": task.train, "val": task.val, "test": task.test}
    patient = task.shard.patient
    return {
        "task": f"{task.name}/{task.shard.name}",
        "modality": task.name,
        "shard": task.shard.name,
        "classes": list(task.shard.classes[task.name]),
        "multi_label": False,
        "n": {split: len(indices) for split, indices in splits.items()},
        "patients": {split: len(np.unique(patient[i])) for split, i in splits.items()},
        "official": official_figures(task),
    }


def _versions() -> dict[str, str]:
    packages = ("fedmermed", "timm", "scikit-learn", "numpy")
    found = {"torch": str(torch.__version__)}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found
