"""What a step compares the student's embeddings of one batch with, and the losses that gives.

The student's views meet each other only through the teacher's targets, which need no gradient, and
KoLeo, which sees the global ones. So the loss is a sum over views: a step may go backward through
one resolution before it goes forward through the next, and holds the activations of one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.losses import centre, consistency_loss, koleo_loss, own_pairs

Losses = tuple[Tensor, dict[str, Tensor]]
"""A loss and, without gradient, `loss`, `koleo` and `teacher_entropy`."""


@dataclass(frozen=True)
class Among:
    """A batch of which some images alone are at hand: KoLeo compares them with all of it."""

    embeddings: Tensor
    """The student's of those of the views that are global, unit [V', B, D], no gradient."""
    rows: slice
    """Which of the batch's images are at hand, from a first to before a last."""


@dataclass(frozen=True)
class Objective:
    """The losses of the views of one batch, or of some of its images.

    Or of batches of M modalities, of the same places in each: then with a first axis M.
    """

    teacher: Tensor
    """Unit embeddings of the global views [U, b, D], no gradient."""
    memory: Tensor
    """Unit entries of the batch's modality [K, D]."""
    mean: Tensor | None
    """Mean [D] from which embeddings and entries are taken, or none."""
    blocks: Sequence[Tensor]
    """Index vectors that cut the memory."""
    num_views: int
    """Of the student."""
    student_temperature: float
    teacher_temperature: float
    koleo_weight: float

    def of_views(self, student: Tensor, first_view: int, among: Among | None = None) -> Losses:
        """The part of the step's loss that some views of the objective's images have.

        Args:
            student: their unit embeddings [V', b, D].
            first_view: place of the first of them among all views, the global ones leading.
            among: the batch, where the images are some of it; none: they are the batch.

        Returns:
            Loss and figures, scalars (or [M]). Each, and the gradient with respect to `student`,
            adds up over parts that hold every view of every image once to that of the batch.
        """
        teacher, memory = self.teacher, self.memory
        if self.mean is not None:
            shared = self.mean[..., None, :]
            memory = centre(memory, shared)
            student, teacher = (centre(e, shared[..., None, :]) for e in (student, teacher))
        consistency, entropy = consistency_loss(
            student, teacher, memory, self.blocks,
            self.student_temperature, self.teacher_temperature, first_view=first_view,
        )  # fmt: skip
        targets, (views, images) = teacher.shape[-3], student.shape[-3:-1]
        of_batch = images / (images if among is None else among.embeddings.shape[-2])
        pairs = views * targets - own_pairs(first_view, views, targets)
        consistency = of_batch * pairs / (targets * (self.num_views - 1)) * consistency
        figures = {"loss": consistency.detach()}
        if first_view >= targets:
            return consistency, figures
        batch = student[..., : targets - first_view, :, :]
        of_views = batch.shape[-3] / targets
        if among is not None:
            others = among.embeddings
            if self.mean is not None:
                others = centre(others, self.mean[..., None, None, :])
            before, after = others[..., : among.rows.start, :], others[..., among.rows.stop :, :]
            batch = torch.cat([before, batch, after], dim=-2)  # [V', B, D]
        koleo = torch.zeros_like(consistency)
        if batch.shape[-2] > 1:
            koleo = of_views * koleo_loss(batch).mean(-1)
        figures["koleo"] = of_batch * koleo.detach()
        figures["teacher_entropy"] = of_batch * of_views * entropy  # told by each of them alike
        # The value is the images' share; the gradient, theirs alone already, is that of the whole.
        return consistency + self.koleo_weight * (
            koleo - koleo.detach() + figures["koleo"]
        ), figures


def losses_of(
    objectives: Sequence[Objective],
    students: Sequence[Tensor],
    first_view: int,
    among: Sequence[Among | None],
) -> list[Losses]:
    """What `of_views` gives each modality's images; those of one shape are computed together."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, (objective, student) in enumerate(zip(objectives, students, strict=True)):
        shape = (student.shape, objective.memory.shape, _place_in(among[place]))
        alike.setdefault(shape, []).append(place)
    losses: dict[int, Losses] = {}
    for places in alike.values():
        joined = _join([objectives[place] for place in places])
        batches = [batch for place in places if (batch := among[place]) is not None]
        loss, figures = joined.of_views(
            torch.stack([students[place] for place in places]),
            first_view,
            Among(torch.stack([b.embeddings for b in batches]), batches[0].rows)
            if batches
            else None,
        )
        for row, place in enumerate(places):
            losses[place] = loss[row], {name: value[row] for name, value in figures.items()}
    return [losses[place] for place in range(len(objectives))]


def _place_in(among: Among | None) -> tuple[int, ...]:
    return () if among is None else (among.embeddings.shape[1], among.rows.start, among.rows.stop)


def _join(objectives: Sequence[Objective]) -> Objective:
    """One objective for modalities whose batches and memories have one shape."""
    means = [o.mean for o in objectives if o.mean is not None]
    return replace(
        objectives[0],
        teacher=torch.stack([o.teacher for o in objectives]),
        memory=torch.stack([o.memory for o in objectives]),
        mean=torch.stack(means) if means else None,
        blocks=[torch.stack(parts) for parts in zip(*(o.blocks for o in objectives), strict=True)],
    )
