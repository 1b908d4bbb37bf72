import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from core.backbone import create_backbone
from core.config import ModelConfig
from core.errors import UserError
from core.evaluate import Task, auroc, labelled_tasks
from core.evaluation.baselines import PIXELS
from core.evaluation.finetune import FineTuning, finetune
from core.evaluation.models import LoadedModel
from core.evaluation.protocol import MultiLabel, draw_labels, predict
from core.export import Model
from core.phantoms import make_phantoms

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = FineTuning(epochs=3, batch_size=32, learning_rate=3e-3)


def make_task(patients: int = 28) -> Task:
    """Grey noise; class 1 is redder, and class 0 is bluer."""
    shard = make_phantoms("dermatology", patients=patients, images_per_patient=2, px=16, seed=0)
    noise = np.random.default_rng(0).normal(100, 20, shard.images.shape)
    noise[shard.label == 1, ..., 0] += 60
    noise[shard.label == 0, ..., 2] += 60
    (task,) = labelled_tasks([dataclasses.replace(shard, images=noise.clip(0, 255).astype("u1"))])
    return task


def make_model(**changes: object) -> LoadedModel:
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig(options=TINY), 16).eval()
    return LoadedModel("tiny", "export", Model(backbone, 16), Path("tiny"), "", 0, **changes)


def test_it_learns_and_leaves_the_model_as_it_was() -> None:
    model, task = make_model(), make_task()
    before = {name: p.clone() for name, p in model.model.backbone.state_dict().items()}
    epochs: list[tuple[int, int]] = []
    found = finetune(
        model, task, settings=dataclasses.replace(QUICK, epochs=8),
        on_epoch=lambda done, asked, _: epochs.append((done, asked)),
    )  # fmt: skip
    assert auroc(found.scores, found.labels) > 0.9
    assert found.scores.sum(1) == pytest.approx(1)
    assert (found.method, found.fraction, found.n_train) == ("finetune", 100, len(task.train))
    assert epochs[0] == (1, 8)
    assert not model.model.backbone.training
    for name, value in model.model.backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_same_seed_gives_the_same_bits_and_another_other_ones() -> None:
    model, task = make_model(), make_task()
    torch.manual_seed(1)  # the global stream plays no part
    first, again, other = (finetune(model, task, settings=QUICK, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, other.scores)


def test_it_learns_from_the_same_subset_as_the_other_methods() -> None:
    model, task = make_model(), make_task()
    quick = dataclasses.replace(QUICK, epochs=1)
    found = finetune(model, task, percent=30, seed=2, settings=quick)
    (probe,) = predict(PIXELS, task, ("probe",), (30,), (2,))
    assert found.n_train == probe.n_train < len(task.train)
    chosen = draw_labels(
        found.task, task.labels(task.train), task.shard.patient[task.train], 30, 2
    )  # fmt: skip
    images = task.shard.images.copy()
    others = np.setdiff1d(task.train, task.train[chosen])
    images[others] = 0  # what was not drawn cannot matter
    changed = dataclasses.replace(task, shard=dataclasses.replace(task.shard, images=images))
    same = finetune(model, changed, percent=30, seed=2, settings=quick)
    assert np.array_equal(found.scores, same.scores)


def test_it_stops_when_val_no_longer_rises() -> None:
    task, done = make_task(), []
    still = FineTuning(epochs=9, patience=2, learning_rate=0.0)
    finetune(make_model(), task, settings=still, on_epoch=lambda epoch, *_: done.append(epoch))
    assert done == [1, 2, 3]


def test_several_labels_get_a_score_each() -> None:
    task = make_task(patients=42)
    red = task.shard.label
    bright = np.random.default_rng(0).integers(2, size=len(red))
    images = (task.shard.images * (0.3 + 0.7 * bright[:, None, None, None])).astype(np.uint8)
    task = dataclasses.replace(task, shard=dataclasses.replace(task.shard, images=images))
    labels = MultiLabel(("red", "bright"), np.stack([red, bright], 1))
    settings = dataclasses.replace(QUICK, epochs=10)
    found = finetune(make_model(), task, settings=settings, multi_label=labels)
    assert found.multi_label
    assert found.classes == ("red", "bright")
    for column in (0, 1):
        scores = np.stack([1 - found.scores[:, column], found.scores[:, column]], 1)
        assert auroc(scores, found.labels[:, column]) > 0.85
    held = found.labels.sum(1)
    means = [found.scores[held == count].sum(1).mean() for count in (0, 1, 2)]
    assert means == sorted(means)  # not shares of one
    assert means[2] > means[0] + 0.1


def test_a_model_with_statistics_of_its_own_sees_its_own_pixels() -> None:
    task = make_task()
    own = ((0.6614, 0.5189, 0.4715), (0.2396, 0.2199, 0.2286))  # dermatology's, given explicitly
    quick = dataclasses.replace(QUICK, epochs=1)
    plain, given, other = (
        finetune(make_model(mean_std=statistics), task, settings=quick).scores
        for statistics in (None, own, ((0.5,) * 3, (0.25,) * 3))
    )
    assert np.array_equal(plain, given)
    assert not np.allclose(plain, other, atol=1e-4)


def test_broken_weights_and_unusable_labels_are_refused() -> None:
    model, task = make_model(), make_task()
    with torch.no_grad():
        model.model.backbone.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"fine-tuning 'tiny' on .*: the loss is nan in epoch 1"):
        finetune(model, task, settings=QUICK)
    label = np.where(task.shard.split == "val", 0, task.shard.label)
    one = dataclasses.replace(task, shard=dataclasses.replace(task.shard, label=label))
    with pytest.raises(UserError, match="split 'val' holds 1 labelled class"):
        finetune(make_model(), one, settings=QUICK)
