"""The gradients of one step: from images, through views, networks and losses, to the parameters.

A step's images may go through the networks in parts: one after another on one device
(`optim.accumulate`), or at once on several (`core.ranks`). Consistency and description are means
over images, so parts add up. KoLeo looks for an image's neighbour among all images of its modality:
each part takes it over all of them with its own embeddings live and the others as constants, and
its gradient is then its own share of the whole. Those embeddings are there beforehand: parts one
after another pass the global views once more, first of all and without gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from core.augment import denormalise, draws_per_image, make_views
from core.backbone import Network
from core.batch import Batch, Part, cut_parts
from core.config import Recipe, ViewsConfig
from core.description import Usual
from core.device import precision, to_device
from core.losses import random_blocks
from core.memory import MemoryBank
from core.modalities import MODALITIES
from core.objective import Among, Objective, losses_of
from core.randomness import derive_seed, torch_generator
from core.ranks import ALONE, Ranks
from core.schedules import teacher_temperature

GLOBAL_VIEWS = 2
VIEW_ALONE_IMAGES = 32
"""With fewer images a global view does not go through alone: small passes use a processor badly."""


@dataclass
class TrainState:
    """Everything that changes while training; `step` counts over the whole study."""

    student: Network
    teacher: Network
    optimizer: torch.optim.AdamW
    bank: MemoryBank
    device: torch.device
    step: int = 0
    usual: dict[int, Usual] = field(default_factory=dict)
    """modality -> what pictures show of it at this site, if the recipe has them described."""


@dataclass(frozen=True)
class StepLosses:
    """What a step gives beside gradients and figures."""

    total: Tensor
    """The loss, a scalar; of all ranks."""
    embeddings: Sequence[Tensor]
    """For each batch the teacher's embeddings of the second global view [B, D]."""


