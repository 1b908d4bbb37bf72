import json
from collections.abc import Sequence

import pytest
import torch

import core.step
from core.backbone import initialise
from core.batch import cut_parts
from core.config import Recipe
from core.phantoms import make_phantoms
from core.ranks import Ranks
from core.site_data import SiteData
from core.site_round import usual_of
from core.step import TrainState, add_gradients
from core.train import new_state, train

CPU = torch.device("cpu")


def recipe(**sections: dict[str, object]) -> Recipe:
    small: dict[str, dict[str, object]] = {
        "model": {
            "options": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
            "head_hidden": 32,
            "embedding_dim": 16,
        },
        "views": {"global_px": 16, "local_px": 8, "local_views": 2},
        "memory": {"entries_per_modality": 32, "blocks": 2},
        "optim": {"batch_size": 13, "precision": "fp32"},
    }
    merged = {key: {**small.get(key, {}), **sections.get(key, {})} for key in {*small, *sections}}
    return Recipe.model_validate_json(json.dumps(merged))


@pytest.fixture(scope="module")
def data() -> SiteData:
    names = ("ct", "us", "dermatology")  # 13 images: 5, 4 and 4 in the first step
    return SiteData(
        [make_phantoms(m, patients=20, images_per_patient=2, px=16, seed=1) for m in names]
    )


def started(config: Recipe) -> TrainState:
    torch.set_num_threads(1)
    state = new_state(config, CPU, "site")
    initialise(state.student, torch.Generator().manual_seed(0))
    state.teacher.load_state_dict(state.student.state_dict())
    return state


def first_step(config: Recipe, data: SiteData):
    """Loss, figures, teacher's embeddings and gradients of the first step."""
    state, sums = started(config), {}
    if config.loss.description_weight:
        state.usual = usual_of(config, state, data, "site")
    met = add_gradients(state, config, data.batches(config, "site", 0), "site", sums)
    gradients = {name: p.grad for name, p in state.student.named_parameters()}
    return float(met.total), sums, torch.cat(list(met.embeddings)), gradients


@pytest.mark.parametrize(("centred", "description_weight"), [(True, 0), (False, 0), (True, 1)])
@pytest.mark.parametrize(
    ("parts", "checkpointing"), [(1, True), (2, False), (3, True), (13, False)]
)
def test_parts_and_checkpointing_give_the_gradient_of_the_whole_batch(
    data: SiteData, parts: int, checkpointing: bool, centred: bool, description_weight: float
) -> None:
    """KoLeo included: with a part for each image, none has its neighbour beside it.

    Description too: batches are of 5, 4 and 4 images, so a part's mean is not the batch's.
    """
    loss = {"koleo_weight": 0.5, "description_weight": description_weight}
    config = recipe(memory={"centred": centred}, loss=loss)
    loss, sums, embeddings, gradients = first_step(config, data)
    changed = config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"accumulate": parts}),
            "model": config.model.model_copy(update={"checkpointing": checkpointing}),
        }
    )
    again, sums_again, embeddings_again, gradients_again = first_step(changed, data)
    assert again == pytest.approx(loss, rel=1e-5)
    assert ("description/ct" in sums) is (description_weight > 0)
    for name, value in sums.items():
        assert float(sums_again[name]) == pytest.approx(float(value), rel=1e-4), name
    assert torch.allclose(embeddings_again, embeddings, atol=1e-5)
    for name, gradient in gradients.items():
        difference = float((gradients_again[name] - gradient).norm())
        assert difference <= 1e-5 * float(gradient.norm()) + 1e-9, name


@pytest.mark.parametrize(("parts", "description_weight"), [(1, 0), (1, 1), (3, 1)])
def test_global_views_one_after_the_other_give_the_gradient_of_both_at_once(
    data: SiteData, parts: int, description_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"koleo_weight": 0.5, "description_weight": description_weight}
    config = recipe(memory={"centred": True}, loss=loss, optim={"accumulate": parts})
    total, sums, embeddings, gradients = first_step(config, data)
    passes = []
    embed = core.step._embed
    monkeypatch.setattr(core.step, "VIEW_ALONE_IMAGES", 1)
    monkeypatch.setattr(
        core.step, "_embed", lambda n, pixels, r: passes.append(len(pixels)) or embed(n, pixels, r)
    )
    again, sums_again, embeddings_again, gradients_again = first_step(config, data)
    assert again == pytest.approx(total, rel=1e-5)
    assert sums_again.keys() == sums.keys()
    for name, value in sums.items():
        assert float(sums_again[name]) == pytest.approx(float(value), rel=1e-4), name
    assert torch.equal(embeddings_again, embeddings)
    for name, gradient in gradients.items():
        difference = float((gradients_again[name] - gradient).norm())
        assert difference <= 1e-5 * float(gradient.norm()) + 1e-9, name
    if parts == 1 and not description_weight:
        assert passes == [2, 1, 1, 2]  # the teacher's, then the student's


