"""What a finished run comes to: a table, a picture, summary.json and the released model."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.checkpoint import load_arrays, read_json, write_json
from core.config import Recipe
from core.errors import UserError
from core.modalities import TITLES
from core.sites import open_site
from core.wire import EPSILON, GlobalState
from server.history import Line, read_history, read_recipe

Series = dict[str, list[tuple[int, float]]]
"""modality or site -> (round, value)"""


def summarise(
    out: Path, recipe: Recipe, data: Mapping[str, Path], *, engine: str, console: Console
) -> None:
    """Write summary.json, summary.png and model.safetensors of a finished run, and show a table.

    Args:
        out: The run directory.
        recipe: Its recipe.
        data: Site -> directory of its shards, to measure the final model; without any it stays
            unmeasured.
        engine: Name of the engine, for the record.
        console: Where the table goes.
    """
    lines, file = read_history(out), out / "summary.json"
    if len(lines) < recipe.federation.rounds:
        raise UserError(f"'{out}' has {len(lines)} of {recipe.federation.rounds} rounds; run again")
    if not file.exists():
        model = out / "model.safetensors"
        # A coordinator's server has no torch, without which timm's names cannot be told.
        digest = export_model(out, model)[0] if importlib.util.find_spec("torch") else None
        started = time.monotonic()
        final = _measure(recipe, model, data, _images(lines[-1]))
        evaluation_seconds = time.monotonic() - started
        loss, ceiling = series(lines, "loss"), series(lines, "loss_ceiling")
        # A site measures the model that it receives: the one after the round before.
        auroc = {m: [(r - 1, v) for r, v in s] for m, s in series(lines, "knn_auroc").items()}
        for modality, value in final.items():
            auroc.setdefault(modality, []).append((len(lines), value))
        spent = site_epsilons(lines)
        from server.picture import draw_epsilon, draw_picture  # matplotlib takes a second to import

        if loss or auroc:
            draw_picture(out / "summary.png", recipe.name, loss, ceiling, auroc)
        else:  # the sites keep what could be drawn, under record privacy or by their policies
            draw_epsilon(out / "summary.png", recipe.name, spent, recipe.privacy.delta)
        summary = {
            "study": recipe.name,
            "engine": engine,
            "seed": recipe.seed,
            "rounds": len(lines),
            "sites": _sites(lines),
            "metrics": _metrics(_images(lines[-1]), loss, ceiling, auroc),
            "seconds": _seconds(lines) | {"final_evaluation": round(evaluation_seconds, 3)},
            "bytes_up": sum(line["bytes_up"] for line in lines),
            "bytes_down": sum(line["bytes_down"] for line in lines),
            "privacy": {
                "mode": recipe.privacy.mode,
                "delta": recipe.privacy.delta,
                "epsilon": _epsilons(recipe, lines),
            },
            "alarms": [words for line in lines for words in line["alarms"]],
            "outliers": outlier_report(lines),
            "model": {"path": str(model), "sha256": digest} if digest else None,
        }
        write_json(file, summary)
    summary = read_json(file)
    console.print(_table(summary))
    for site, value in summary.get("privacy", {}).get("epsilon", {}).items():
        console.print(
            f"epsilon  {site} {value:.3f}, at delta {summary['privacy']['delta']:g}",
            markup=False, highlight=False,
        )  # fmt: skip
    for words in [*summary["alarms"], *summary.get("outliers", ())]:
        console.print(words, style="yellow", markup=False, soft_wrap=True)
    model_line = (
        str(out / "model.safetensors")
        if summary["model"]
        else f"where torch is installed: fedmermed-server export {out} MODEL.safetensors"
    )
    for what, where in (
        ("model", model_line), ("picture", out / "summary.png"), ("figures", file),
    ):  # fmt: skip
        console.print(f"{what:8} {where}", markup=False, highlight=False, soft_wrap=True)


def export_model(run: Path, out: Path) -> tuple[str, int]:
    """Write the teacher's backbone after the last round of a run directory.

    Returns:
        The file's sha256 and the round.

    Raises:
        UserError: the directory holds no round.
    """
    from core.export import export_teacher

    lines = read_history(run)
    if not lines or not (run / "recipe.json").exists():
        raise UserError(f"'{run}' holds no finished round; give the directory of a run")
    arrays, _ = load_arrays(run / f"round-{len(lines):04d}.safetensors")
    state = GlobalState.from_arrays(arrays)
    return export_teacher(read_recipe(run / "recipe.json"), state, out), len(lines)


def series(lines: Sequence[Line], metric: str) -> Series:
    """Modality -> (round, value) of one metric, modalities in their fixed order."""
    found: Series = {}
    for modality in TITLES:
        name = f"{metric}/{modality}"
        points = [(ln["round"], ln["metrics"][name]) for ln in lines if name in ln["metrics"]]
        if points:
            found[modality] = points
    return found


def site_epsilons(lines: Sequence[Line]) -> Series:
    """Site -> (round, epsilon of the study as its ledger had it), under record privacy."""
    found: Series = {}
    for line in lines:
        for site, outcome in sorted(line["sites"].items()):
            if EPSILON in outcome.get("metrics", {}):
                found.setdefault(site, []).append((line["round"], outcome["metrics"][EPSILON]))
    return found


def _epsilons(recipe: Recipe, lines: Sequence[Line]) -> dict[str, float]:
    """What was spent: by each site under record privacy, of the model under site privacy."""
    if recipe.privacy.mode == "site":
        return {"model": lines[-1]["metrics"][EPSILON]}
    return {site: points[-1][1] for site, points in site_epsilons(lines).items()}


def _measure(
    recipe: Recipe, model: Path, data: Mapping[str, Path], images: dict[str, int]
) -> dict[str, float]:
    """Score the final model as the sites do: kNN AUROC, averaged over a modality's sites."""
    if not data or not recipe.evaluation.every_rounds:
        return {}
    from core.device import resolve_device
    from core.export import load_model
    from core.site_round import knn_auroc

    backbone = load_model(model, resolve_device("auto")).backbone
    found: dict[str, list[float]] = {}
    for path in data.values():
        for name, value in knn_auroc(recipe, backbone, open_site(path)).items():
            found.setdefault(name.removeprefix("knn_auroc/"), []).append(value)
    return {m: sum(found[m]) / len(found[m]) for m in images if m in found}


