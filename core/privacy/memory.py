"""What stands in for the memory bank, made of what is public or was released."""

from collections.abc import Mapping

import torch
from torch import Tensor

from core.batch import Batch
from core.config import Recipe
from core.losses import centre, random_blocks
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.privacy.unit import Comparison, PublicMemory
from core.randomness import torch_generator
from core.schedules import teacher_temperature
from core.step import TrainState
from core.train import embed_global
from core.wire import Prototypes


def public_embeddings(recipe: Recipe, state: TrainState, modality: int) -> Tensor:
    """Unit vectors [K, D] that hold nothing of a patient.

    Drawn at random, or phantoms as the teacher of `state` embeds them.
    """
    name, entries = MODALITIES[modality], recipe.memory.entries_per_modality
    if recipe.privacy.memory == "random":
        return state.bank.embeddings[modality]
    drawn = make_phantoms(
        name, patients=entries, images_per_patient=1, px=recipe.images.px, seed=recipe.seed
    )
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2)
    parts = [
        Batch(modality, part, torch.arange(len(part)))
        for part in torch.split(images, recipe.optim.batch_size)
    ]
    return torch.cat([
        embed_global(state, part, recipe, "anchors", number) for number, part in enumerate(parts)
    ])  # fmt: skip


def public_memory(
    recipe: Recipe, state: TrainState, modality: int, received: Prototypes
) -> PublicMemory:
    """What stands in for the memory bank: a function of the recipe and the received state alone.

    The public embeddings, and the prototypes that were received.
    """
    rows = public_embeddings(recipe, state, modality)
    mean = rows.mean(0) if recipe.memory.centred else None
    if (released := received.centroids.get(MODALITIES[modality])) is not None:
        rows = torch.cat([rows, torch.from_numpy(released).to(rows.device)])
    return PublicMemory(rows if mean is None else centre(rows, mean), mean)


def comparisons(
    recipe: Recipe, memories: Mapping[int, PublicMemory], site: str, step: int
) -> dict[int, Comparison]:
    """Cut each modality's memory into the blocks of a step."""
    cut = {
        modality: random_blocks(
            len(memory.entries),
            recipe.memory.blocks,
            torch_generator(recipe.seed, site, "blocks", step, MODALITIES[modality]),
        )
        for modality, memory in memories.items()
    }
    own, teachers = recipe.loss.student_temperature, teacher_temperature(recipe, step)
    return {m: Comparison(memory, cut[m], own, teachers) for m, memory in memories.items()}
