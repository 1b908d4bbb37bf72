"""What training_step.py compares: recipes, data, our step and the published one, on one footing."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from published_step import MaskedRing, PublishedStep, pil_views
from real_images import PLAIN_VIT, RECIPE
from torch import Tensor

from core.augment import make_views
from core.backbone import Network
from core.batch import Batch
from core.config import Recipe, load_recipe
from core.initial import initial_state
from core.losses import random_blocks
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.randomness import torch_generator
from core.site_data import SiteData
from core.sites import open_sites
from core.step import TrainState
from core.train import load_network, new_state, train
from core.wire import GlobalState

SITE, CPU = "benchmark", torch.device("cpu")
Batches = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True)
class Case:
    """One comparison: `entries` is the whole memory, over all modalities."""

    title: str
    modalities: tuple[str, ...]
    batch: int
    entries: int
    blocks: int


CASES = {
    "pooled": Case("seven modalities, the recipe's memory", MODALITIES, 56, 1_792, 1),
    "published": Case("seven modalities, 131,072 entries", MODALITIES, 56, 131_040, 8),
    "hospital": Case("one hospital of the recipe (CT)", ("ct",), 8, 256, 1),
}
"""131,040 is the largest number below 131,072 that seven rings share."""


def recipe_of(case: Case, **optim: object) -> Recipe:
    """configs/seven_sites.toml with the case's batch and memory, from random weights.

    Without convolutions and description, which the published method does not have.
    """
    recipe = load_recipe(RECIPE)
    memory = {"entries_per_modality": case.entries // len(case.modalities), "blocks": case.blocks}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=PLAIN_VIT),
            "loss": recipe.loss.model_copy(update={"description_weight": 0.0}),
            "optim": recipe.optim.model_copy(update={"batch_size": case.batch, **optim}),
            "memory": recipe.memory.model_copy(update=memory),
        }
    )


def site_data(case: Case, data: Path) -> SiteData:
    """The training images of the case's modalities as one site."""
    sites = open_sites(data)
    missing = sorted(set(case.modalities) - set(sites))
    if missing:
        raise SystemExit(f"{data}: no files of {', '.join(missing)}; their names begin with it")
    return SiteData([shard for name in case.modalities for shard in sites[name]])


def our_state(recipe: Recipe, weights: GlobalState) -> TrainState:
    """A site that received the weights."""
    state = new_state(recipe, CPU, SITE)
    load_network(state.student, weights.student)
    load_network(state.teacher, weights.teacher)
    return state


def published_state(recipe: Recipe, weights: GlobalState, ring: MaskedRing) -> PublishedStep:
    """The same networks for the published step."""
    student = Network(recipe.model, recipe.views.global_px)
    teacher = Network(recipe.model, recipe.views.global_px).requires_grad_(False)
    load_network(student, weights.student)
    load_network(teacher, weights.teacher)
    return PublishedStep(student, teacher, ring, recipe)


def ring_of(bank: MemoryBank, modalities: Sequence[int], share: int) -> MaskedRing:
    """The bank as one ring into which each step writes `share` images a modality, in order."""
    dim = bank.embeddings.shape[2]
    turns = bank.embeddings[list(modalities)].view(len(modalities), -1, share, dim)  # [M, T, s, D]
    labels = torch.tensor(modalities).repeat_interleave(share).repeat(turns.shape[1])
    return MaskedRing(turns.transpose(0, 1).reshape(-1, dim).clone(), labels)


def ring_blocks(own: Sequence[Sequence[Tensor]], share: int) -> list[Tensor]:
    """Blocks of that ring: block n holds what block n of every modality's own ring holds."""
    count = len(own)
    return [
        torch.cat([
            slots // share * count * share + place * share + slots % share
            for place, slots in enumerate(parts)
        ])
        for parts in zip(*own, strict=True)
    ]  # fmt: skip


def loss_curves(recipe: Recipe, batches: Batches, steps: int) -> tuple[list[float], list[float]]:
    """Losses of our steps and of the published ones, fed the same views, in fp32.

    Without KoLeo and centring, which the published method does not have.
    """
    recipe = recipe.model_copy(
        update={
            "loss": recipe.loss.model_copy(update={"koleo_weight": 0.0}),
            "memory": recipe.memory.model_copy(update={"centred": False}),
            "optim": recipe.optim.model_copy(update={"precision": "fp32"}),
        }
    )
    weights = initial_state(recipe)
    state = our_state(recipe, weights)
    modalities = [batch.modality for batch in batches(0)]
    share = len(batches(0)[0].images)
    published = published_state(recipe, weights, ring_of(state.bank, modalities, share))
    ours: list[float] = []
    train(
        state, batches, recipe, steps, site=SITE, on_step=lambda done, of, loss: ours.append(loss)
    )
    theirs = []
    for step in range(steps):
        columns, labels, own = [], [], []
        for batch in batches(step):
            name = MODALITIES[batch.modality]
            draws = torch_generator(recipe.seed, SITE, "step", step, name)  # as core.step draws
            views = make_views(batch.images[:], name, recipe.views, draws)
            columns.append([*views.global_VBCHW, *views.local_VBCHW])
            labels += [batch.modality] * len(batch.images)
            memory = recipe.memory
            own.append(random_blocks(memory.entries_per_modality, memory.blocks, draws))
        stacked = [torch.cat(view) for view in zip(*columns, strict=True)]
        theirs.append(published(stacked, torch.tensor(labels), ring_blocks(own, share)))
    return ours, theirs


class Step:
    """One of the two steps with the case's data, ready to be called again and again."""

    def __init__(self, arm: str, case: Case, data: SiteData) -> None:
        self.recipe = recipe_of(case)
        weights = initial_state(self.recipe)
        self.state = our_state(self.recipe, weights)
        self.arm, self.data, self.done = arm, data, 0
        if arm == "published":
            share = case.batch // len(case.modalities)
            ring = ring_of(self.state.bank, list(data.pools), share)
            self.published = published_state(self.recipe, weights, ring)

    def batches(self, step: int) -> list[Batch]:
        """The site's images of a step."""
        return self.data.batches(self.recipe, SITE, step)

    def files(self) -> list[tuple[int, list[bytes]]]:
        """The next step's images as the published code meets them, PNG files; not timed."""
        result = []
        for batch in self.batches(self.done):
            rows = []
            for image in batch.images[:].permute(0, 2, 3, 1).numpy():
                file = io.BytesIO()
                Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
                rows.append(file.getvalue())
            result.append((batch.modality, rows))
        return result

    def __call__(self, files: Sequence[tuple[int, Sequence[bytes]]] = ()) -> None:
        """One step, from images to updated weights; the published one takes `files`."""
        if self.arm == "published":
            self.published(*pil_views(files, self.recipe.views))
        else:
            train(self.state, self.batches, self.recipe, 1, site=SITE)
        self.done += 1
