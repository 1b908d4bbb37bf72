"""The model card of a released model, in Markdown with the front matter that Hugging Face reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoint import write_atomically
from core.evaluation import tables
from core.evaluation.tables import Results
from core.evaluation.words import METHODS
from core.modalities import MODALITIES, TITLES

CARD = """\
---
# license: to be chosen by the coordinator before release
library_name: timm
pipeline_tag: image-feature-extraction
tags: [medical-imaging, vision-transformer, self-supervised, federated-learning]
{index}---

# {name}

A vision transformer for medical images, pretrained without labels. Its features are meant for
training and comparing small models on top of it.

## Intended use

- Research: features for linear probes, nearest-neighbour search, or as a start for fine-tuning.
- Input: images of the modalities below, normalised with the mean and deviation of the modality.

## Not for clinical use

This is not a medical device. It must not be used to diagnose, to treat, to triage or to decide
anything about a patient.

## Training data

{training}

## Evaluation

{evaluation}

## Limits

{limits}

## Privacy

{privacy}
"""


def write_card(
    results: Results, out: Path, *, training: Mapping[str, int] | None = None,
    privacy: str | None = None,
) -> None:  # fmt: skip
    """Write `model_card` to a file."""
    write_atomically(out, model_card(results, training=training, privacy=privacy).encode())


def model_card(
    results: Results,
    *,
    name: str = "FedMerMED model",
    training: Mapping[str, int] | None = None,
    privacy: str | None = None,
) -> str:
    """The card of the first model in the results.

    Args:
        results: the contents of results.json, or {} for a model that was not evaluated.
        name: of such a model.
        training: modality -> images it was trained on, if known.
        privacy: the guarantee that the study gives, in words; None says that there is none.
    """
    names = tables.model_names(results)
    return CARD.format(
        name=_plain(names[0] if names else name),
        index=_index(results, names[0]) if names else "",
        training=_training(training),
        evaluation=_evaluation(results),
        limits=_limits(results),
        privacy=_plain(privacy) if privacy else (
            "None. No differential privacy is claimed for this model: what it remembers of single "
            "training images has not been bounded."
        ),
    )  # fmt: skip


def _training(training: Mapping[str, int] | None) -> str:
    if not training:
        return "Not stated."
    known = [modality for modality in MODALITIES if modality in training]
    rows = [f"| {TITLES[modality]} | {training[modality]:,} |" for modality in known]
    total = f"| all | {sum(training[modality] for modality in known):,} |"
    return "\n".join(["| modality | images |", "|---|---:|", *rows, total])


def _evaluation(results: Results) -> str:
    ways = tables.methods(results)
    if not ways:
        return "Not evaluated."
    parts = [_plain(tables.headline(results))] if tables.headline(results) else []
    for way in ways:
        columns, rows = tables.auroc_table(results, way)
        lines = [
            f"{METHODS.get(way, way).capitalize()}, AUROC with 95 % interval, test split:",
            "",
            "| task | " + " | ".join(_plain(name) for name in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for row in rows:
            cells = [f"{c.value} ({c.range})" if c.range else c.value for c in row.cells]
            lines.append(f"| {_plain(row.title)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _limits(results: Results) -> str:
    lines = [
        "Measured on the data sets above alone; other hospitals, scanners and populations may "
        "give other figures.",
        "Features may carry what the training images carry besides the disease: site, scanner, "
        "burned-in marks, sex, age.",
    ]
    lines += [_plain(line) for line in results.get("warnings") or ()]
    for leak in results.get("leakage") or ():
        splits = " and ".join(leak["splits"])
        lines.append(
            f"Leakage in {_plain(leak['shard'])}: {_plain(leak['kind'])} ({leak['count']}) in "
            f"{_plain(splits)}; its figures are too good."
        )
    if conclusion := results.get("stability_conclusion"):
        lines.append(f"Stability: {_plain(conclusion)}")
    return "\n".join(f"- {line}" for line in lines)


def _index(results: Results, model: str) -> str:
    """Hugging Face's model-index: JSON is YAML, and quotes whatever a name may hold."""
    entries: list[dict[str, Any]] = []
    for task in results.get("tasks", ()):
        metrics = [
            {
                "type": "roc_auc",
                "name": f"AUROC, {METHODS.get(way, way)}",
                "value": round(found.value, 4),
            }
            for way in tables.methods(results)
            if (found := tables.metric(results, model, task["task"], way))
        ]
        if metrics:
            title = tables.task_title(results, task["task"])
            entries.append(
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": title, "type": task["shard"]},
                    "metrics": metrics,
                }
            )
    if not entries:
        return ""
    return "model-index: " + json.dumps([{"name": model, "results": entries}]) + "\n"


def _plain(text: str) -> str:
    """Text on one line that Markdown and HTML take as it stands."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
