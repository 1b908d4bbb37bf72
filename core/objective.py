"""What a step compares the student's embeddings of one batch with, and the losses that gives.

The student's views meet each other only through the teacher's targets, which need no gradient, and
KoLeo, which sees the global ones. So the loss is a sum over views: a step may go backward through
one resolution before it goes forward through the next, and holds the activations of one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from core.losses import centre, consistency_loss, koleo_loss


@dataclass(frozen=True)
class Objective:
    """The losses of the views of one batch."""

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

    def of_views(self, student: Tensor, first_view: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the step's loss that some views have.

        Args:
            student: their unit embeddings [V', B, D]; the global views are asked for together.
            first_view: place of the first of them among all views, the global ones leading.

        Returns:
            A loss and, without gradient, `loss`, `koleo` and `teacher_entropy`: each adds up, over
            parts that hold every view once, to that of all views.
        """
        teacher, memory = self.teacher, self.memory
        if self.mean is not None:
            student, teacher, memory = (centre(e, self.mean) for e in (student, teacher, memory))
        consistency, entropy = consistency_loss(
            student, teacher, memory, self.blocks,
            self.student_temperature, self.teacher_temperature, first_view=first_view,
        )  # fmt: skip
        targets = len(teacher)
        own = max(0, min(targets - first_view, len(student)))  # pairs of a view with itself
        share = (len(student) * targets - own) / (targets * (self.num_views - 1))
        consistency = share * consistency
        figures = {"loss": consistency.detach()}
        if first_view > 0:
            return consistency, figures
        koleo = student.new_zeros(())
        if student.shape[1] > 1:
            koleo = (koleo_loss(student[0]) + koleo_loss(student[1])) / 2
        figures |= {"koleo": koleo.detach(), "teacher_entropy": entropy}
        return consistency + self.koleo_weight * koleo, figures
