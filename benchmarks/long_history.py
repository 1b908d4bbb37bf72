"""Run directories as long studies leave them, without their training."""

import json
import math
import random
from pathlib import Path
from typing import Any

from core.config import Recipe
from core.modalities import MODALITIES
from server.history import open_run


def write_study(run: Path, recipe: Recipe, *, sites: int, rounds: int, seed: int = 0) -> Path:
    """A run directory with the history of a long study."""
    generator = random.Random(seed)
    open_run(run, recipe)
    names = [f"hospital-{index:02d}" for index in range(sites)]
    with open(run / "history.jsonl", "w") as file:
        for number in range(1, rounds + 1):
            outcomes = {
                name: _outcome(generator, number / rounds, MODALITIES[index % len(MODALITIES)])
                for index, name in enumerate(names)
            }
            values: dict[str, list[float]] = {}
            for outcome in outcomes.values():
                for name, value in outcome["metrics"].items():
                    values.setdefault(name, []).append(value)
            line = {
                "round": number, "first_step": 20 * number, "sites": outcomes, "refused_nodes": [],
                "alarms": [], "outliers": [], "bytes_down": 10**9, "bytes_up": 10**9,
                "metrics": {n: sum(v) / len(v) for n, v in values.items() if "/" in n},
                "seconds": {"wait_for_sites": 1.0, "exchange": 300 + 20 * generator.random(),
                            "admit": 2.0, "screen": 1.0, "aggregate": 5.0},
                "sha256": "0" * 64,
            }  # fmt: skip
            file.write(json.dumps(line, sort_keys=True) + "\n")
    return run


def _outcome(generator: random.Random, share: float, modality: str) -> dict[str, Any]:
    learnt = 1 - math.exp(-3 * share) + 0.05 * generator.random()
    metrics = {
        f"loss/{modality}": 4.2 - learnt, f"loss_ceiling/{modality}": 4.159,
        f"teacher_entropy/{modality}": 3.6 - learnt, f"rankme/{modality}": 5 + 8 * learnt,
        f"mean_cosine/{modality}": 0.7 - 0.4 * learnt, f"knn_auroc/{modality}": 0.6 + 0.3 * learnt,
        f"koleo/{modality}": -1.5, "seconds_train": 280.0, "seconds_evaluate": 10.0,
    }  # fmt: skip
    return {
        "outcome": "admitted", "reason": "", "num_examples": {modality: 12_345},
        "metrics": metrics, "digest": "0" * 64, "update_norm": 1 + generator.random(),
        "norm_ratio": 1.0, "cosine": 0.3, "seconds": 290 + 20 * generator.random(),
        "bytes": 20_000_000, "weight": 0.02, "asked": 1,
    }  # fmt: skip
