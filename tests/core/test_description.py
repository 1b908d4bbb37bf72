import json

import pytest
import torch

from core.backbone import Network, initialise
from core.checkpoint import load_arrays
from core.config import recipe_from_json
from core.describe import FIGURES, describe
from core.description import GRID_CELLS, PATCH_CELLS, Description
from core.export import export_teacher
from core.initial import initial_state
from core.phantoms import make_phantoms
from core.site_data import SiteData
from core.site_round import site_round, usual_of
from core.train import new_state
from core.wire import GlobalState


class Backbone(torch.nn.Module):
    num_features, num_prefix_tokens, has_class_token = 8, 1, True
    pos_embed = torch.zeros(1, 1 + 16, 8)


@pytest.fixture
def describing(recipe):
    def make(**sections):
        table = json.loads(recipe.to_json()) | {"loss": {"description_weight": 1.0}}
        for name, values in sections.items():
            table[name] |= values
        return recipe_from_json(json.dumps(table), "test")

    return make


def test_an_answer_that_is_right_costs_nothing_and_the_usual_one_costs_one_a_part() -> None:
    description = Description(Backbone()).requires_grad_(False)
    for head in (description.grid, description.patch):
        torch.nn.init.zeros_(head.bias)
    pictures = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    usual = description.usual(pictures.byte(), 32)
    pixels = pictures.byte().float() / 255
    nothing = torch.zeros(40, 17, 8)  # biases are zero: the answer is what is usual
    assert float(description(nothing, pixels, usual)) == pytest.approx(2, abs=0.1)

    one = pixels[:1]
    told = torch.zeros(1, 17, 8)
    description.grid.bias.copy_(((describe(one, GRID_CELLS)[0] - usual[0]) / usual[1]).flatten())
    patches_only = float(description(told, one, usual))
    fine = (describe(one, 4 * PATCH_CELLS)[0] - usual[2]) / usual[3]
    assert patches_only == pytest.approx(float(fine.square().mean()), rel=1e-5)
    corner = fine[0, :, :PATCH_CELLS, :PATCH_CELLS].flatten()
    description.patch.bias.copy_(corner)  # right for the first patch alone
    shifted = fine - corner.view(FIGURES, PATCH_CELLS, PATCH_CELLS).tile(1, 4, 4)
    assert float(description(told, one, usual)) == pytest.approx(
        float(shifted.square().mean()), rel=1e-5
    )


def test_the_same_picture_in_more_pixels_is_as_usual_as_before() -> None:
    small = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 255
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")
    pictures = torch.nn.functional.interpolate(large, (32, 32), mode="bilinear", antialias=True)
    description = Description(Backbone())
    expected, found = (description.usual(p.byte(), 32) for p in (pictures, large))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() < 0.02


def test_a_network_that_describes_embeds_like_one_that_does_not(recipe) -> None:
    network = Network(recipe.model, 32, describes=True)
    initialise(network, torch.Generator().manual_seed(0))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    embeddings, tokens = network.with_tokens(images)
    assert tokens.shape == (3, 1 + 16, 32)
    assert torch.allclose(embeddings, network(images), atol=1e-5)


def test_a_site_that_describes_its_pictures_gets_better_at_it(describing) -> None:
    config = describing(optim={"learning_rate": 0.3}, federation={"local_steps": 12})
    state, private, told = initial_state(config), {}, []
    for number in range(2):
        update, private = site_round(
            config, state, [make_phantoms("us", patients=8, images_per_patient=2, px=32, seed=0)],
            private, site="st-mary", first_step=12 * number, device="cpu",
        )  # fmt: skip
        told.append(update.metrics["description/us"])
        state = GlobalState(student=dict(update.student), teacher=dict(update.teacher))
    assert told[1] < 0.9 * told[0]
    assert told[0] < 4


def test_what_is_usual_is_told_by_the_same_pictures_in_every_round(describing) -> None:
    config = describing()
    data = SiteData([make_phantoms("us", patients=150, images_per_patient=1, px=32, seed=0)])
    state = new_state(config, torch.device("cpu"), "st-mary")
    first = usual_of(config, state, data, "st-mary")
    state.step = 40
    again = usual_of(config, state, data, "st-mary")
    (modality,) = first
    assert all(torch.equal(a, b) for a, b in zip(first[modality], again[modality], strict=True))


def test_the_released_backbone_has_no_describing_heads(describing, tmp_path) -> None:
    config = describing()
    export_teacher(config, initial_state(config), tmp_path / "model.safetensors")
    arrays, _ = load_arrays(tmp_path / "model.safetensors")
    assert arrays
    assert not [name for name in arrays if "description" in name]
    assert [name for name in initial_state(config).teacher if name.startswith("description.")]
