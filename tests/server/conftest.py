"""A study's run directory without its training: lines as the strategy writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import Recipe
from core.wire import GlobalState, Prototypes
from server.history import Checkpoint, open_run

Line = dict[str, Any]
MakeStudy = Callable[..., Path]


def admitted(number: int, index: int, modalities: Sequence[str], *, evaluated: bool) -> Line:
    """An outcome of a healthy site."""
    metrics: dict[str, float] = {"seconds_train": 2.0, "seconds_evaluate": 0.5}
    for modality in modalities:
        metrics |= {
            f"loss/{modality}": 4.0 - 0.01 * number,
            f"loss_ceiling/{modality}": 4.159,
            f"teacher_entropy/{modality}": 3.0 - 0.01 * number,
            f"mean_cosine/{modality}": 0.5,
            f"rankme/{modality}": 9.0,
        }
        if evaluated:
            metrics[f"knn_auroc/{modality}"] = 0.7
    return {
        "outcome": "admitted",
        "num_examples": dict.fromkeys(modalities, 100 + index),
        "metrics": metrics,
        "digest": f"{number:032d}{index:032d}",
        "update_norm": 1.0 + 0.1 * index,
        "norm_ratio": 1.0,
        "cosine": 0.25,
        "seconds": 40.0,
        "weight": 0.5,
    }


def mean(outcomes: Sequence[Line]) -> dict[str, float]:
    """Plain means of the sites' metrics by modality."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, value in outcome.get("metrics", {}).items():
            if "/" in name:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


@pytest.fixture
def make_study(tmp_path: Path, make_recipe: Callable[..., Any]) -> MakeStudy:
    """Write a run directory: sites name -> modalities, `rounds` done of `planned`.

    `change(number, sites, line)` may change a round's outcomes and line before it is committed;
    what it puts into line["metrics"] stays beside the means.
    """

    def make(
        sites: dict[str, Sequence[str]],
        rounds: int = 2,
        planned: int | None = None,
        change: Callable[[int, Line, Line], None] = lambda number, sites, line: None,
        recipe: Recipe | None = None,
    ) -> Path:
        recipe = recipe or make_recipe(rounds=planned or rounds, min_sites=1)
        run = open_run(tmp_path / "run", recipe)
        arrays = {"w": np.ones(3, np.float32)}
        centroids, counts = np.eye(16, dtype=np.float32)[:2], np.float32([12, 30])
        for number in range(1, rounds + 1):
            outcomes = {
                name: admitted(number, index, modalities, evaluated=number % 2 == 1)
                for index, (name, modalities) in enumerate(sites.items())
            }
            line: Line = {
                "round": number, "first_step": 0, "sites": outcomes, "refused_nodes": [],
                "alarms": [], "outliers": [], "bytes_down": 2000, "bytes_up": 1000,
                "seconds": {"wait_for_sites": 1.0, "exchange": 45.0, "admit": 0.5, "screen": 0.25,
                            "aggregate": 0.25},
            }  # fmt: skip
            change(number, outcomes, line)
            line["metrics"] = {**mean(list(outcomes.values())), **line.get("metrics", {})}
            contributions = {
                name: Prototypes(dict.fromkeys(held, centroids), dict.fromkeys(held, counts))
                for name, held in sites.items()
            }
            held = {m for modalities in sites.values() for m in modalities}
            merged = Prototypes(dict.fromkeys(held, centroids), dict.fromkeys(held, counts))
            state = GlobalState(student=arrays, teacher=arrays, prototypes=merged)
            run.commit(Checkpoint(number, state, contributions), line)
        return run.path

    return make
