"""The published form of the step, one masked ring and a loop over pairs, against ours."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from core.batch import Batch
from core.config import Recipe

TINY = {
    "model": {
        "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "head_hidden": 32,
        "embedding_dim": 16,
    },
    "views": {"global_px": 16, "local_px": 8, "local_views": 2},
    "memory": {"entries_per_modality": 32},
    "optim": {"batch_size": 12, "learning_rate": 0.03},
    "federation": {"rounds": 5, "local_steps": 4},
}


@pytest.fixture(scope="module")
def cases(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    load_benchmark("published_step")
    return load_benchmark("step_cases")


def batches(step: int) -> list[Batch]:
    """Four images of each of three modalities, two of them grey."""
    draws = torch.Generator().manual_seed(step)
    return [
        Batch(
            modality,
            torch.randint(0, 256, (4, channels, 16, 16), generator=draws, dtype=torch.uint8),
            torch.arange(4),
        )
        for modality, channels in ((0, 1), (2, 1), (6, 3))
    ]


@pytest.mark.parametrize("blocks", [1, 4])
def test_losses_of_the_masked_ring_are_ours_step_for_step(cases: ModuleType, blocks: int) -> None:
    torch.set_num_threads(1)
    table = {**TINY, "memory": {"entries_per_modality": 32, "blocks": blocks}}
    ours, theirs = cases.loss_curves(Recipe.model_validate(table, strict=False), batches, 12)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert max(ours) - min(ours) > 0.02  # or agreement would say nothing


def test_blocks_of_the_one_ring_hold_the_entries_of_the_own_rings(cases: ModuleType) -> None:
    rings = torch.arange(2 * 6 * 1, dtype=torch.float32).view(2, 6, 1)  # [M, K, D]: 0..5, 6..11

    class Bank:
        embeddings = rings

    ring = cases.ring_of(Bank, [0, 1], 2)
    assert ring.embeddings[:, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert ring.labels.tolist() == [0, 0, 1, 1] * 3
    own = [[torch.tensor([5, 0, 2])], [torch.tensor([1, 4, 3])]]
    (block,) = cases.ring_blocks(own, 2)
    assert ring.embeddings[block, 0].tolist() == [5, 0, 2, 7, 10, 9]
