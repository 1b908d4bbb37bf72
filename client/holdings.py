"""What a site has to train on, by modality."""

from collections import Counter
from collections.abc import Sequence

from core.modalities import MODALITIES
from core.shards import Shard


def training_images(shards: Sequence[Shard]) -> dict[str, int]:
    """Modality -> images to train on, as core.site_round counts them."""
    counts: Counter[int] = Counter()
    for shard in shards:
        counts.update(shard.modality[shard.split == "train"].tolist())
    return {MODALITIES[modality]: counts[modality] for modality in sorted(counts)}


def training_patients(shards: Sequence[Shard]) -> dict[str, int]:
    """Modality -> patients of these images; one who is in two shards counts twice."""
    counts: Counter[str] = Counter()
    for shard in shards:
        for modality in training_images([shard]):
            rows = (shard.modality == MODALITIES.index(modality)) & (shard.split == "train")
            counts[modality] += len(set(shard.patient[rows].tolist()))
    return dict(counts)
