"""What the sites' answers come to: means of sites, pooled figures, a table with its explanation."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.evaluation.pooled import Bins, Pooled, ScoreHistogram, pooled_auroc, weighted_mean
from core.modalities import MODALITIES, TITLES
from core.wire import EVALUATION_COUNTS, HISTOGRAM, MEASURES, METHODS, SIDES, EvaluationReply

MEAN_LINE = (
    "A mean of sites weighs each site by its test images. A mean of AUROCs is not the AUROC over "
    "all images: it compares no image with one of another site."
)
POOLED_LINE = (
    "Pooled AUROC ranks the images of all sites together: share x within sites + (1 - share) x "
    "across them. It takes one probe for all; scores of probes fitted at the sites differ in scale."
)
NO_POOLED_LINE = (
    "No pooled AUROC: it takes one probe for all sites (--probe-data), and score histograms of two "
    "sites or more (send_score_histograms in their policies)."
)
MAX_WIDTH = 0.2
"""Bounds further apart than this leave no pooled figure worth showing."""
HEADERS = {"probe": "probe", "knn": "kNN", "shared_probe": "shared probe"}

Figures = dict[str, Any]


def combine(
    answers: Mapping[str, EvaluationReply], probe_classes: Mapping[str, tuple[str, ...]]
) -> Figures:
    """Figures of sites, of modalities over sites, and their mean over modalities.

    Args:
        answers: Site -> its answer.
        probe_classes: Modality -> classes of the evaluator's probe.
    """
    sites = {
        site: {"modalities": _by_modality(answer.metrics), "notes": answer.notes}
        for site, answer in sorted(answers.items())
    }
    modalities: Figures = {}
    for name in MODALITIES:
        rows = [s["modalities"][name] for s in sites.values() if name in s["modalities"]]
        if rows:
            modalities[name] = {
                "sites": len(rows),
                "num_test": sum(row["num_test"] for row in rows),
                "mean_of_sites": _mean_of_sites(rows),
                "pooled": _pooled(answers, name, probe_classes.get(name, ())),
            }
    pooled = any(row["pooled"] for row in modalities.values())
    return {
        "sites": sites,
        "modalities": modalities,
        "mean_over_modalities": _mean_over_modalities(modalities),
        "explanation": f"{MEAN_LINE} {POOLED_LINE if pooled else NO_POOLED_LINE}",
    }


def show(result: Figures, console: Console) -> None:
    """Print the table, its explanation, and what is missing from it."""
    rows = [row for site in result["sites"].values() for row in site["modalities"].values()]
    methods = [method for method in METHODS if any(method in row for row in rows)]
    table = Table(title=escape(f"Measured at the sites, test split: {result['model']}"))
    table.add_column("modality and site", overflow="fold")
    table.add_column("test", justify="right", no_wrap=True)
    for method in methods:
        table.add_column(f"{HEADERS[method]}\nAUROC / acc.", justify="right", no_wrap=True)
    for modality, whole in result["modalities"].items():
        table.add_row(f"[bold]{TITLES[modality]}[/]")
        for site, own in result["sites"].items():
            if row := own["modalities"].get(modality):
                table.add_row(f"  {escape(site)}", str(row["num_test"]), *_cells(row, methods))
        if whole["sites"] > 1:
            cells = _cells(whole["mean_of_sites"], methods)
            table.add_row("  [italic]mean of sites[/]", str(whole["num_test"]), *cells)
        if pooled := whole["pooled"]:
            # Of the shared probe, which comes last.
            cells = [""] * (len(methods) - 1) + [_pooled_cell(pooled)]
            table.add_row("  [italic]pooled[/]", "", *cells)
        table.add_section()
    if len(result["modalities"]) > 1:
        cells = _cells(result["mean_over_modalities"], methods)
        table.add_row("[bold]mean over modalities[/]", "", *cells)
    console.print(table)
    console.print(result["explanation"], highlight=False)
    for modality, whole in result["modalities"].items():
        if whole["pooled"]:
            console.print(_pooled_sentence(TITLES[modality], whole["pooled"]), highlight=False)
    for text in _missing(result):
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _by_modality(metrics: Mapping[str, int | float]) -> Figures:
    """Modality -> counts, and method -> measure -> figure."""
    found: Figures = {}
    for modality in MODALITIES:
        if f"num_test/{modality}" not in metrics:
            continue
        row: Figures = {name: metrics[f"{name}/{modality}"] for name in EVALUATION_COUNTS}
        for method in METHODS:
            if f"{method}_auroc/{modality}" in metrics:
                row[method] = {name: metrics[f"{method}_{name}/{modality}"] for name in MEASURES}
        found[modality] = row
    return found


def _mean_of_sites(rows: list[Figures]) -> Figures:
    means: Figures = {}
    for method in METHODS:
        if there := [row for row in rows if method in row]:
            counts = [row["num_test"] for row in there]
            means[method] = {
                name: weighted_mean([row[method][name] for row in there], counts)
                for name in MEASURES
            }
    return means


def _pooled(
    answers: Mapping[str, EvaluationReply], modality: str, names: tuple[str, ...]
) -> Figures | None:
    """Pooled AUROC of each class of which two sites sent histograms, and the mean over these."""
    classes: list[Figures] = []
    found: list[Pooled] = []
    for number, name in enumerate(names):
        keys = [f"{HISTOGRAM}{modality}/{number}/{side}" for side in SIDES]
        there = {
            site: a.histograms for site, a in sorted(answers.items()) if keys[0] in a.histograms
        }
        if len(there) > 1:
            sites = [
                ScoreHistogram(*(Bins.from_array(arrays[key]) for key in keys))
                for arrays in there.values()
            ]
            found.append(pooled_auroc(sites))
            classes.append({"class": name, "sites": list(there), **asdict(found[-1])})
    if not found:
        return None
    figures = ("auroc", "low", "high", "within", "across", "within_share")
    means = {key: float(np.mean([getattr(pooled, key) for pooled in found])) for key in figures}
    return {
        **means,
        "too_coarse": means["high"] - means["low"] > MAX_WIDTH,
        "sites": max(len(row["sites"]) for row in classes),
        "classes": classes,
    }


def _mean_over_modalities(modalities: Figures) -> Figures:
    """Each modality counts once; a method's mean is over the modalities that have it."""
    means: Figures = {}
    rows = [row["mean_of_sites"] for row in modalities.values()]
    for method in METHODS:
        if there := [row[method] for row in rows if method in row]:
            means[method] = {n: float(np.mean([row[n] for row in there])) for n in MEASURES}
    return means


