"""Measuring a received backbone on a site's own labelled images; features and labels stay.

For each labelled modality the site extracts features, fits a linear probe and lets neighbours vote
as `core.evaluate` does, on its own train and val images, and reports what they are worth on its own
test images, with the numbers of images.

If the evaluator sent a probe of its own, the site scores the test images with it too, and may send
how many positives and negatives fall into bins of the score: only such scores, of one classifier,
can be pooled over sites (core.evaluation.pooled).

What is not protected: figures are exact, and an evaluator who asks many times with models that
differ little can learn about single images from the differences. Every question is a line in the
audit file.
"""

import logging

import numpy as np
import torch

from client.policy import PolicyRefusal, Refusal
from client.site import SiteConfig
from core.backbone import create_backbone, use_plain_attention
from core.checkpoint import Arrays
from core.device import resolve_device
from core.errors import UserError
from core.evaluate import Features, knn_scores, measures, probe_scores
from core.evaluation.pooled import safe_histogram
from core.evaluation.shared_probe import SharedProbe, SiteTask, read_probes, site_tasks
from core.export import Model
from core.sites import open_site
from core.wire import (
    BACKBONE,
    HISTOGRAM,
    PROBE_BIAS,
    PROBE_WEIGHT,
    SIDES,
    EvaluationReply,
    EvaluationRequest,
    take,
)

LOG = logging.getLogger("fedmermed.site")


def measure(site: SiteConfig, request: EvaluationRequest, arrays: Arrays) -> EvaluationReply:
    """Answer an evaluation.

    Args:
        site: The site's file.
        request: What to measure.
        arrays: The backbone and the evaluator's probes under their wire names.

    Returns:
        Figures and counts, histograms, and why a modality or a histogram is not among them.

    Raises:
        Refusal: the site will not do it; the text may be sent to the evaluator.
        UserError: the site cannot do it; the text may hold paths and stays here.

    **Guarantees**, for every request:
        - Nothing leaves if the policy sends no metrics.
        - Figures of a modality leave only if the policy allows the modality, and with no fewer
          training images, training patients and test images than it asks for.
        - Histograms leave only if the policy sends them, only of the evaluator's probe, and of a
          modality only if each class that the site's test images hold, and all that are not of it,
          are of enough patients: a class left out could be counted from the others.
        - A histogram has no count of fewer patients than the policy asks for, but 0.
    """
    if not site.policy.send_metrics:
        raise PolicyRefusal("this site's policy sends no metrics")
    model, probes = _receive(site, request, arrays)
    reply = EvaluationReply({}, {}, {})
    for task in site_tasks([s for path in site.shard_paths for s in open_site(path)]):
        if reason := _not_allowed(site, task) or task.problem():
            reply.notes[f"skipped/{task.name}"] = reason
            continue
        LOG.info("site %s: measuring on %s", site.name, task.name)
        _measure_task(site, request, model, probes.get(task.name), task, reply)
    if not reply.metrics:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(reply.notes.items()))
        raise Refusal(f"this site has nothing that it can measure and send ({reasons or 'labels'})")
    return reply


