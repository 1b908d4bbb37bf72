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
class Objective:
    """The losses of the views of one batch, or of batches of M modalities: then a first axis M."""

    teacher: Tensor
    """Unit embeddings of the global views [U, B, D], no gradient."""
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

    def of_views(self, student: Tensor, first_view: int) -> Losses:
        """The part of the step's loss that some views have.

        Args:
            student: their unit embeddings [V', B, D]; the global views are asked for together.
            first_view: place of the first of them among all views, the global ones leading.

        Returns:
            Loss and figures, scalars (or [M]): each adds up, over parts that hold every view once,
            to that of all views.
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
        targets, (views, batch) = teacher.shape[-3], student.shape[-3:-1]
        pairs = views * targets - own_pairs(first_view, views, targets)
        consistency = pairs / (targets * (self.num_views - 1)) * consistency
        figures = {"loss": consistency.detach()}
        if first_view > 0:
            return consistency, figures
        koleo = torch.zeros_like(consistency)
        if batch > 1:
            koleo = koleo_loss(student[..., :2, :, :]).mean(-1)
        figures |= {"koleo": koleo.detach(), "teacher_entropy": entropy}
        return consistency + self.koleo_weight * koleo, figures


def losses_of(
    objectives: Sequence[Objective], students: Sequence[Tensor], first_view: int
) -> list[Losses]:
    """What `of_views` gives each modality's batch; those of one shape are computed together."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for place, (objective, student) in enumerate(zip(objectives, students, strict=True)):
        alike.setdefault((student.shape, objective.memory.shape), []).append(place)
    losses: dict[int, Losses] = {}
    for places in alike.values():
        joined = _join([objectives[place] for place in places])
        loss, figures = joined.of_views(torch.stack([students[p] for p in places]), first_view)
        for row, place in enumerate(places):
            losses[place] = loss[row], {name: value[row] for name, value in figures.items()}
    return [losses[place] for place in range(len(objectives))]


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
