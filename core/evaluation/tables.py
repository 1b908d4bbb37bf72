"""Look up what results.json holds, as tables and as a headline; report and model card share it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from core.evaluation.types import Interval
from core.evaluation.words import METHODS, METRICS, MISSING, as_interval, number, signed, span
from core.modalities import TITLES

Results = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure of a table as text."""

    value: str
    range: str = ""
    best: bool = False
    """The interval of its difference from every other column excludes zero"""
    against_first: str = ""
    """As `verdict` says of its difference from the first column"""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    title: str
    cells: tuple[Cell, ...]
    is_mean: bool = False


def task_title(results: Results, task: str) -> str:
    """A task in words; the shard is named only where its modality has several."""
    if task == "mean":
        return "mean over modalities"
    modality, _, shard = task.partition("/")
    title = TITLES.get(modality, modality)
    same = [row for row in results.get("tasks", ()) if row["modality"] == modality]
    return f"{title}, {shard}" if len(same) > 1 else title


def model_names(results: Results) -> list[str]:
    """The models in the order in which they were given; the first is the one evaluated."""
    return [model["name"] for model in results.get("models", ())]


def full_fraction(results: Results) -> float:
    """The largest share of the labels, in percent: what every main table shows."""
    return max((row["fraction"] for row in results.get("results", ())), default=100)


def methods(results: Results) -> list[str]:
    """The methods with results on all the labels."""
    full = full_fraction(results)
    found = {r["method"] for r in results.get("results", ()) if r["fraction"] == full}
    return [m for m in METHODS if m in found] + sorted(found - set(METHODS))


def metric(
    results: Results, model: str, task: str, method: str, name: str = "auroc"
) -> Interval | None:
    """A figure on all the labels; of several seeds the first."""
    full = full_fraction(results)
    key = (model, task, method, full)
    rows = [
        row for row in results.get("results", ())
        if (row["model"], row["task"], row["method"], row["fraction"]) == key
    ]  # fmt: skip
    if not rows:
        return None
    return as_interval(min(rows, key=lambda row: row["seed"])["metrics"].get(name))


def mean(results: Results, model: str, method: str, name: str = "auroc") -> Interval | None:
    """The mean over modalities on all the labels."""
    key = (model, method, full_fraction(results), name)
    for row in results.get("means", ()):
        if (row["model"], row["method"], row["fraction"], row["metric"]) == key:
            return as_interval(row)
    return None


def over_labels(results: Results, model: str, task: str, method: str) -> dict[float, list[float]]:
    """Percent of the labels -> AUROC of each seed; of "mean" where a seed has all tasks."""
    tasks = [row["task"] for row in results["tasks"]]
    seeds: dict[tuple[float, int], dict[str, float]] = {}
    for row in results["results"]:
        auroc = as_interval(row["metrics"].get("auroc"))
        if (row["model"], row["method"]) == (model, method) and auroc:
            seeds.setdefault((row["fraction"], row["seed"]), {})[row["task"]] = auroc.value
    points: dict[float, list[float]] = {}
    for (fraction, _), values in sorted(seeds.items()):
        if task in values:
            points.setdefault(fraction, []).append(values[task])
        elif task == "mean" and all(name in values for name in tasks):
            groups: dict[str, list[float]] = {}
            for name in tasks:
                groups.setdefault(name.partition("/")[0], []).append(values[name])
            mean_of_groups = fmean(fmean(group) for group in groups.values())
            points.setdefault(fraction, []).append(mean_of_groups)
    return points


def difference(results: Results, task: str, method: str, a: str, b: str) -> Interval | None:
    """AUROC of model a less that of b, if the two were compared."""
    for row in results.get("comparisons", ()):
        if (row["task"], row["method"], row["metric"]) != (task, method, "auroc"):
            continue
        low, high = (math.nan if row[k] is None else row[k] for k in ("low", "high"))
        if (row["a"], row["b"]) == (a, b):
            return Interval(row["difference"], low, high)
        if (row["a"], row["b"]) == (b, a):
            return Interval(-row["difference"], -high, -low)
    return None


def verdict(interval: Interval | None) -> str:
    """Whether a difference is "higher" or "lower": its interval excludes zero; else nothing."""
    if interval is None:
        return ""
    return "higher" if interval.low > 0 else "lower" if interval.high < 0 else ""


def auroc_table(results: Results, method: str) -> tuple[list[str], list[Row]]:
    """Models that the method was run on, and a row a task with their mean last."""
    columns = [
        name for name in model_names(results)
        if any(metric(results, name, task["task"], method) for task in results["tasks"])
    ]  # fmt: skip
    tasks = [task["task"] for task in results["tasks"]]
    rows = [
        Row(task_title(results, task), _cells(results, task, method, columns), task == "mean")
        for task in [*tasks, *(["mean"] if len(tasks) > 1 else [])]
    ]
    return columns, [row for row in rows if any(cell.value != MISSING for cell in row.cells)]


