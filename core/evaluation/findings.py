"""What an evaluation has found so far, and what follows from it: the parts of results.json."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.evaluation.intervals import (
    Comparison,
    Resampled,
    compare,
    delong,
    draw_weights,
    holm,
    interval,
    mean_over_modalities,
    resample,
    subgroups,
)
from core.evaluation.metrics import METRICS, metrics
from core.evaluation.stability import (
    CLEAN,
    MEAN,
    Row,
    bootstrap_rows,
    conclusion,
    left_out_rows,
    mean_of_tasks,
    seed_rows,
    variant_rows,
    with_means,
)
from core.evaluation.types import Prediction
from core.randomness import numpy_generator

Table = list[dict[str, Any]]
Columns = Mapping[str, Mapping[str, Sequence[str]]]
"""Name of a column -> task -> its value for each test image."""

COMPARED: Final = ("probe", "knn20", "finetune")
STABILITY_METHOD: Final = "knn20"
WITHOUT_INTERVAL: Final = ("ece",)
"""Biased upwards on few images: its interval would seldom hold the truth (benchmarks/README.md)."""
MEANS: Final = ("auroc", "accuracy", "balanced_accuracy")


class Findings:
    """Predictions, measured as they come in.

    Args:
        draws: of patients, for every interval.
        columns: for disparities between subgroups.
    """

    def __init__(self, draws: int, columns: Columns) -> None:
        self.draws = draws
        self.columns = columns
        self.results: Table = []
        self.subgroups: Table = []
        self.arrays: dict[str, NDArray[Any]] = {}
        """scores/, labels/ and groups/ of each prediction on all labels"""
        self.measured: dict[tuple[str, str], dict[str, dict[str, Resampled]]] = {}
        """method, model -> task -> metric, on all labels"""
        self.rows: list[Row] = []
        self._kept: dict[tuple[str, str, str], Prediction] = {}
        self._subsets: list[Prediction] = []
        self._weights: tuple[str, NDArray[np.uint16]] = ("", np.empty((0, 0), np.uint16))
        self._variants: dict[str, dict[str, float]] = {}

    def add(self, prediction: Prediction) -> None:
        """Measure a prediction; intervals are computed on all labels only.

        Raises:
            UserError: its scores cannot be measured.
        """
        p = prediction
        if p.fraction < 100:
            where = f"{p.task}, {p.method} of {p.model}"
            values = metrics(p.scores, p.labels, where=where)
            figures = {n: {"value": v, "low": None, "high": None} for n, v in values.items()}
            if p.method == STABILITY_METHOD:
                self._subsets.append(p)
        else:
            measured = resample(p, self._task_weights(p))
            figures = {name: asdict(interval(measure)) for name, measure in measured.items()}
            for name in WITHOUT_INTERVAL:
                figures[name] |= {"low": None, "high": None}
            self.measured.setdefault((p.method, p.model), {})[p.task] = measured
            self._kept[p.method, p.model, p.task] = p
            key = f"{p.model}|{p.task}|{p.method}|{p.fraction:g}|{p.seed}"
            self.arrays |= {f"scores/{key}": p.scores, f"labels/{key}": p.labels}
            self.arrays[f"groups/{key}"] = p.groups
            self._add_subgroups(p)
        self.results.append({
            "model": p.model, "task": p.task, "method": p.method, "fraction": p.fraction,
            "seed": p.seed, "n_train": p.n_train, "metrics": {n: figures[n] for n in METRICS},
        })  # fmt: skip

    def add_variant(self, level: str, prediction: Prediction) -> None:
        """Measure what else a run could have released, as STABILITY_METHOD's AUROC."""
        auroc = metrics(prediction.scores, prediction.labels)["auroc"]
        self._variants.setdefault(level, {})[prediction.task] = auroc

    def means(self) -> Table:
        """Means over modalities on all labels, with intervals; on fewer, the mean over subsets."""
        table: Table = []
        for (method, model), tasks in self.measured.items():
            for name in MEANS:
                mean = mean_over_modalities({task: found[name] for task, found in tasks.items()})
                table.append({
                    "model": model, "method": method, "fraction": 100.0, "metric": name,
                    **asdict(interval(mean)), "over_seeds_sd": None,
                })  # fmt: skip
        groups: dict[tuple[str, str, float], dict[int, dict[str, float]]] = {}
        for row in self.results:
            if row["fraction"] < 100:
                key = (row["model"], row["method"], row["fraction"])
                values = groups.setdefault(key, {}).setdefault(row["seed"], {})
                values[row["task"]] = row["metrics"]["auroc"]["value"]
        for (model, method, fraction), seeds in groups.items():
            found = [mean_of_tasks(values) for values in seeds.values()]
            spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
            table.append({
                "model": model, "method": method, "fraction": fraction, "metric": "auroc",
                "value": float(np.mean(found)), "low": None, "high": None, "over_seeds_sd": spread,
            })  # fmt: skip
        return table

    def comparisons(self, names: Sequence[str]) -> Table:
        """AUROC of the first model less each other's; Holm's correction over all of a method."""
        table: Table = []
        for method in COMPARED:
            rows = [row for other in names[1:] for row in self._against(method, names[0], other)]
            adjusted = holm([row["p"] for row in rows]) if rows else []
            for row, p in zip(rows, adjusted, strict=True):
                table.append(row | {"p_holm": p})
        return table

    def stability(self, names: Sequence[str]) -> tuple[Table, str]:
        """Rows of every condition, means included, and what of the first model's lead survives."""
        method, first = STABILITY_METHOD, names[0]
        aurocs = {
            model: {task: found["auroc"] for task, found in tasks.items()}
            for (way, model), tasks in self.measured.items()
            if way == method
        }
        clean = {m: {t: a.value for t, a in tasks.items()} for m, tasks in aurocs.items()}
        rows = with_means([
            *self.rows,
            *seed_rows(self._subsets),
            *variant_rows("aggregation", first, method, clean[first], self._variants),
        ])  # fmt: skip
        rows += [*bootstrap_rows(aurocs, first, method), *left_out_rows(clean, method)]
        if not any(row.factor == CLEAN and row.task == MEAN for row in rows):
            return [], ""
        return [asdict(row) for row in rows], conclusion(rows, first, names[1:], method)

    def _task_weights(self, p: Prediction) -> NDArray[np.uint16]:
        """Drawn once a task, so that all its models meet the same patients."""
        if self._weights[0] != p.task:
            draws = numpy_generator("bootstrap", p.task)
            self._weights = (p.task, draw_weights(p.groups, self.draws, draws))
        return self._weights[1]

    def _add_subgroups(self, p: Prediction) -> None:
        for column, tasks in self.columns.items():
            if p.method == COMPARED[0] and p.task in tasks:
                self.subgroups += [
                    {"model": p.model, "task": p.task, "column": column, **asdict(group)}
                    for group in subgroups(p.scores, p.labels, tasks[p.task])
                ]

    def _against(self, method: str, first: str, other: str) -> Iterator[dict[str, Any]]:
        ours, theirs = (self.measured.get((method, model), {}) for model in (first, other))
        both = [task for task in ours if task in theirs]
        if not both:
            return
        shared = {"method": method, "a": first, "b": other, "metric": "auroc"}
        for task in both:
            found, test = self._compare(method, task, first, other)
            yield {"task": task, **shared, **asdict(found), "test": test}
        if len(both) > 1:
            mean, other_mean = (
                mean_over_modalities({task: side[task]["auroc"] for task in both})
                for side in (ours, theirs)
            )
            found = compare(mean, other_mean)
            yield {"task": MEAN, **shared, **asdict(found), "test": "paired bootstrap"}

    def _compare(self, method: str, task: str, a: str, b: str) -> tuple[Comparison, str]:
        """DeLong's test where its assumptions hold, else the paired bootstrap over patients."""
        one, two = (self._kept[method, model, task] for model in (a, b))
        single = not one.multi_label and len(np.unique(one.groups)) == len(one.groups)
        present = np.bincount(one.labels, minlength=2) if not one.multi_label else np.zeros(0)
        if single and len(one.classes) == 2 and present.min() > 1:
            return delong(one.labels, one.scores[:, 1], two.scores[:, 1]), "DeLong"
        measured = (self.measured[method, model][task]["auroc"] for model in (a, b))
        return compare(*measured), "paired bootstrap"