def _receive(
    site: SiteConfig, request: EvaluationRequest, arrays: Arrays
) -> tuple[Model, dict[str, SharedProbe]]:
    """Build the backbone and the probes; refuse what does not fit or is not finite."""
    for name, array in arrays.items():
        if not name.startswith((BACKBONE, PROBE_WEIGHT, PROBE_BIAS)):
            raise Refusal("the message holds an array that is not on the list of what is sent down")
        if not np.isfinite(array).all():
            raise Refusal(f"array '{name}' is not finite")
    if site.threads:
        torch.set_num_threads(site.threads)
    device = resolve_device(site.device)
    try:
        backbone = create_backbone(request.model, request.px)
        weights = take(arrays, BACKBONE)
        backbone.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
        probes = read_probes(arrays, request.probe_classes)
    except (UserError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise Refusal(f"the model that was sent cannot be built: {detail}") from None
    if device == "cpu":
        use_plain_attention(backbone)
    return Model(backbone.to(device).eval(), request.px), probes


def _not_allowed(site: SiteConfig, task: SiteTask) -> str | None:
    policy = site.policy
    if task.name not in policy.allowed_modalities:
        return "this site's policy does not allow it"
    if len(task.labels("train")) < policy.min_images:
        return f"fewer than the {policy.min_images} training images that the policy asks for"
    if len(set(task.patients("train").tolist())) < policy.min_patients:
        return f"fewer than the {policy.min_patients} training patients that the policy asks for"
    if len(task.labels("test")) < policy.min_test_images:
        return f"fewer than the {policy.min_test_images} test images that the policy asks for"
    return None


def _measure_task(
    site: SiteConfig,
    request: EvaluationRequest,
    model: Model,
    probe: SharedProbe | None,
    task: SiteTask,
    reply: EvaluationReply,
) -> None:
    """Add one modality's figures, histograms and notes to the reply."""
    blocks = min(request.last_blocks, len(model.backbone.blocks))  # type: ignore[arg-type]
    features = {s: task.features(model, s, last_blocks=blocks) for s in ("train", "val", "test")}
    if not all(np.isfinite(rows).all() for rows in features.values()):
        raise Refusal(f"the model's features of this site's images of '{task.name}' are not finite")
    train, val, labels = (task.labels(split) for split in ("train", "val", "test"))
    last = features["test"].shape[1] // blocks  # neighbours see the last block only
    known, asked = features["train"][:, -last:], features["test"][:, -last:]
    scores = {
        "probe": probe_scores(features["train"], train, features["val"], val, features["test"]),
        "knn": knn_scores(known, train, asked, neighbours=request.neighbours),
    }
    reply.metrics[f"num_train/{task.name}"] = len(train)
    reply.metrics[f"num_test/{task.name}"] = len(labels)
    for method, rows in scores.items():
        _add(reply, method, task.name, measures(rows, labels))
    if probe is not None and (reason := _share(site, probe, task, features["test"], reply)):
        reply.notes[f"pooling/{task.name}"] = reason


def _share(
    site: SiteConfig,
    probe: SharedProbe,
    task: SiteTask,
    features: Features,
    reply: EvaluationReply,
) -> str | None:
    """Add what the evaluator's probe is worth, and its histograms; returns why they are missing."""
    if probe.weight.shape[0] != features.shape[1]:
        raise Refusal(
            f"the evaluator's probe of '{task.name}' takes {probe.weight.shape[0]} features, the "
            f"model gives {features.shape[1]}"
        )
    labels = probe.numbers(task.labels("test"), task.classes)
    if labels is None:
        return "this site has a class that the evaluator's probe lacks"
    scores = probe.scores(features)
    _add(reply, "shared_probe", task.name, measures(scores, labels))
    if not site.policy.send_score_histograms:
        return "this site's policy sends no score histograms"
    held = np.unique(labels)
    # Scores of two classes mirror one another; their two histograms, compared, would split cells.
    columns = [1] if len(probe.classes) == 2 else [int(c) for c in held]
    minimum = site.policy.min_patients_per_cell
    patients = task.patients("test")
    found = {
        c: safe_histogram(scores[:, c], labels == c, patients, minimum=minimum) for c in columns
    }
    if not all(found.values()):
        return f"a class is of fewer test patients than the {minimum} that the policy asks for"
    reply.histograms.update({
        f"{HISTOGRAM}{task.name}/{c}/{side}": getattr(histogram, side).to_array()
        for c, histogram in found.items()
        for side in SIDES
    })  # fmt: skip
    return None


def _add(reply: EvaluationReply, method: str, modality: str, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        reply.metrics[f"{method}_{name}/{modality}"] = value
