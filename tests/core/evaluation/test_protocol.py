import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from core.errors import UserError
from core.evaluate import Features, Task, auroc, knn_scores, probe_scores
from core.evaluation.protocol import (
    FeatureSource,
    MultiLabel,
    draw_subset,
    embed_task,
    predict,
    predict_from,
    scarce_classes,
)
from core.evaluation.types import Prediction
from core.modalities import MODALITIES
from core.shards import Shard

SIZES = {"train": 200, "val": 60, "test": 80}
COUNT = sum(SIZES.values())


def make_task(classes: int = 3, patients: int = COUNT) -> Task:
    draws = np.random.default_rng(0)
    split = np.repeat(list(SIZES), list(SIZES.values()))
    shard = Shard(
        name="drawn",
        images=np.zeros((COUNT, 8, 8, 1), np.uint8),
        modality=np.full(COUNT, MODALITIES.index("us"), np.int16),
        patient=np.arange(COUNT) % patients,
        label=np.append(np.arange(classes), draws.integers(classes, size=COUNT - classes)),
        split=split,
        classes={"us": tuple("abcdef"[:classes])},
    )
    return Task(shard, 2, *(np.flatnonzero(split == name) for name in SIZES))


def table_source(table: Features, name: str = "table", blocks: int = 1) -> FeatureSource:
    return FeatureSource(name, lambda _, indices: table[indices], blocks)


def signal(task: Task, strength: float = 2.0, width: int = 6) -> Features:
    """Features that a line can tell apart a little."""
    noise = np.random.default_rng(1).normal(size=(COUNT, width))
    noise[np.arange(COUNT), task.shard.label] += strength
    return noise.astype(np.float32)


def test_at_all_labels_the_probe_and_the_vote_are_those_of_the_evaluator() -> None:
    task = make_task()
    table = signal(task)
    vote, probe = predict(table_source(table), task, ("knn11", "probe"), (100,), (0, 1))
    train, val, test = (table[i] for i in (task.train, task.val, task.test))
    labels, val_labels = task.labels(task.train), task.labels(task.val)
    assert vote.scores == pytest.approx(knn_scores(train, labels, test, neighbours=11))
    assert probe.scores == pytest.approx(probe_scores(train, labels, val, val_labels, test))
    assert (vote.model, vote.task, vote.method) == ("table", "us/drawn", "knn11")
    assert (probe.fraction, probe.seed, probe.n_train) == (100, 0, 200)
    assert np.array_equal(probe.labels, task.labels(task.test))


def test_the_vote_sees_the_last_block_and_the_probe_all() -> None:
    task = make_task()
    noise, table = signal(task, 0.0), signal(task)
    for columns, vote_is_right, probe_is_right in (((noise, table), 1, 1), ((table, noise), 0, 1)):
        source = table_source(np.concatenate(columns, axis=1), blocks=2)
        vote, probe = predict(source, task, ("knn20", "probe"), (100,))
        assert (auroc(vote.scores, vote.labels) > 0.8) == vote_is_right
        assert (auroc(probe.scores, probe.labels) > 0.8) == probe_is_right


def test_features_are_computed_once_for_all_methods_fractions_and_seeds() -> None:
    task, asked = make_task(), []

    def extract(_: Task, indices: np.ndarray) -> Features:
        asked.extend(indices.tolist())
        return signal(task)[indices]

    found = predict(FeatureSource("once", extract), task, percents=(10, 100), seeds=(0, 1))
    assert len(found) == 3 * 2 + 3 * 1  # all labels are one subset, whatever the seed
    assert sorted(asked) == list(range(COUNT))


def test_two_sources_learn_from_the_same_subset_and_another_seed_from_another() -> None:
    task = make_task()
    table = signal(task)

    def scores(name: str, seed: int) -> Prediction:
        return predict(table_source(table, name), task, ("knn11",), (10,), (seed,))[0]

    assert np.array_equal(scores("a", 3).scores, scores("b", 3).scores)
    assert not np.array_equal(scores("a", 3).scores, scores("a", 4).scores)


@pytest.mark.parametrize("percent", [1, 10, 30, 50, 100])
def test_a_subset_holds_the_share_of_every_class_and_at_least_one_image(percent: float) -> None:
    labels = np.repeat([0, 1, 2], [400, 90, 10])
    drawn = draw_subset(labels, np.arange(500), percent, np.random.default_rng(0))
    expected = {  # shares of 400, 90 and 10 images, rounded
        1: [4, 1, 1], 10: [40, 9, 1], 30: [120, 27, 3], 50: [200, 45, 5], 100: [400, 90, 10],
    }[percent]  # fmt: skip
    assert np.bincount(labels[drawn]).tolist() == expected
    assert len(np.unique(drawn)) == len(drawn)


def test_a_larger_share_holds_the_smaller_one() -> None:
    labels = np.random.default_rng(0).integers(3, size=300)
    shares = [
        set(draw_subset(labels, np.arange(300), percent, np.random.default_rng(5)).tolist())
        for percent in (1, 10, 30, 100)
    ]
    assert shares[0] < shares[1] < shares[2] < shares[3]