def _cells(row: Figures, methods: list[str]) -> list[str]:
    return [
        f"{row[method]['auroc']:.3f} / {row[method]['accuracy']:.3f}" if method in row else ""
        for method in methods
    ]


def _pooled_cell(pooled: Figures) -> str:
    return "too coarse" if pooled["too_coarse"] else f"{pooled['auroc']:.3f} /     -"


def _pooled_sentence(title: str, pooled: Figures) -> str:
    count = len(pooled["classes"])
    which = f", mean of {count} classes each against the rest" if count > 1 else ""
    bounds = f"for certain between {pooled['low']:.3f} and {pooled['high']:.3f}"
    if pooled["too_coarse"]:
        return (
            f"{title}: the pooled AUROC of {pooled['sites']} sites{which} is {bounds}: too coarse "
            "to say more. Bins are joined until each has enough patients; that takes more patients."
        )
    return (
        f"{title}: pooled {pooled['auroc']:.3f} over {pooled['sites']} sites{which} ({bounds}); "
        f"within sites {pooled['within']:.3f} ({pooled['within_share']:.0%} of the pairs), across "
        f"sites {pooled['across']:.3f}."
    )


def _missing(result: Figures) -> list[str]:
    words = {"skipped": "not measured", "pooling": "not pooled"}
    texts = []
    for site, own in result["sites"].items():
        for name, reason in own["notes"].items():
            kind, _, modality = name.partition("/")
            texts.append(f"site '{site}', {TITLES[modality]}: {words[kind]}: {reason}")
    return texts + [f"'{site}' did not answer: {why}" for site, why in result["failures"].items()]