def _cells(results: Results, task: str, method: str, columns: Sequence[str]) -> tuple[Cell, ...]:
    cells = []
    for name in columns:
        found = (
            mean(results, name, method) if task == "mean"
            else metric(results, name, task, method)
        )  # fmt: skip
        others = [difference(results, task, method, name, b) for b in columns if b != name]
        cells.append(
            Cell(
                number(found.value if found else None),
                span(found),
                best=bool(others) and all(verdict(other) == "higher" for other in others),
                against_first=verdict(difference(results, task, method, name, columns[0])),
            )
        )
    return tuple(cells)


def metric_rows(results: Results, method: str) -> list[tuple[str, str, list[Cell]]]:
    """Task, model, and a cell for each of METRICS."""
    rows = []
    for task in (task["task"] for task in results.get("tasks", ())):
        for model in model_names(results):
            found = [metric(results, model, task, method, name) for name in METRICS]
            if any(found):
                cells = [Cell(number(f.value if f else None), span(f)) for f in found]
                rows.append((task_title(results, task), model, cells))
    return rows


def official_tables(results: Results) -> list[tuple[str, Results, list[tuple[str, float, float]]]]:
    """Task, its official block, and our own rows (method, AUROC, accuracy) for each such task."""
    found = []
    for task in results.get("tasks", ()):
        if not task.get("official"):
            continue
        ours = []
        for model in model_names(results):
            for way in methods(results):
                auroc, accuracy = (
                    metric(results, model, task["task"], way, name)
                    for name in ("auroc", "accuracy")
                )
                if auroc and accuracy:
                    name = f"{model}, {METHODS.get(way, way)}"
                    ours.append((name, auroc.value, accuracy.value))
        found.append((task_title(results, task["task"]), task["official"], ours))
    return found


def stability_tables(results: Results) -> list[tuple[str, list[str], list[Row]]]:
    """For each method, models as columns and a row a disturbance; each task only without means."""
    rows = results.get("stability") or ()
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        own = [row for row in own if row["task"] == "mean"] or own
        columns = list(dict.fromkeys(row["model"] for row in own))
        lines: dict[str, dict[str, Cell]] = {}
        for row in own:
            name = f"{row['factor']}: {row['level']}" if row["level"] else row["factor"]
            if row["metric"] != "auroc":
                name += f", {METRICS.get(row['metric'], row['metric'])}"
            if row["task"] != "mean":
                name += f", {task_title(results, row['task'])}"
            change = signed(row["change"]) if row["change"] else ""
            lines.setdefault(name, {})[row["model"]] = Cell(number(row["value"]), change)
        table = [
            Row(name, tuple(cells.get(model, Cell(MISSING)) for model in columns))
            for name, cells in lines.items()
        ]
        found.append((METHODS.get(method, method), columns, table))
    return found


def headline(results: Results) -> str:
    """What was found, in two sentences; empty if there is no mean."""
    names, ways = model_names(results), methods(results)
    if not names or not ways or (own := mean(results, names[0], ways[0])) is None:
        return ""
    tasks = [task["task"] for task in results["tasks"]]
    compared = "mean" if len(tasks) > 1 else tasks[0]
    count = len({task["modality"] for task in results["tasks"]})
    over = "one modality" if count == 1 else f"{count} modalities"
    what = f"a mean AUROC of {number(own.value)}{_in_95(own)} over {over}"
    if len(tasks) == 1:
        title = task_title(results, tasks[0])
        what = f"an AUROC of {number(own.value)}{_in_95(own)} on {title}"
    way = METHODS.get(ways[0], ways[0])
    text = f"{names[0]} reaches {what}, by {way} on {full_fraction(results):g} % of the labels."
    groups: dict[str, list[str]] = {}
    for name in names[1:]:
        if (other := mean(results, name, ways[0])) is None:
            continue
        gap = difference(results, compared, ways[0], names[0], name)
        said = verdict(gap) if gap else "beside"
        detail = f"{signed(gap.value)}; {span(gap, sign=True)}" if gap else number(other.value)
        groups.setdefault(said, []).append(f"{name} ({detail})")
    phrases = {
        "higher": "higher than", "lower": "lower than", "": "not told apart from",
        "beside": "not compared with",
    }  # fmt: skip
    parts = [f"{words} {_listed(groups[k])}" for k, words in phrases.items() if k in groups]
    return f"{text} That is {_listed(parts, '; ')}." if parts else text


def _in_95(interval: Interval) -> str:
    return f" (95 % interval {bounds})" if (bounds := span(interval)) else ""


def _listed(parts: Sequence[str], comma: str = ", ") -> str:
    return parts[0] if len(parts) == 1 else f"{comma.join(parts[:-1])} and {parts[-1]}"
