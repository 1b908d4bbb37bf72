"""The vision transformer (any of timm's, by name) and the projection head on its class token."""

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from core.class_token import class_token_features
from core.config import ModelConfig, Recipe
from core.description import Description
from core.errors import UserError

BACKBONE = "backbone."
"""Before the names of the backbone's weights among a network's."""


DESCRIBING_POSITION_STD = 0.5
"""Of the first position embedding where pictures are described. Patch tokens have deviations of
about 1: beside them attention cannot see the usual .02, and the class token learns no layout."""


class ProjectionHead(nn.Module):
    """MLP d -> h -> h -> D with GELU and unit-length output; no normalisation layer.

    Batch statistics would couple patients and let each modality collapse onto its own point when
    batches mix modalities; layer normalisation does not prevent collapse either.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, dim),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, d] to unit embeddings [B, D], in float32 also under autocast.

        Embeddings of one modality may differ by less than bfloat16 can tell apart.
        """
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.normalize(self.layers(features.float()), dim=-1, eps=1e-6)


class Network(nn.Module):
    """Backbone and heads; the student is one, the teacher another.

    Args:
        model: shape of backbone and projection head.
        image_px: side of the global views.
        describes: whether it has heads that tell what a view shows.
        drop_path: stochastic depth.
    """

    def __init__(
        self, model: ModelConfig, image_px: int, *, describes: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = create_backbone(model, image_px, drop_path=drop_path)
        width = cast(int, self.backbone.num_features)
        self.head = ProjectionHead(width, model.head_hidden, model.embedding_dim)
        self.description = Description(self.backbone) if describes else None

    @classmethod
    def of(cls, recipe: Recipe, *, drop_path: float = 0.0) -> "Network":
        """The network that a recipe trains."""
        describes = recipe.loss.description_weight > 0
        px = recipe.views.global_px
        return cls(recipe.model, px, describes=describes, drop_path=drop_path)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to unit embeddings [B, D]."""
        return self.head(class_token_features(self.backbone, images_BCHW))  # type: ignore[no-any-return]

    def with_tokens(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The same embeddings, and all tokens of the last block [B, N, d], for the description."""
        backbone = cast(Any, self.backbone)
        tokens = backbone.forward_features(images_BCHW)
        return self.head(backbone.forward_head(tokens)), tokens


def create_backbone(model: ModelConfig, image_px: int, *, drop_path: float = 0.0) -> nn.Module:
    """Build the timm backbone with pooled features [B, d] as output, weights as timm draws them.

    Raises:
        UserError: timm does not know the name, or refuses an option.
    """
    options: dict[str, Any] = {
        "num_classes": 0,
        "img_size": image_px,
        "dynamic_img_size": True,
        "drop_path_rate": drop_path,
        **model.options,
    }
    try:
        backbone: nn.Module = timm.create_model(model.backbone, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.backbone '{model.backbone}' with options {model.options} cannot be built: "
            f"{reason}; give a vision transformer that timm.list_models() lists and its arguments"
        ) from None
    if not hasattr(backbone, "blocks"):
        raise UserError(
            f"model.backbone '{model.backbone}' is not a vision transformer with a list of blocks"
        )
    return backbone


def initialise(network: Network, generator: torch.Generator) -> None:
    """Draw all linear weights anew with deviation (fan in)^-1/2, from an explicit generator.

    The usual .02 is far too small at the widths that train on a CPU: the blocks then hardly act.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.backbone.named_parameters():
        if name in ("cls_token", "pos_embed", "reg_token"):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
    if network.description is not None:
        position = cast(Tensor, network.backbone.pos_embed)
        nn.init.trunc_normal_(position, std=DESCRIBING_POSITION_STD, generator=generator)


def use_plain_attention(network: nn.Module) -> None:
    """Switch timm's fused attention off: on a CPU with bf16 the plain form is twice as fast."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  (a plain attribute of timm's)
