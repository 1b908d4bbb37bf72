import pytest
import torch

from core.backbone import Network, use_plain_attention
from core.config import Recipe
from core.step_memory import kept_bytes, step_memory


def recipe(**sections: dict[str, object]) -> Recipe:
    options = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    table = {"model": {"options": options, "head_hidden": 64}, **sections}
    return Recipe.model_validate(table, strict=False)


def measured(network: Network, px: int, images: int, half: bool) -> int:
    """Bytes of all storage that autograd keeps of a forward pass, each counted once."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    shapes = {tuple(p.shape) for p in network.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()  # a weight in half precision is left out
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        network(torch.zeros(images, 3, px, px))
    return sum(kept.values())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("px", [64, 96])
def test_what_a_forward_pass_keeps_is_foretold_within_five_percent(
    half: bool, fused: bool, px: int
) -> None:
    network = Network(recipe().model, 64)
    if not fused:
        use_plain_attention(network)
    foretold = kept_bytes(network, px, 4, half=half, fused_attention=fused)
    assert foretold == pytest.approx(measured(network, px, 4, half), rel=0.05)


def test_a_step_of_more_images_views_or_entries_takes_more() -> None:
    def total(**sections: dict[str, object]) -> int:
        return step_memory(recipe(**sections), half=True, fused_attention=True).total

    base = total()
    assert total(optim={"batch_size": 112}) > 1.8 * base
    assert total(views={"local_views": 40}) > base
    assert total(memory={"entries_per_modality": 100_000}) > base + 7 * 99_000 * 64 * 4


def test_weights_moments_and_gradients_are_twenty_bytes_a_parameter() -> None:
    network = Network(recipe().model, 64)
    parameters = sum(p.numel() for p in network.parameters())
    full, half = (step_memory(recipe(), half=h, fused_attention=True) for h in (False, True))
    assert full.weights == 20 * parameters
    assert half.weights == 22 * parameters