def _images(line: Line) -> dict[str, int]:
    """Modality -> training images of all sites admitted in a round."""
    images: dict[str, int] = {}
    for outcome in line["sites"].values():
        for modality, count in outcome.get("num_examples", {}).items():
            images[modality] = images.get(modality, 0) + count
    return {modality: images[modality] for modality in TITLES if modality in images}


def _metrics(
    images: dict[str, int], loss: Series, ceiling: Series, auroc: Series
) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for modality, count in images.items():
        row: dict[str, float] = {"images": count}
        if modality in loss:
            row |= {"loss_first": loss[modality][0][1], "loss_last": loss[modality][-1][1]}
        if modality in ceiling:
            row["loss_ceiling"] = ceiling[modality][-1][1]
        if modality in auroc:
            first, last = auroc[modality][0][1], auroc[modality][-1][1]
            row |= {"knn_auroc_first": first, "knn_auroc_last": last}
        rows[modality] = row
    return rows


def _sites(lines: list[Line]) -> dict[str, dict[str, Any]]:
    """Site -> how often it was admitted, and its images."""
    sites: dict[str, dict[str, Any]] = {}
    for line in lines:
        for site, outcome in line["sites"].items():
            row = sites.setdefault(site, {"rounds_admitted": 0, "num_examples": {}})
            if outcome["outcome"] == "admitted":
                row["rounds_admitted"] += 1
                row["num_examples"] = outcome["num_examples"]
    return sites


def outlier_report(lines: list[Line]) -> list[str]:
    """What a coordinator should look at: a sentence a site that was rejected or stood out."""
    found: dict[str, list[str]] = {}
    for line in lines:
        bad = {o["site"]: o["words"] for o in line.get("outliers", ())}
        for site, outcome in line["sites"].items():
            if outcome["outcome"] == "rejected":
                bad[site] = outcome["reason"]
        for site, words in bad.items():
            found.setdefault(site, []).append(words)
    return [
        f"site '{site}' was rejected or stood out in {len(words)} of {len(lines)} rounds; "
        f"the last time: {words[-1]}"
        for site, words in sorted(found.items())
    ]


def _seconds(lines: list[Line]) -> dict[str, float]:
    """Seconds by phase over all rounds; what sites spent lies within 'exchange'."""
    seconds: dict[str, float] = {}
    for line in lines:
        for phase, value in line["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        for outcome in line["sites"].values():
            for name, value in outcome.get("metrics", {}).items():
                if name.startswith("seconds_"):
                    phase = f"sites_{name.removeprefix('seconds_')}"
                    seconds[phase] = seconds.get(phase, 0.0) + value
    return {phase: round(value, 3) for phase, value in seconds.items()}


def _table(summary: dict[str, Any]) -> Table:
    phases = ("wait_for_sites", "exchange", "admit", "screen", "aggregate")
    sites = len(summary["sites"])
    seconds = sum(summary["seconds"].get(phase, 0.0) for phase in phases)
    table = Table(
        title=f"{summary['study']}: {summary['rounds']} rounds, {sites} sites, {seconds:.0f} s, "
        f"{summary['bytes_up'] / 1e6:.1f} MB up, {summary['bytes_down'] / 1e6:.1f} MB down"
    )
    table.add_column("modality", no_wrap=True)
    for header in ("images", "loss", "collapse", "kNN AUROC"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = {m: summary["metrics"][m] for m in TITLES if m in summary["metrics"]}
    for modality, row in rows.items():
        ceiling = f"{row['loss_ceiling']:.3f}" if "loss_ceiling" in row else ""
        loss, auroc = _change(row, "loss"), _change(row, "knn_auroc")
        table.add_row(TITLES[modality], str(row["images"]), loss, ceiling, auroc)
    if measured := [row for row in rows.values() if "knn_auroc_last" in row]:
        keys = ("knn_auroc_first", "knn_auroc_last")
        mean = {key: sum(row[key] for row in measured) / len(measured) for key in keys}
        table.add_section()
        table.add_row("mean", "", "", "", _change(mean, "knn_auroc"))
    return table


def _change(row: Mapping[str, float], name: str) -> str:
    if f"{name}_first" not in row:
        return ""
    return f"{row[f'{name}_first']:.3f} \u2192 {row[f'{name}_last']:.3f}"
