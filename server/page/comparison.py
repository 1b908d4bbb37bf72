"""Several studies on one page: a row each, and a line each in every picture."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from core.evaluation.figures import Look as Style
from server.overview import Overview
from server.page import charts
from server.page.view import LOCK, Look, Pictures, StudyView, View, render


@dataclass(frozen=True)
class Row:
    """A study among others.

    Attributes:
        name: As it is called here.
        view: The study.
        style: How it is drawn.
        means: Figure -> its mean over modalities, where there is one: knn_auroc and its change,
            share (loss over collapse line), rankme, mean_cosine.
    """

    name: str
    view: Overview
    style: Style
    means: Mapping[str, float]


class ComparisonView(View):
    """The page of several studies.

    Args:
        studies: Gives those that there are now, name -> page.
    """

    def __init__(self, studies: Callable[[], Mapping[str, StudyView]]) -> None:
        super().__init__()
        self._studies = studies

    def _look(self) -> Look:
        found = {name: view.read() for name, view in self._studies().items()}
        pictures = self._charts(tuple((n, tally.version) for n, (_, tally) in found.items()))
        styles = charts.study_looks(found)
        rows = [Row(n, view, styles[n], _means(view)) for n, (view, _) in found.items()]
        return Look(
            title=f"{len(rows)} studies",
            now=time.time(),
            parts={
                "head": render("heads", rows),
                "alarms": render("alarms_of_all", rows),
                "studies": render("studies", rows),
                "means": render("means", rows, pictures["means"]),
                "auroc": render("auroc", rows, pictures["auroc"]),
            },
        )

    def _draw(self) -> Pictures:
        with LOCK:
            found = {name: view.read()[1] for name, view in self._studies().items()}
            return charts.comparison_charts(found)


def _means(view: Overview) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for modality in view.modalities.values():
        figures = modality.figures
        for name in ("knn_auroc", "rankme", "mean_cosine"):
            if name in figures:
                found.setdefault(name, []).append(figures[name].last)
        if "knn_auroc" in figures and (change := figures["knn_auroc"].change) is not None:
            found.setdefault("change", []).append(change)
        if {"loss", "loss_ceiling"} <= set(figures) and (line := figures["loss_ceiling"].last):
            found.setdefault("share", []).append(figures["loss"].last / line)
    return {name: fmean(values) for name, values in found.items()}
