"""Which networks can train privately, and which of their weights learn."""

from typing import Literal

from torch import Tensor, nn

from core.backbone import BACKBONE
from core.errors import UserError

AFTER_BLOCKS = ("norm.", "fc_norm.", "attn_pool.")
"""Parts of timm's vision transformers behind the last block."""


def refuse_coupling(network: nn.Module) -> None:
    """Hold that no part of a network mixes the images of a batch, or draws.

    Raises:
        UserError: a part does, or its gradients by patient are not tested.
    """
    for name, module in network.named_modules():
        reason = ""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            getattr(module, "running_mean", None) is not None
        ):
            reason = (
                "shares statistics between the patients of a batch, so that no clip bounds what "
                "one of them changes"
            )
        elif "Drop" in type(module).__name__ and _probability(module) > 0:
            reason = "drops at random, which is not tested under gradients by patient"
        if reason:
            raise UserError(
                f"privacy.mode = 'record': part '{name}' of the network ({type(module).__name__}) "
                f"{reason}; take a backbone or options without it"
            )


def choose_trainable(
    network: nn.Module, trainable: Literal["all", "last_blocks", "bias"], last_blocks: int
) -> None:
    """Let the head learn, and of the backbone what `privacy.trainable` says; freeze the rest.

    Args:
        network: a `core.backbone.Network`; changed in place.
        trainable: 'all'; 'last_blocks': they and what follows them; 'bias': every vector, that is
            biases, norms and layer scales.
        last_blocks: how many.

    Raises:
        UserError: the backbone has fewer blocks.
    """
    names = [name for name, _ in network.named_parameters()]
    depth = len({name.split(".")[2] for name in names if name.startswith(f"{BACKBONE}blocks.")})
    if trainable == "last_blocks" and last_blocks > depth:
        raise UserError(
            f"privacy.trainable_blocks = {last_blocks}, but the backbone has {depth}; give fewer"
        )
    late = (*AFTER_BLOCKS, *(f"blocks.{number}." for number in range(depth - last_blocks, depth)))
    for name, parameter in network.named_parameters():
        if trainable == "all" or not name.startswith(BACKBONE):
            learns = True
        elif trainable == "bias":
            learns = parameter.ndim == 1
        else:
            learns = name.removeprefix(BACKBONE).startswith(late)
        parameter.requires_grad_(learns)


def learning(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name, detached: the same memory, outside any graph."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def _probability(module: nn.Module) -> float:
    held = (getattr(module, name, None) for name in ("p", "drop_prob", "prob"))
    return max((float(value) for value in held if value is not None), default=0.0)
