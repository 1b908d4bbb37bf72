"""A vision transformer's class token, without what nothing reads and with few copies.

The head reads the class token alone. In the last block the other tokens then matter only as what
is attended to: queries, projection, MLP and norms are computed for one token instead of all, and
keys and values for none, since with q a head's query and W_k, W_v its weights

    q . (W_k x_j) = (W_k^T q) . x_j        sum_j a_j (W_v x_j) = W_v (sum_j a_j x_j)

and the key's bias is one number for all j, which a softmax does not see. The result is the same up
to rounding, forward and backward; next to nothing is left of one block of L.
"""

from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional


def class_token_features(backbone: nn.Module, images_BCHW: Tensor) -> Tensor:
    """What `backbone(images)` returns, [B, d], by the short way wherever it is the same.

    Backbones that pool other tokens, or whose blocks are not timm's plain ones, run in full.
    """
    if not _reads_class_token_alone(backbone):
        return cast(Tensor, backbone(images_BCHW))
    vit = cast(Any, backbone)
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images_BCHW))))
    for block in vit.blocks[:-1]:
        mixed = _attend(block.attn, block.norm1(tokens))
        tokens = _finish(block, tokens, mixed)  # [B, N, d]
    last = vit.blocks[-1]
    mixed = _attend_from_class_token(last.attn, last.norm1(tokens))
    return cast(Tensor, vit.forward_head(vit.norm(_finish(last, tokens[:, :1], mixed))))


def _reads_class_token_alone(backbone: nn.Module) -> bool:
    return (
        type(backbone) is VisionTransformer
        and backbone.global_pool == "token"
        and backbone.attn_pool is None
        and backbone.cls_token is not None
        and not backbone.grad_checkpointing
        and all(_is_plain(block) for block in backbone.blocks)
    )


def _is_plain(block: nn.Module) -> bool:
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and isinstance(block.attn.k_norm, nn.Identity)  # its keys are not linear in the tokens
        and block.attn.attn_drop.p == 0
        and getattr(block.attn, "gate", None) is None  # newer than the oldest timm we take
    )


def _finish(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The block's output at tokens [B, n, d], from what its attention mixed for them."""
    attention = block.attn
    mixed = attention.proj_drop(attention.proj(attention.norm(mixed)))
    tokens = tokens + block.drop_path1(block.ls1(mixed))
    return cast(Tensor, tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))))


def _attend(attention: Any, normed: Tensor) -> Tensor:
    """Values mixed by attention, [B, N, inner], of all tokens [B, N, d]."""
    batch, count = normed.shape[:2]
    parts = attention.qkv(normed).view(batch, count, 3, attention.num_heads, -1)
    # Taken apart before the axis of heads is moved: backward then joins the gradients as they lie.
    query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))  # [B, H, N, inner / H]
    if attention.fused_attn:
        mixed = functional.scaled_dot_product_attention(query, key, value)
    else:
        # In order first: each is copied once, and fast, instead of within each product.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        mixed = torch.softmax(query * attention.scale @ key.mT, dim=-1) @ value
    return mixed.transpose(1, 2).flatten(2)


def _attend_from_class_token(attention: Any, normed: Tensor) -> Tensor:
    """The same at the first token alone, [B, 1, inner]."""
    heads, bias = attention.num_heads, attention.qkv.bias
    of_query, of_key, of_value = attention.qkv.weight.chunk(3)  # [inner, d]
    query = functional.linear(normed[:, 0], of_query, None if bias is None else bias.chunk(3)[0])
    normed = normed.to(query.dtype)  # once, where autocast would at each use
    query = query.view(len(normed), heads, -1) * attention.scale
    sought = torch.einsum("bhe,hed->bhd", query, of_key.unflatten(0, (heads, -1)))
    weights = torch.softmax(sought @ normed.mT, dim=-1)  # [B, H, N]
    found = weights @ normed  # [B, H, d]
    mixed = torch.einsum("bhd,hed->bhe", found, of_value.unflatten(0, (heads, -1))).flatten(1)
    return (mixed if bias is None else mixed + bias.chunk(3)[2])[:, None]
