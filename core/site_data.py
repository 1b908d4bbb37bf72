"""The training images of a site, drawn batch by batch as a function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.batch import Batch
from core.config import Recipe
from core.modalities import MODALITIES
from core.sampling import batch_share, draw
from core.shards import Shard


class SiteData:
    """The training images of a site, by modality."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        offsets = np.cumsum([0, *(len(shard.images) for shard in shards)])
        self.first = offsets[:-1]
        patients = np.cumsum([0, *(int(shard.patient.max()) + 1 for shard in shards)])
        self.patient = np.concatenate(
            [s.patient + p for s, p in zip(shards, patients, strict=False)]
        )
        modality = np.concatenate([shard.modality for shard in shards])
        training = np.concatenate([shard.split for shard in shards]) == "train"
        self.pools: dict[int, NDArray[np.int64]] = {
            int(m): np.flatnonzero(training & (modality == m))
            for m in np.unique(modality[training])
        }

    def batches(self, recipe: Recipe, site: str, step: int) -> list[Batch]:
        """One batch a modality for a global step, together `batch_size` images."""
        result = []
        for index, (modality, pool) in enumerate(self.pools.items()):
            start, count = batch_share(len(self.pools), index, recipe.optim.batch_size, step)
            if count:
                key = (recipe.seed, site, "images", MODALITIES[modality])
                result.append(self.batch(modality, draw(pool, start, count, *key)))
        return result

    def batch(self, modality: int, indices: NDArray[np.int64]) -> Batch:
        """Images by their number over all shards, not read yet."""
        return Batch(modality, _Read(self, indices), torch.from_numpy(self.patient[indices]))

    def read(self, index: int) -> NDArray[np.uint8]:
        """An image [H, W, C] by its number over all shards."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return np.asarray(self.shards[shard].images[index - self.first[shard]])


@dataclass(frozen=True)
class _Read:
    """A batch's images, read from the shards when sliced."""

    data: SiteData
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Tensor:
        """uint8 [B, C, H, W], grey ones beside colour with three channels."""
        images = [self.data.read(int(index)) for index in self.indices[rows]]
        channels = max(image.shape[2] for image in images)
        stacked = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