def test_ranks_of_unequal_shares_gather_the_same_views(
    data: SiteData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would wait for each other for ever: 13 images are 6 and 7, about the limit."""
    gathered: dict[int, list[int]] = {}

    class Recorded(Ranks):
        def add(self, tensors: Sequence[torch.Tensor]) -> None:
            """Nobody else is there."""

        def gather(self, own: torch.Tensor, first: int, total: int) -> torch.Tensor:
            gathered.setdefault(self.rank, []).append(len(own))
            return super().gather(own, first, total)

    monkeypatch.setattr(core.step, "VIEW_ALONE_IMAGES", 7)
    config = recipe()
    for rank in range(2):
        batches = data.batches(config, "site", 0)
        add_gradients(started(config), config, batches, "site", {}, Recorded(rank, 2))
    assert gathered[0] == gathered[1] == [1, 1, 1]  # two global views, the teacher's embeddings


def test_koleo_of_parts_on_their_own_would_be_another_gradient(data: SiteData) -> None:
    """So the test above would tell if a part compared its images with each other alone."""
    config = recipe(loss={"koleo_weight": 0.5})
    state = started(config)
    whole = first_step(config, data)[3]
    halves = []
    for rows in (slice(0, 3), slice(3, 5)):
        batch = data.batches(config, "site", 0)[0]
        batch.images, batch.patients = batch.images[rows], batch.patients[rows]
        halves.append(batch)
    add_gradients(state, config, [*halves, *data.batches(config, "site", 0)[1:]], "site", {})
    name, weight = next(iter(state.student.head.named_parameters()))
    assert float((weight.grad - whole[f"head.{name}"]).norm()) > 1e-2 * float(weight.grad.norm())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_both_passes_of_a_part_drop_the_same_paths(
    data: SiteData, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {
        "options": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
        "drop_path": 0.5,
        "checkpointing": checkpointing,
    }
    config = recipe(optim={"accumulate": 2}, model=model)
    state = started(config)
    seen: list[torch.Tensor] = []
    forward = state.student.forward

    def watch(images: torch.Tensor) -> torch.Tensor:
        embeddings = forward(images)
        seen.append(embeddings.detach())
        return embeddings

    monkeypatch.setattr(state.student, "forward", watch)
    add_gradients(state, config, data.batches(config, "site", 0), "site", {})
    first, second = seen[:2]  # without gradient; then for each part the global and the local views
    assert torch.equal(first, seen[2])
    assert torch.equal(second, seen[4])
    assert not torch.equal(seen[2][:6], seen[4][:6])


def test_after_steps_in_parts_the_memory_is_that_after_whole_steps(data: SiteData) -> None:
    banks = []
    for parts in (1, 4):
        config = recipe(optim={"accumulate": parts})
        state = started(config)
        train(state, lambda n, c=config: data.batches(c, "site", n), config, 6, site="site")
        banks.append(state.bank)
    assert torch.equal(banks[0].patients, banks[1].patients)
    assert banks[0].cursor == banks[1].cursor
    assert torch.allclose(banks[0].embeddings, banks[1].embeddings, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 13])
def test_parts_hold_every_image_once_and_differ_by_at_most_one(count: int) -> None:
    sizes = [5, 0, 4, 4]
    parts = cut_parts(sizes, count)
    places = [
        (number, row)
        for part in parts
        for number, rows in part.rows
        for row in range(rows.start, rows.stop)
    ]
    assert places == [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    lengths = [sum(rows.stop - rows.start for _, rows in part.rows) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert [part.first for part in parts] == [sum(lengths[:n]) for n in range(count)]