def add_gradients(
    state: TrainState,
    recipe: Recipe,
    current: Sequence[Batch],
    site: str,
    sums: dict[str, Tensor],
    ranks: Ranks = ALONE,
) -> StepLosses:
    """Add the gradient of a step's loss to the student's, in as many parts as asked for.

    Args:
        state: networks and memory; the student's gradients are changed, nothing else.
        recipe: the study.
        current: one batch a modality, the same on every rank.
        site: names the random streams.
        sums: wire name -> scalar, to which the figures of this rank's images are added: over the
            ranks they add up to those of all images.
        ranks: with whom the images are shared; `optim.accumulate` parts go to each.

    **Guarantees**, for every number of ranks and parts that leaves an image to each:
        - The gradient is that of one pass over all images, up to rounding; so are the losses.
        - Every rank ends with the same gradient and the same embeddings.
        - An image has the same views whatever part it is in. Only the paths that `drop_path` drops
          are drawn for each part; they are the same in both passes of a part.
    """
    sizes = [len(batch.images) for batch in current]
    count = sum(sizes)
    parts = cut_parts(sizes, ranks.count * recipe.optim.accumulate)
    own = parts[ranks.rank * recipe.optim.accumulate :][: recipe.optim.accumulate]
    step = _Step(
        state, recipe, current, site, views_together(recipe.views, -(-count // len(parts)))
    )
    known: Tensor | None = None  # [2, count, D], the student's global views of all images
    if len(own) > 1:
        seen = [step.look(part) for part in own]
        known = ranks.gather(torch.cat(seen, dim=1), own[0].first, count)
    total = torch.zeros((), device=state.device)
    figures = ["loss", "koleo", "teacher_entropy"]
    if state.student.description is not None:
        figures.append("description")
    for batch in current:  # on every rank the same names in the same order
        for figure in figures:
            sums.setdefault(f"{figure}/{MODALITIES[batch.modality]}", torch.zeros_like(total))
    teachers = [step.add_part(part, known, ranks, total, sums) for part in own]
    gradients = [p.grad for p in state.student.parameters() if p.grad is not None]
    ranks.add([*gradients, total])
    embeddings = ranks.gather(torch.cat(teachers)[None], own[0].first, count)[0]
    return StepLosses(total, torch.split(embeddings, sizes))


@dataclass(frozen=True)
class _Step:
    """What all parts of a step have in common."""

    state: TrainState
    recipe: Recipe
    current: Sequence[Batch]
    site: str
    together: tuple[int, int]
    """From `views_together`, by the largest part: ranks must gather alike, whatever each has."""

    def look(self, part: Part) -> Tensor:
        """The student's embeddings [2, b, D] of a part's global views; no gradient."""
        views = self.recipe.views.model_copy(update={"local_views": 0})  # the same global ones
        large, _, _ = self._views(part, views)
        self._seed_paths(part)
        with torch.no_grad():
            return _embed(self.state.student, large, self.recipe)

    def add_part(
        self,
        part: Part,
        known: Tensor | None,
        ranks: Ranks,
        total: Tensor,
        sums: dict[str, Tensor],
    ) -> Tensor:
        """Add a part's gradients and, in place, its losses; teacher's embeddings [b, D] of view 2.

        Args:
            part: which images.
            known: from `look`, of all parts; None: this part is all that its rank has.
            ranks: with whom to share the embeddings of the global views then.
            total: the step's loss.
            sums: of the figures, by wire name.
        """
        sizes = [len(batch.images) for batch in self.current]
        large, small, streams = self._views(part, self.recipe.views)
        own = [rows.stop - rows.start for _, rows in part.rows]
        with torch.no_grad():
            targets = _embed(self.state.teacher, large, self.recipe)  # [2, b, D]
        objectives = [
            self._objective(number, teacher, draws)
            for (number, _), teacher, draws in zip(
                part.rows, torch.split(targets, own, dim=1), streams, strict=True
            )
        ]
        self._seed_paths(part)
        everyone = None
        for first_view, pixels in _passes(large, small, self.together):
            embeddings, described = self._pass(part, pixels, describes=first_view < len(large))
            if first_view < len(large):  # they come first
                if known is None:
                    everyone = ranks.gather(embeddings.detach(), part.first, sum(sizes))
                else:
                    everyone = known[first_view : first_view + len(pixels)]
            losses = losses_of(
                objectives,
                torch.split(embeddings, own, dim=1),
                first_view,
                _among(part, torch.split(cast(Tensor, everyone), sizes, dim=1)),
            )
            summed = torch.zeros((), device=self.state.device)
            for place, ((number, rows), (loss, found)) in enumerate(
                zip(part.rows, losses, strict=True)
            ):
                if described:
                    share = (rows.stop - rows.start) / sizes[number] * len(pixels) / len(large)
                    found["description"] = share * described[place]
                    loss = loss + self.recipe.loss.description_weight * found["description"]
                summed = summed + sizes[number] / sum(sizes) * loss
                for key, value in found.items():
                    sums[f"{key}/{MODALITIES[self.current[number].modality]}"] += value.detach()
            torch.autograd.backward(summed)  # frees these views' activations
            total += summed.detach()
        return targets[1]

    def _views(
        self, part: Part, views: ViewsConfig
    ) -> tuple[Tensor, Tensor, list[torch.Generator]]:
        """A part's views [V, b, C, H, W] of both sizes, and the streams of its batches after it.

        All of the recipe's views of the whole batch are drawn for, whatever is made of them here.
        """
        step, seed, drawn = self.state.step, self.recipe.seed, draws_per_image(self.recipe.views)
        made, streams = [], []
        for number, rows in part.rows:
            batch = self.current[number]
            name = MODALITIES[batch.modality]
            stream = torch_generator(seed, self.site, "step", step, name)
            draws = torch.rand(len(batch.images), drawn, generator=stream)[rows]
            images = to_device(batch.images[rows], self.state.device)
            made.append(make_views(images, name, views, draws[:, : draws_per_image(views)]))
            streams.append(stream)
        large = torch.cat([part.global_VBCHW for part in made], dim=1)
        small = torch.cat([part.local_VBCHW for part in made], dim=1)
        return large, small, streams

    def _seed_paths(self, part: Part) -> None:
        """Timm draws which paths to drop from torch's own generator."""
        if self.recipe.model.drop_path:
            place = (part.first,) if part.first else ()
            torch.manual_seed(
                derive_seed(self.recipe.seed, self.site, "paths", self.state.step, *place)
            )

    def _pass(
        self, part: Part, pixels_VBCHW: Tensor, *, describes: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The student's embeddings [V, b, D], and how far off its descriptions of each batch are.

        Global views alone are described, if the recipe has it; else the list is empty.
        """
        student = self.state.student
        describe = student.description
        if describe is None or not describes:
            return _embed(student, pixels_VBCHW, self.recipe), []
        with precision(self.recipe, self.state.device):
            embeddings, tokens = student.with_tokens(pixels_VBCHW.flatten(0, 1))
        tokens = tokens.float().view(*pixels_VBCHW.shape[:2], *tokens.shape[1:])  # [V, b, N, d]
        own, described = [rows.stop - rows.start for _, rows in part.rows], []
        for (number, _), seen, pixels in zip(
            part.rows,
            torch.split(tokens, own, dim=1),
            torch.split(pixels_VBCHW, own, dim=1),
            strict=True,
        ):
            modality = self.current[number].modality
            shown = denormalise(pixels.flatten(0, 1), MODALITIES[modality])
            described.append(describe(seen.flatten(0, 1), shown, self.state.usual[modality]))
        return embeddings.view(*pixels_VBCHW.shape[:2], -1), described

    def _objective(self, number: int, teacher: Tensor, draws: torch.Generator) -> Objective:
        """What the student's views of some images of a batch are compared with."""
        state, recipe, batch = self.state, self.recipe, self.current[number]
        memory = state.bank.embeddings[batch.modality]
        return Objective(
            teacher,
            memory,
            state.bank.mean(batch.modality) if recipe.memory.centred else None,
            random_blocks(len(memory), recipe.memory.blocks, draws),
            len(teacher) + recipe.views.local_views,
            recipe.loss.student_temperature,
            teacher_temperature(recipe, state.step),
            recipe.loss.koleo_weight,
        )


def views_together(views: ViewsConfig, images: int) -> tuple[int, int]:
    """How many global views of so many images go through the student at once, and how many local.

    Losses add up over views, so a pass may be followed by its backward and forgotten. Of many
    images a global view is a pass of its own, which halves what autograd keeps, and local views go
    in groups of no more pixels.
    """
    if images < VIEW_ALONE_IMAGES:
        return GLOBAL_VIEWS, views.local_views
    return 1, min(views.local_views, max(1, views.global_px**2 // views.local_px**2))


def _passes(
    large: Tensor, small: Tensor, together: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Views [V, b, C, H, W] of a pass, and the place of its first among all, the global leading."""
    for place, pixels, count in zip((0, len(large)), (large, small), together, strict=True):
        for first in range(0, len(pixels), count or 1):
            yield place + first, pixels[first : first + count]


def _among(part: Part, everyone: Sequence[Tensor]) -> list[Among | None]:
    """For each batch of a part, the rest of the batch: embeddings [2, B, D], or none if it's whole.

    Args:
        part: some of the step's images.
        everyone: for each batch of the step the student's embeddings of the global views.
    """
    return [
        None if rows == slice(0, everyone[number].shape[1]) else Among(everyone[number], rows)
        for number, rows in part.rows
    ]


def _embed(network: Network, pixels_VBCHW: Tensor, recipe: Recipe) -> Tensor:
    """Embeddings [V, B, D] in one pass: small passes use a processor badly."""
    with precision(recipe, pixels_VBCHW.device):
        embeddings: Tensor = network(pixels_VBCHW.flatten(0, 1))
    return embeddings.view(*pixels_VBCHW.shape[:2], -1)
