"""The pictures of the live page, drawn by matplotlib as those of the report are.

Drawn here and not in the browser: SVG prints sharply, follows light and dark and is read aloud,
which no canvas does, and the page needs no code but its own.

**Guarantees**:
    - A picture has no style of its own, no script and no outside reference: colours are variables
      of the page's style sheet, so that light, dark and paper share it.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Final

from markupsafe import Markup

from core.evaluation.figures import Look, Panel, look
from core.modalities import TITLES
from server import report_curves as curves
from server.summary import Series
from server.tally import Points, Tally

DRAWING: Final = threading.Lock()
"""Settings of matplotlib are global: one picture at a time."""
STYLES: Final = frozenset({
    "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset",
    "stroke-linecap", "stroke-linejoin", "stroke-opacity", "opacity", "font-size", "text-anchor",
})  # fmt: skip
"""What matplotlib writes as style and SVG has as attributes too."""


def study_charts(tally: Tally, odd: Sequence[str]) -> dict[str, list[Panel]]:
    """The pictures of one study by section: losses, embeddings, updates, seconds.

    Args:
        tally: Its history.
        odd: Sites that are drawn by themselves where not all can be.
    """
    found: dict[str, list[Panel]] = {
        "losses": [], "embeddings": [], "updates": [], "seconds": [],
    }  # fmt: skip
    if not tally.rounds:
        return found
    losses = [_by_modality(tally, name) for name in ("loss", "loss_ceiling", "teacher_entropy")]
    with DRAWING:
        found["losses"] = curves.loss_panels(*losses)
        for metric, title in (
            ("rankme", "RankMe (effective rank)"),
            ("mean_cosine", "Mean cosine of embeddings"),
        ):
            if series := _by_modality(tally, metric):
                found["embeddings"].append(curves.modality_panel(title, series))
        if auroc := _auroc(tally):
            title = "kNN AUROC, validation"
            found["embeddings"].append(
                curves.modality_panel(title, auroc, reference=0.5, breaks=False)
            )
        if norms := {name: site.norms for name, site in tally.sites.items() if site.norms}:
            found["updates"] = [curves.site_panel("Length of each site's update", norms, odd)]
        found["seconds"] = [curves.seconds_panel(tally.phases)]
    return {section: [_plain(panel) for panel in panels] for section, panels in found.items()}


def comparison_charts(tallies: Mapping[str, Tally]) -> dict[str, list[Panel]]:
    """Pictures with a line a study by section: means (over modalities), auroc (a modality each).

    Args:
        tallies: Study -> its history, in the order of their colours.
    """
    looks = study_looks(tallies)
    aurocs = {name: _auroc(tally) for name, tally in tallies.items()}
    means: dict[str, dict[str, Points]] = {
        "kNN AUROC": {name: _mean(series) for name, series in aurocs.items()},
        "Loss as a share of the collapse line": {n: _share(t) for n, t in tallies.items()},
        "RankMe": {n: _mean(t.by_metric("rankme")) for n, t in tallies.items()},
        "Mean cosine": {n: _mean(t.by_metric("mean_cosine")) for n, t in tallies.items()},
    }
    with DRAWING:
        found = {
            "means": [
                curves.curve_panel(title, _drawn(looks, by_study), breaks=False)
                for title, by_study in means.items()
                if any(by_study.values())
            ],
            "auroc": [
                curves.curve_panel(
                    title,
                    _drawn(looks, {n: series.get(modality, []) for n, series in aurocs.items()}),
                    reference=0.5, breaks=False,
                )
                for modality, title in TITLES.items()
                if any(modality in series for series in aurocs.values())
            ],
        }  # fmt: skip
    return {section: [_plain(panel) for panel in panels] for section, panels in found.items()}


def study_looks(names: Mapping[str, object]) -> dict[str, Look]:
    """Study -> how it is drawn, the same in every picture."""
    return {name: look(index) for index, name in enumerate(names)}


def _drawn(looks: Mapping[str, Look], by_study: Mapping[str, Points]) -> curves.Drawn:
    return [(name, looks[name], points) for name, points in by_study.items() if points]


def _by_modality(tally: Tally, metric: str) -> Series:
    found = tally.by_metric(metric)
    return {modality: found[modality] for modality in TITLES if modality in found}


def _auroc(tally: Tally) -> Series:
    """A site measures the model that it receives: the one after the round before."""
    return {m: [(r - 1, v) for r, v in p] for m, p in _by_modality(tally, "knn_auroc").items()}


def _share(tally: Tally) -> Points:
    ceilings = {m: dict(points) for m, points in tally.by_metric("loss_ceiling").items()}
    return _mean({
        modality: [(r, v / c) for r, v in points if (c := ceilings.get(modality, {}).get(r))]
        for modality, points in tally.by_metric("loss").items()
    })  # fmt: skip


def _mean(series: Mapping[str, Points]) -> Points:
    """The mean over modalities, round by round."""
    at: dict[int, list[float]] = {}
    for points in series.values():
        for number, value in points:
            at.setdefault(number, []).append(value)
    return [(number, fmean(at[number])) for number in sorted(at)]


def _plain(panel: Panel) -> Panel:
    """Styles as attributes: the page's policy forbids styles but for its own sheet."""
    text = re.sub(r"<style.*?</style>", "", str(panel.picture), flags=re.DOTALL)
    return replace(panel, picture=Markup(re.sub(r' style="([^"]*)"', _attributes, text)))


def _attributes(found: re.Match[str]) -> str:
    pairs = [part.partition(":") for part in found[1].split(";")]
    return "".join(f' {n.strip()}="{v.strip()}"' for n, _, v in pairs if n.strip() in STYLES)
