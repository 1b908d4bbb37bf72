"""Gradients of one patient."""

import pytest
import torch
from torch.nn.functional import normalize

from core.backbone import Network, initialise, use_plain_attention
from core.config import ModelConfig
from core.losses import centre, consistency_loss
from core.privacy.network import choose_trainable, learning
from core.privacy.unit import Comparison, PublicMemory, one_by_one, together, unit_loss

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def network(backbone: str = "vit_tiny_patch16_224", **options: object) -> Network:
    torch.set_num_threads(1)
    model = ModelConfig(
        backbone=backbone, options={**TINY, **options}, head_hidden=16, embedding_dim=8
    )
    built = Network(model, 32)
    use_plain_attention(built)
    initialise(built, torch.Generator().manual_seed(0))
    return built


def patients(count: int, images: int):
    draws = torch.Generator().manual_seed(1)
    large = torch.randn(count, 2, images, 3, 32, 32, generator=draws)
    small = torch.randn(count, 3, images, 3, 16, 16, generator=draws)
    targets = normalize(torch.randn(count, 2, images, 8, generator=draws), dim=-1)
    return large, small, targets


def comparison(seed: int = 2, mean: torch.Tensor | None = None) -> Comparison:
    draws = torch.Generator().manual_seed(seed)
    entries = normalize(torch.randn(20, 8, generator=draws), dim=1)
    if mean is not None:
        entries = centre(entries, mean)
    blocks = torch.randperm(20, generator=draws).tensor_split(2)
    return Comparison(PublicMemory(entries, mean), blocks, 0.1, 0.04)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "init_values": 1e-2},
        {"qk_norm": True, "pre_norm": True},
        {"no_embed_class": True, "norm_layer": "rmsnorm"},
        {"backbone": "vit_tiny_r_s16_p8_224", "patch_size": 1},
    ],
    ids=str,
)
def test_all_patients_at_once_and_one_by_one_give_the_same_gradients(options) -> None:
    student, units = network(**options), patients(3, 2)
    loss = unit_loss(student, [comparison(), comparison(3)])
    (fast, values), (plain, expected) = (
        how(loss, learning(student), *units) for how in (together, one_by_one)
    )
    assert fast.keys() == plain.keys() == dict(student.named_parameters()).keys()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in fast.items():
        scale = float(plain[name].abs().max()) + 1e-6
        assert float((gradient - plain[name]).abs().max()) < 1e-5 * max(scale, 1), name


@pytest.mark.parametrize("trainable", ["all", "last_blocks", "bias"])
def test_gradients_are_those_of_the_weights_that_learn(trainable) -> None:
    student, units = network(), patients(2, 1)
    choose_trainable(student, trainable, 1)
    gradients, _ = together(unit_loss(student, [comparison()]), learning(student), *units)
    assert gradients.keys() == {n for n, p in student.named_parameters() if p.requires_grad}
    found = one_by_one(unit_loss(student, [comparison()]), learning(student), *units)[0]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [None, torch.full((8,), 0.2)])
def test_the_mean_of_patients_losses_is_the_loss_of_a_batch(mean) -> None:
    student, (large, small, targets) = network(), patients(4, 1)
    compared = comparison(mean=mean)
    _, losses = together(unit_loss(student, [compared]), learning(student), large, small, targets)
    with torch.no_grad():
        embedded = [
            student(views.flatten(0, 2)).view(4, -1, 8).transpose(0, 1) for views in (large, small)
        ]
    student_VBD, teacher_UBD = torch.cat(embedded), targets[:, :, 0].transpose(0, 1)
    if mean is not None:
        student_VBD, teacher_UBD = centre(student_VBD, mean), centre(teacher_UBD, mean)
    expected, _ = consistency_loss(
        student_VBD, teacher_UBD, compared.memory.entries, compared.blocks, 0.1, 0.04
    )
    torch.testing.assert_close(losses.mean(), expected)


def test_a_patients_loss_is_the_mean_over_its_images() -> None:
    student, (large, small, targets) = network(), patients(1, 2)
    compared = [comparison(), comparison(3)]
    _, both = together(unit_loss(student, compared), learning(student), large, small, targets)
    single = [
        together(
            unit_loss(student, [compared[image]]), learning(student),
            large[:, :, [image]], small[:, :, [image]], targets[:, :, [image]],
        )[1]
        for image in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(both, (single[0] + single[1]) / 2)


def test_a_recipe_without_local_views_trains_on_the_global_ones() -> None:
    student, (large, small, targets) = network(), patients(2, 1)
    loss = unit_loss(student, [comparison()])
    gradients, losses = together(loss, learning(student), large, small[:, :0], targets)
    assert torch.isfinite(losses).all()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
