"""Does the conclusion survive other reasonable choices? After the PCS principles.

Predictability, computability, stability (Yu and Kumbier, PNAS 117:3920, 2020): a finding counts if
it holds under perturbations of data and method that nobody would object to. Here, for the finding
"the model is above the baselines": perturbed test images, other label subsets, other draws of
patients, other sites, other ways to aggregate. The vote is fitted once, on clean training images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import functional

from core.backbone import BACKBONE
from core.checkpoint import load_arrays
from core.evaluate import Task
from core.evaluation.intervals import Resampled, mean_over_modalities
from core.evaluation.metrics import metrics
from core.evaluation.models import LoadedModel
from core.evaluation.protocol import FeatureSource, TaskData, checked_features, score
from core.evaluation.types import Prediction
from core.export import load_model
from core.randomness import numpy_generator, torch_generator
from core.wire import GlobalState

MEAN: Final = "mean"
CLEAN: Final = "clean"
ABOVE: Final = "share of draws above "
"""Begins the metric of bootstrap rows that compare a model with another."""
SURE: Final = 0.975
"""Share of draws above from which the ranking counts as surviving: a 95 % interval, both sides."""

_Key = tuple[str, str, str, str]
"""Factor, level, model, metric."""


@dataclass(frozen=True)
class Row:
    """AUROC of a model under one condition, and what the condition changed."""

    factor: str
    level: str
    model: str
    method: str
    metric: str
    value: float
    change: float
    task: str


def _noise(x: Tensor, draws: torch.Generator, *, sd: float) -> Tensor:
    return x + sd * torch.randn(x.shape, generator=draws)


def _blur(x: Tensor, _: torch.Generator, *, share: float) -> Tensor:
    sigma = share * x.shape[-1]
    blurred: Tensor = functional.gaussian_blur(x, [2 * int(3 * sigma) + 1] * 2, [sigma] * 2)
    return blurred


def _gamma(x: Tensor, _: torch.Generator, *, gamma: float) -> Tensor:
    return x**gamma


def _resolution(x: Tensor, _: torch.Generator, *, divisor: int) -> Tensor:
    small = interpolate(x, scale_factor=1 / divisor, mode="area")
    return interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)


def _rotation(x: Tensor, _: torch.Generator, *, degrees: float) -> Tensor:
    turned: Tensor = functional.rotate(x, degrees, functional.InterpolationMode.BILINEAR)
    return turned


PERTURBATIONS: Final[dict[tuple[str, str], Callable[[Tensor, torch.Generator], Tensor]]] = {
    ("noise", "sd .05"): partial(_noise, sd=0.05),
    ("noise", "sd .10"): partial(_noise, sd=0.10),
    ("blur", "sigma 1.5 % of the width"): partial(_blur, share=0.015),
    ("blur", "sigma 3 % of the width"): partial(_blur, share=0.03),
    ("intensity", "gamma 0.7"): partial(_gamma, gamma=0.7),
    ("intensity", "gamma 1.5"): partial(_gamma, gamma=1.5),
    ("resolution", "half"): partial(_resolution, divisor=2),
    ("resolution", "a quarter"): partial(_resolution, divisor=4),
    ("rotation", "10 degrees"): partial(_rotation, degrees=10),
    ("rotation", "30 degrees"): partial(_rotation, degrees=30),
}
"""(factor, level) -> what it does to pixels [n, C, H, W] in [0, 1]; rotation blackens corners."""


def perturb(images: NDArray[np.uint8], factor: str, level: str, *, seed: int) -> NDArray[np.uint8]:
    """Images [n, H, W, C] under one of PERTURBATIONS; the same seed gives the same noise."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    draws = torch_generator("perturb", factor, seed)
    changed = PERTURBATIONS[factor, level](pixels, draws).clamp(0, 1)
    return (changed * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def perturbation_rows(
    source: FeatureSource, task: Task, data: TaskData, *, method: str = "knn20",
    max_images: int = 400, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """AUROC on clean and on perturbed test images, after fitting once on all clean training images.

    Args:
        source: makes features of the perturbed images.
        task: whose test images.
        data: its features by this source.
        method: see `core.evaluation.protocol.predict_from`.
        max_images: test images used; more than that are drawn at random.
        seed: of the draw and of the noise; the same for all sources, so they see the same images.

    Returns:
        A row for the clean images and one for each perturbation.
    """
    positions = np.arange(len(task.test))
    if len(positions) > max_images:
        draws = numpy_generator("test images", data.task, seed)
        positions = np.sort(draws.choice(len(positions), max_images, replace=False))
    images = task.shard.images[task.test[positions]]
    features = [data.features["test"][positions]]
    for factor, level in PERTURBATIONS:
        shard = dataclasses.replace(task.shard, images=perturb(images, factor, level, seed=seed))
        changed = dataclasses.replace(task, shard=shard)
        features.append(checked_features(source, changed, np.arange(len(positions))))
    everything = np.arange(len(data.labels["train"]))
    scores = score(data, method, everything, np.concatenate(features))
    labels = data.labels["test"][positions]
    aurocs = [metrics(part, labels)["auroc"] for part in np.split(scores, len(features))]
    return [
        Row(*key, source.name, method, "auroc", value, value - aurocs[0], data.task)
        for key, value in zip([(CLEAN, ""), *PERTURBATIONS], aurocs, strict=True)
    ]


def seed_rows(predictions: Sequence[Prediction]) -> list[Row]:
    """AUROC with each subset of the labels; the change is from the mean over subsets."""
    values: dict[tuple[str, str, str, float], dict[int, float]] = {}
    for p in predictions:
        if p.fraction < 100:
            key = (p.model, p.task, p.method, p.fraction)
            values.setdefault(key, {})[p.seed] = metrics(p.scores, p.labels)["auroc"]
    rows = []
    for (model, task, method, percent), seeds in values.items():
        centre = float(np.mean(list(seeds.values())))
        rows += [
            Row("labels", f"{percent:g} %, subset {n}", model, method, "auroc", v, v - centre, task)
            for n, v in seeds.items()
        ]
    return rows


def bootstrap_rows(
    measured: Mapping[str, Mapping[str, Resampled]], model: str, method: str
) -> list[Row]:
    """Mean AUROC over modalities when patients are drawn anew, and how often `model` is above.

    Args:
        measured: model -> task -> AUROC; a task's models are measured on the same draws.
        model: which model is compared with the others.
        method: how all were measured.

    Returns:
        For each model a row whose change is the deviation over draws; for `model` and each other
        one a row whose value is the share of draws in which `model` is above.
    """
    means = {name: mean_over_modalities(tasks) for name, tasks in measured.items()}
    level = f"{len(means[model].draws):,} draws"
    rows = [
        Row("patients", level, name, method, "auroc", m.value, float(np.nanstd(m.draws)), MEAN)
        for name, m in means.items()
    ]
    for name, mean in means.items():
        if name != model:
            difference = means[model].draws - mean.draws
            above = float((difference[np.isfinite(difference)] > 0).mean())
            rows.append(Row("patients", level, model, method, ABOVE + name, above, 0.0, MEAN))
    return rows


def left_out_rows(clean: Mapping[str, Mapping[str, float]], method: str) -> list[Row]:
    """Mean over the other modalities when one site's shard is left out: model -> task -> AUROC."""
    rows = []
    for model, tasks in clean.items():
        for left in tasks if len(tasks) > 1 else ():
            value = mean_of_tasks({task: auroc for task, auroc in tasks.items() if task != left})
            change = value - mean_of_tasks(tasks)
            rows.append(
                Row("sites", f"without {left}", model, method, "auroc", value, change, MEAN)
            )
    return rows


def variant_rows(
    factor: str, model: str, method: str, reference: Mapping[str, float],
    variants: Mapping[str, Mapping[str, float]],
) -> list[Row]:  # fmt: skip
    """Rows of models that could stand for one: of `run_variants`, or trained without a site.

    Args:
        factor: what differs, such as "aggregation" or "training sites".
        model: the name of the model they stand for.
        method: how all were measured.
        reference: task -> AUROC of the model itself.
        variants: level -> task -> AUROC.
    """
    return [
        Row(factor, level, model, method, "auroc", value, value - reference[task], task)
        for level, tasks in variants.items()
        for task, value in tasks.items()
    ]


def run_variants(run: Path, loaded: LoadedModel) -> dict[str, LoadedModel]:
    """What else a run directory could have released: the last student, the teacher halfway.

    Args:
        run: a run directory; a variant is missing where its round's file is.
        loaded: the model released from it: the teacher of the last round.
    """
    device = str(next(loaded.model.backbone.parameters()).device)
    rounds = sorted(run.glob("round-*.safetensors"))
    arrays, _ = load_arrays(rounds[-1])
    student = load_model(rounds[-1], device)
    student.backbone.load_state_dict(
        {
            name.removeprefix(BACKBONE): torch.from_numpy(array)
            for name, array in GlobalState.from_arrays(arrays).student.items()
            if name.startswith(BACKBONE)
        }
    )
    models = {"student of the last round": student}
    if len(rounds) > 1:
        halfway = rounds[(len(rounds) - 1) // 2]
        models[f"teacher of {halfway.stem}"] = load_model(halfway, device)
    return {level: dataclasses.replace(loaded, model=model) for level, model in models.items()}


def with_means(rows: Sequence[Row]) -> list[Row]:
    """The rows, and for each condition of a model the mean of its tasks, each modality once."""
    conditions: dict[Row, dict[str, Row]] = {}
    for row in rows:
        if row.task != MEAN:
            condition = dataclasses.replace(row, value=0.0, change=0.0, task=MEAN)
            conditions.setdefault(condition, {})[row.task] = row
    means = [
        dataclasses.replace(
            condition,
            value=mean_of_tasks({task: row.value for task, row in tasks.items()}),
            change=mean_of_tasks({task: row.change for task, row in tasks.items()}),
        )
        for condition, tasks in conditions.items()
    ]
    return [*rows, *means]


def conclusion(rows: Sequence[Row], model: str, baselines: Sequence[str], method: str) -> str:
    """Sentences: above which baselines the model is on clean images, and what that survives.

    A factor is survived when the model's mean AUROC is above the baseline's at each of its levels
    (else the level where it is furthest behind is named); the draws of patients, when it is above
    in 97.5 % of them.

    Args:
        rows: of `with_means`, with clean rows of all models.
        model: which model.
        baselines: with which models it is compared.
        method: whose rows are judged.
    """
    means: dict[_Key, Row] = {
        (r.factor, r.level, r.model, r.metric): r
        for r in rows
        if r.task == MEAN and r.method == method
    }
    clean = {name: means[CLEAN, "", name, "auroc"].value for name in (model, *baselines)}
    above = [name for name in baselines if clean[model] > clean[name]]
    others = [name for name in baselines if name not in above]
    sentences = [f"On clean test images {model} has a mean AUROC of {clean[model]:.3f} ({method})"]
    for word, names in (("above", above), ("not above", others)):
        if names:
            listed = ", ".join(f"{name} ({clean[name]:.3f})" for name in names)
            sentences[0] += f", {word} {listed}"
    for name in above:
        lost = _lost(means, model, name)
        kept = ", ".join(factor for factor, reason in lost.items() if not reason)
        gone = ", ".join(f"{factor} ({reason})" for factor, reason in lost.items() if reason)
        parts = [f"survives {kept}"] * bool(kept) + [f"does not survive {gone}"] * bool(gone)
        if parts:
            sentences.append(f"The lead over {name} {' and '.join(parts)}")
    return ". ".join(sentences) + "."


def _lost(means: Mapping[_Key, Row], model: str, name: str) -> dict[str, str]:
    """Factor -> where the model is furthest behind, in words; "" where it is always above."""
    lost: dict[str, tuple[float, str]] = {}
    clean, rival_clean = (means[CLEAN, "", owner, "auroc"].value for owner in (model, name))
    for (factor, level, owner, metric), row in means.items():
        if owner != model or factor == CLEAN or metric not in ("auroc", ABOVE + name):
            continue
        if metric != "auroc":
            behind = np.inf if row.value < SURE else -np.inf
            text = f"above in {row.value:.1%} of {level}"
        else:
            # Without a row of its own the rival stands as it is on clean images.
            rival = means.get((factor, level, name, "auroc"))
            own = row.value if rival else clean + row.change
            against = rival.value if rival else rival_clean
            behind, text = against - own, f"{level}: {own:.3f} against {against:.3f}"
        lost[factor] = max(lost.get(factor, (-np.inf, "")), (behind, text))
    return {factor: text if behind >= 0 else "" for factor, (behind, text) in lost.items()}


def mean_of_tasks(tasks: Mapping[str, float]) -> float:
    """Mean of the tasks ("modality/shard") of each modality, then over modalities."""
    modalities: dict[str, list[float]] = {}
    for task, value in tasks.items():
        modalities.setdefault(task.split("/")[0], []).append(value)
    return float(np.mean([np.mean(values) for values in modalities.values()]))