def test_a_subset_holds_whole_patients_and_still_about_the_share() -> None:
    draws = np.random.default_rng(0)
    groups = np.sort(draws.integers(60, size=600))  # about ten images a patient
    labels = (groups % 3 + (draws.random(600) < 0.2)) % 3  # a patient's images differ in class
    drawn = draw_subset(labels, groups, 20, np.random.default_rng(1))
    taken = np.isin(groups, groups[drawn])
    assert np.array_equal(np.flatnonzero(taken), drawn)
    assert np.bincount(labels[drawn]) == pytest.approx(np.bincount(labels) * 0.2, abs=8)


def test_one_percent_of_a_small_class_is_announced() -> None:
    task = make_task()
    data = embed_task(table_source(signal(task)), task)
    sentences = scarce_classes(data, (1, 10, 100))
    assert len(sentences) == 3
    assert sentences[0].startswith("us/drawn: 1 % of the ")
    assert "'a' are less than one" in sentences[0]
    assert scarce_classes(data, (30, 50)) == []


def test_a_class_without_training_images_gets_a_score_of_zero() -> None:
    task = make_task()
    label = task.shard.label.copy()
    label[task.train[label[task.train] == 2]] = 1
    task = dataclasses.replace(task, shard=dataclasses.replace(task.shard, label=label))
    for found in predict(table_source(signal(task)), task, percents=(100,)):
        assert found.scores.shape == (80, 3)
        assert not found.scores[:, 2].any()


def test_black_images_get_finite_votes() -> None:
    task = make_task()
    table = np.abs(signal(task))
    table[[0, 5, 260, 261]] = 0
    (found,) = predict(table_source(table), task, ("knn11",), (100,))
    assert np.isfinite(found.scores).all()


def multi_label(task: Task) -> tuple[MultiLabel, Features]:
    draws = np.random.default_rng(2)
    values = (draws.random((COUNT, 3)) < (0.5, 0.2, 0.05)).astype(np.int64)
    values[:2], values[200:202], values[260:262] = ([[0] * 3, [1] * 3],) * 3  # both in each split
    features = draws.normal(size=(COUNT, 5))
    features[:, :3] += 2 * values
    return MultiLabel(("x", "y", "z"), values), features.astype(np.float32)


def test_a_multi_label_probe_is_one_logistic_regression_a_label() -> None:
    task = make_task()
    labels, table = multi_label(task)
    (found,) = predict(table_source(table), task, ("probe",), (100,), multi_label=labels)
    assert found.multi_label
    assert found.classes == ("x", "y", "z")
    scale = StandardScaler().fit(table[task.train])
    train, test = scale.transform(table[task.train]), scale.transform(table[task.test])
    for column in range(3):
        candidates = [
            LogisticRegression(C=c).fit(train, labels.values[task.train, column])
            for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        ]
        errors = [
            np.abs(m.predict_proba(test)[:, 1] - found.scores[:, column]).max() for m in candidates
        ]
        assert min(errors) < 1e-3


def test_a_multi_label_vote_is_the_weighted_share_of_neighbours_with_the_label() -> None:
    task = make_task()
    labels, table = multi_label(task)
    (found,) = predict(table_source(table), task, ("knn5",), (100,), multi_label=labels)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosine = unit[task.test[7]] @ unit[task.train].T
    nearest = np.argsort(-cosine)[:5]
    weight = np.exp(cosine[nearest] / 0.07)
    expected = weight @ labels.values[task.train[nearest]] / weight.sum()
    assert found.scores[7] == pytest.approx(expected, abs=1e-4)


def test_a_multi_label_subset_holds_presence_and_absence_of_every_label() -> None:
    labels, _ = multi_label(make_task())
    values = labels.values[:200]
    for seed in range(20):
        drawn = values[draw_subset(values, np.arange(200), 1, np.random.default_rng(seed))]
        assert (drawn.any(0) & ~drawn.all(0)).all()
        assert len(drawn) <= 8


def with_labels(task: Task, indices: np.ndarray, label: int) -> Task:
    labels = task.shard.label.copy()
    labels[indices] = label
    return dataclasses.replace(task, shard=dataclasses.replace(task.shard, label=labels))


def test_what_cannot_be_measured_is_refused() -> None:
    task = make_task()
    table = signal(task)
    broken = table.copy()
    broken[:3, 1] = np.nan
    labels, _ = multi_label(task)
    constant = MultiLabel(labels.classes, labels.values * (1, 1, 0))
    wrong = MultiLabel(labels.classes, labels.values * 2)
    cases = [
        (task, broken, None, "features of 3 of 200 images are NaN or infinite"),
        (with_labels(task, task.test, 0), table, None, "split 'test' holds 1 labelled class"),
        (with_labels(task, task.val[:1], 3), table, None, "expected labels 0 to 2, found 0 to 3"),
        (with_labels(task, task.val[:1], -1), table, None, "expected labels 0 to 2, found -1 to 2"),
        (task, table, constant, "label 'z' has the same value in every image"),
        (task, table, wrong, "expected labels of 0 and 1"),
        (task, table[:, 0], None, "expected a row of features for each of 200 images"),
    ]
    for chosen, rows, given, message in cases:
        with pytest.raises(UserError, match=message):
            embed_task(table_source(rows), chosen, multi_label=given)


def test_an_unknown_method_or_share_is_refused() -> None:
    task = make_task()
    data = embed_task(table_source(signal(task)), task)
    with pytest.raises(UserError, match="expected a method 'probe' or 'knn<K>'"):
        predict_from(data, ("svm",), (100,), (0,))
    with pytest.raises(UserError, match="found 0"):
        predict_from(data, ("probe",), (0,), (0,))
