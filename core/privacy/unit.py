"""What one patient adds to a step: the gradient of a loss that sees this patient alone.

The consistency loss of core.losses, with public anchors for the memory bank: a bank of the site's
own embeddings, KoLeo, or a mean over the batch would let one patient change what others add, and
one clip a patient would bound nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from core.losses import centre, consistency_loss

Parameters = dict[str, Tensor]
UnitLoss = Callable[..., Tensor]
"""(parameters, tensors of one patient...) -> a scalar."""
Gradients = tuple[Parameters, Tensor]
"""By name, stacked over patients [n, ...], and the losses [n]."""


@dataclass(frozen=True)
class PublicMemory:
    """What stands in for the memory bank of one modality."""

    entries: Tensor
    """Unit vectors [K, D] of public images, drawn, or released with noise; less `mean`."""
    mean: Tensor | None
    """Taken off the embeddings too [D]; None: nothing is."""


@dataclass(frozen=True)
class Comparison:
    """What the embeddings of one modality are compared with in a step; nothing of it is private."""

    memory: PublicMemory
    blocks: Sequence[Tensor]
    """Index vectors that cut 0..K-1, drawn without a look at data."""
    student_temperature: float
    teacher_temperature: float


def unit_loss(student: nn.Module, comparisons: Sequence[Comparison]) -> UnitLoss:
    """The loss of a patient with len(comparisons) images.

    Args:
        student: maps images [N, 3, H, W] to unit embeddings [N, D].
        comparisons: of the modality of each image.

    Returns:
        A function of the parameters that learn and of the patient's global views [2, m, 3, P, P],
        local views [L, m, 3, p, p] and teacher embeddings [2, m, D], m images each: the mean over
        the images of the consistency loss of all their views.

    **Guarantees**: no argument of the function it returns holds more than one patient.
    """
    assert comparisons

    def loss(
        parameters: Parameters, global_VMCHW: Tensor, local_VMCHW: Tensor, teacher_UMD: Tensor
    ) -> Tensor:
        def embed(views: Tensor) -> Tensor:
            rows: Tensor = functional_call(student, parameters, (views.flatten(0, 1),))
            return rows.view(*views.shape[:2], -1)  # [V, m, D]

        embeddings = embed(global_VMCHW)
        if len(local_VMCHW):
            embeddings = torch.cat([embeddings, embed(local_VMCHW)])
        total = embeddings.new_zeros(())
        for image, comparison in enumerate(comparisons):
            own, target = embeddings[:, image, None], teacher_UMD[:, image, None]  # [V, 1, D]
            if (mean := comparison.memory.mean) is not None:
                own, target = centre(own, mean), centre(target, mean)
            total = total + consistency_loss(
                own, target, comparison.memory.entries, comparison.blocks,
                comparison.student_temperature, comparison.teacher_temperature,
            )[0]  # fmt: skip
        return total / len(comparisons)

    return loss


def together(loss: UnitLoss, parameters: Parameters, *units: Tensor) -> Gradients:
    """Gradients of many patients at once, by vmap.

    Args:
        loss: of one patient.
        parameters: those that learn.
        units: the loss's further arguments, stacked over patients [n, ...], n >= 1.

    Returns:
        Gradients by name [n, ...] and losses [n].
    """
    in_dims = (None, *[0] * len(units))
    # Randomness is an error under vmap: `refuse_coupling` has refused what would draw.
    gradients, losses = vmap(grad_and_value(loss), in_dims=in_dims)(parameters, *units)
    return gradients, losses


def one_by_one(loss: UnitLoss, parameters: Parameters, *units: Tensor) -> Gradients:
    """The same by a plain loop over patients, the reference for `together`."""
    own = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    gradients, losses = [], []
    for unit in zip(*units, strict=True):
        value = loss(own, *unit)
        found = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
        gradients.append(found)
        losses.append(value.detach())
    stacked = [torch.stack(rows) for rows in zip(*gradients, strict=True)]
    return dict(zip(own, stacked, strict=True)), torch.stack(losses)
