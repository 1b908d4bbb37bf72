"""Which networks can train privately, and which of their weights learn."""

import pytest

from core.backbone import Network
from core.config import ModelConfig
from core.errors import UserError
from core.privacy.network import choose_trainable, learning, refuse_coupling

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def network(**options: object) -> Network:
    return Network(ModelConfig(options={**TINY, **options}, head_hidden=8, embedding_dim=4), 16)


def test_a_plain_vision_transformer_may_train() -> None:
    refuse_coupling(network())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_layer": "batchnorm1d"}, r"'backbone\.\S+' .*BatchNorm.* shares statistics between"),
        ({"proj_drop_rate": 0.1}, r"\(Dropout\) drops at random"),
        ({"attn_drop_rate": 0.1}, "drops at random"),
        ({"drop_path_rate": 0.1}, r"\(DropPath\) drops at random"),
        ({"patch_drop_rate": 0.5}, r"\(PatchDropout\) drops at random"),
    ],
)
def test_a_part_that_mixes_patients_or_draws_is_refused_with_the_reason(options, reason) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        refuse_coupling(network(**options))
    assert "privacy.mode = 'record'" in str(raised.value)


def test_everything_learns_unless_the_recipe_says_otherwise() -> None:
    whole = network()
    choose_trainable(whole, "all", 1)
    assert learning(whole).keys() == dict(whole.named_parameters()).keys()


def test_the_last_blocks_learn_with_what_follows_them() -> None:
    part = network()
    choose_trainable(part, "last_blocks", 2)
    parts = {name.rsplit(".", 1)[0] for name in learning(part)}
    assert {"backbone.norm", "head.layers.0", "backbone.blocks.1.mlp.fc1"} <= parts
    assert all(
        name.startswith(("backbone.norm.", "head.", "backbone.blocks.1.", "backbone.blocks.2."))
        for name in learning(part)
    )


def test_biases_and_norms_learn_alone_beside_the_head() -> None:
    part = network()
    choose_trainable(part, "bias", 1)
    own = {name: p for name, p in learning(part).items() if name.startswith("backbone.")}
    assert {"backbone.patch_embed.proj.bias", "backbone.blocks.0.norm1.weight"} <= own.keys()
    assert all(parameter.ndim == 1 for parameter in own.values())
    assert sum(name.startswith("head.") for name in learning(part)) == 6


def test_more_last_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="trainable_blocks = 4, but the backbone has 3"):
        choose_trainable(network(), "last_blocks", 4)
