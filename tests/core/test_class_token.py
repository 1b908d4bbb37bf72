import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from core.backbone import use_plain_attention
from core.class_token import class_token_features

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def backbone(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, dynamic_img_size=True,
        **{**SHAPE, **options},
    )  # fmt: skip
    with torch.no_grad():  # timm's draws are so small that a wrong block would hardly show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(px: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, features, px: int = 32) -> list[torch.Tensor]:
    """Features, and the gradient of every weight of some function of them."""
    model.zero_grad()
    torch.manual_seed(2)  # for what drops paths
    out = features(model, images(px))
    out.square().sum().backward()
    return [out, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.5},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"reg_tokens": 2, "no_embed_class": True},
        {"pre_norm": True},
        {"drop_path_rate": 0.5},
        {"depth": 1},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_features_and_gradients_are_the_backbones(options: dict[str, object], plain: bool) -> None:
    model = backbone(**options)
    if plain:
        use_plain_attention(model)
    for px in (32, 16):
        short = results(model, class_token_features, px)
        full = results(model, lambda m, x: m(x), px)
        for mine, theirs in zip(short, full, strict=True):
            # Some gradients are zero but for rounding, such as that of a shift of all keys.
            scale = float(theirs.detach().abs().max())
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * scale + 1e-6)


def test_the_last_blocks_other_tokens_are_not_computed() -> None:
    model, counts = backbone(), []
    for features in (class_token_features, lambda m, x: m(x)):
        with FlopCounterMode(display=False) as counter:
            features(model, images())
        counts.append(counter.get_total_flops())
    others, tokens, width, heads, batch = 16, 17, 32, 2, 3
    linear = 2 * others * 12 * width**2  # all of the block's weights
    attention = 2 * 2 * tokens * (tokens - heads) * width  # a head's query meets whole tokens
    assert counts[1] - counts[0] == batch * (linear + attention)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {**SHAPE, "global_pool": "avg"}),
        ("vit_relpos_small_patch16_224", {**SHAPE, "class_token": True}),
        ("deit_tiny_distilled_patch16_224", SHAPE),
    ],
)
def test_a_backbone_that_reads_more_than_its_class_token_runs_in_full(
    name: str, options: dict[str, object]
) -> None:
    model = timm.create_model(name, num_classes=0, img_size=32, **options).eval()
    assert torch.equal(class_token_features(model, images()), model(images()))


def test_gradients_of_each_image_alone_can_be_taken_at_once() -> None:
    model = backbone(depth=1)
    use_plain_attention(model)  # as wherever a CPU trains; torch cannot batch the fused one there
    weights = {name: p.detach() for name, p in model.named_parameters()}

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return class_token_features(self.inner, x)

    def of_one(values: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        named = {f"inner.{name}": value for name, value in values.items()}
        return functional_call(Short(), named, (image[None],)).square().sum()

    together = vmap(grad(of_one), in_dims=(None, 0))(weights, images())
    for index, image in enumerate(images()):
        for name, value in grad(of_one)(weights, image).items():
            assert torch.allclose(together[name][index], value, rtol=1e-4, atol=1e-4), name
