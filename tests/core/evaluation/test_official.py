import dataclasses

import numpy as np
import pytest

from core.evaluate import Task
from core.evaluation.official import OFFICIAL, PLUS_COLUMNS, V2_COLUMNS, official_figures
from core.medmnist import SETS, SIZES
from core.modalities import MODALITIES
from core.shards import Shard


def task_of(name: str, shard_name: str, counts: tuple[int, int, int], px: int = 28) -> Task:
    facts = SETS[name]
    count = sum(counts)
    split = np.repeat(["train", "val", "test"], counts)
    shard = Shard(
        name=shard_name,
        images=np.broadcast_to(np.zeros(1, np.uint8), (count, px, px, 1)),
        modality=np.full(count, MODALITIES.index(facts.modality), np.int16),
        patient=np.arange(count),
        label=np.zeros(count, np.int64),
        split=split,
        classes={facts.modality: facts.classes},
    )
    parts = [np.flatnonzero(split == part) for part in ("train", "val", "test")]
    return Task(shard, MODALITIES.index(facts.modality), *parts)


def test_the_official_set_is_known_by_name_and_split_sizes() -> None:
    found = official_figures(task_of("pneumoniamnist", "pneumoniamnist", (4708, 524, 624)))
    assert found is not None
    assert (found["dataset"], found["size"]) == ("pneumoniamnist", 28)
    rows = {row["method"]: (row["auc"], row["acc"]) for row in found["rows"]}
    assert rows["ResNet-18 (28)"] == (0.944, 0.854)  # Yang et al. 2023, table 3
    assert rows["Google AutoML Vision (28)"] == (0.991, 0.946)
    assert rows["DINO ViT-B/16, linear probe (28)"] == (0.9729, 0.8659)
    assert rows["DINO ViT-B/16, kNN (11) (28)"] == (None, 0.8574)


def test_figures_of_the_same_size_are_shown() -> None:
    found = official_figures(task_of("dermamnist", "dermamnist_64", (7007, 1003, 2005), 64))
    assert found is not None
    rows = {row["method"]: (row["auc"], row["acc"]) for row in found["rows"]}
    assert rows["ResNet-18, all weights trained (64)"] == (0.917, 0.7636)
    assert rows["ResNet-18 (224)"] == (0.92, 0.754)
    assert "both train and test" in found["warning"]


@pytest.mark.parametrize(
    ("shard_name", "counts", "px"),
    [
        ("pneumoniamnist", (4708, 524, 623), 28),  # a part
        ("cxr_pneumonia", (4708, 524, 624), 28),  # another name
        ("pneumoniamnist", (4708, 524, 624), 32),  # a size that nobody published
    ],
)
def test_another_set_gets_no_official_figures(
    shard_name: str, counts: tuple[int, int, int], px: int
) -> None:
    assert official_figures(task_of("pneumoniamnist", shard_name, counts, px)) is None


def test_a_set_with_merged_classes_gets_no_official_figures() -> None:
    task = task_of("retinamnist", "retinamnist", (1080, 120, 400))
    assert official_figures(task) is not None
    shard = dataclasses.replace(task.shard, classes={"cfp": ("healthy", "ill")})
    assert official_figures(dataclasses.replace(task, shard=shard)) is None


def test_every_set_has_all_figures_in_range_and_one_line_of_warning() -> None:
    assert list(OFFICIAL) == list(SETS)
    for name, official in OFFICIAL.items():
        assert tuple(official.plus) == SIZES
        for counts in official.splits:
            for px in SIZES:
                found = official_figures(task_of(name, name, counts, px))
                assert found is not None
                assert len(found["rows"]) == len(V2_COLUMNS) + len(PLUS_COLUMNS)
                for row in found["rows"]:
                    assert 0.4 < row["acc"] < 1
                    assert row["auc"] is None or 0.6 < row["auc"] < 1
                assert "\n" not in found["warning"]
