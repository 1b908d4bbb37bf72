"""A round under differential privacy of the site's patients."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from core.checkpoint import Arrays
from core.config import Recipe
from core.errors import UserError
from core.initial import initial_state
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.privacy.accounting import round_events
from core.privacy.memory import comparisons, public_memory
from core.privacy.noise import PrivateRandom
from core.privacy.sampling import Patients
from core.privacy.step import PrivateOptimizer
from core.private_round import add_patients, private_round
from core.shards import Shard
from core.train import load_network, new_state
from core.wire import GlobalState, Prototypes

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")
DECLARED = {"us": 500, "pathology": 40}


class Fixed(PrivateRandom):
    """The same draws for every image, and no noise: what one patient changes is then seen."""

    def uniform(self, count: int):
        return np.full(count, 0.4)

    def normal(self, count: int):
        return np.zeros(count)


def recipe(**sections: dict[str, object]) -> Recipe:
    # fmt: off
    small: dict[str, dict[str, object]] = {
        "model": {"options": TINY, "head_hidden": 32, "embedding_dim": 16},
        "images": {"px": 16},
        "views": {"global_px": 16, "local_px": 8, "local_views": 1},
        "memory": {"entries_per_modality": 32, "blocks": 2},
        "loss": {"koleo_weight": 0.0},
        "federation": {"rounds": 2, "local_steps": 3},
        "evaluation": {"every_rounds": 0},
        "privacy": {
            "mode": "record", "sampling_rate": 0.3, "expected_patients": 8, "chunk": 4,
            "memory": "random",  # which needs no drawing
        },
    }
    # fmt: on
    merged = {key: {**small.get(key, {}), **sections.get(key, {})} for key in {*small, *sections}}
    return Recipe.model_validate_json(json.dumps(merged))


@functools.cache
def shard(modality: str, key: str = "p", patients: int = 21) -> Shard:
    drawn = make_phantoms(modality, patients=patients, images_per_patient=2, px=16, seed=1)
    keys = [f"{key}{number:02}".encode() for number in range(patients)]
    return dataclasses.replace(drawn, keys=np.array(keys))


def one_round(
    config: Recipe,
    shards: list[Shard] | None = None,
    private: Arrays | None = None,
    *,
    received: GlobalState | None = None,
    first_step: int = 0,
    on_step=None,
):
    torch.set_num_threads(1)
    return private_round(
        config, received or initial_state(config), shards or [shard("us"), shard("pathology")],
        private or {}, site="st-mary", declared=DECLARED, first_step=first_step, device="cpu",
        on_step=on_step,
    )  # fmt: skip


def test_an_update_holds_weights_and_what_the_site_declares_and_no_more() -> None:
    update, private = one_round(recipe())
    assert update.metrics == {}
    assert update.num_examples == DECLARED
    assert update.round_number == 1
    student = initial_state(recipe()).student.keys()
    sent = {f"{kind}/{name}" for kind in ("student", "teacher") for name in student}
    assert update.to_arrays().keys() == sent
    assert {name.split("/")[0] for name in private} == {"optimizer"}


def test_a_rebuilt_teacher_does_not_leave_the_site() -> None:
    update, _ = one_round(recipe(federation={"teacher": "rebuild", "local_steps": 1}))
    assert update.teacher == {}


@pytest.mark.parametrize("rate", [1e-9, 0.5, 1.0])
def test_a_round_takes_as_many_noisy_steps_as_it_is_charged_for_whoever_is_drawn(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(privacy={"sampling_rate": rate}, federation={"local_steps": 4})
    drawn: list[int] = []
    normal = PrivateRandom.normal
    monkeypatch.setattr(
        PrivateRandom, "normal", lambda self, count: drawn.append(count) or normal(self, count)
    )
    done: list[int] = []
    _, private = one_round(config, on_step=lambda step, steps, loss: done.append(step))
    size = sum(array.size for array in initial_state(config).student.values())
    (charged,) = round_events(config, 1)
    assert (charged.steps, charged.sampling_rate, charged.sigma) == (4, rate, 1.0)
    assert sum(drawn) == charged.steps * size  # one draw a weight and step
    assert done == [1, 2, 3, 4]
    assert {int(a) for name, a in private.items() if "/step/" in name} == {4}


def test_prototypes_leave_in_the_rounds_of_the_recipe_alone() -> None:
    config = recipe(
        privacy={"prototype_releases": 1, "prototype_noise": 0.05},
        federation={
            "local_steps": 1, "prototypes_per_modality": 2, "prototype_min_patients": 2,
        },
    )  # fmt: skip
    first, last = (one_round(config, first_step=step)[0] for step in (0, 1))
    assert first.prototypes.centroids == {}
    assert last.prototypes.centroids.keys() == {"us", "pathology"}
    assert len(last.prototypes.counts["us"]) <= config.federation.prototypes_per_modality
    assert [event.kind for event in round_events(config, 2)] == ["gradients", "prototypes"]


def test_a_step_without_patients_has_no_loss() -> None:
    losses: list[float] = []
    config = recipe(privacy={"sampling_rate": 1e-9}, federation={"local_steps": 1})
    update, _ = one_round(config, on_step=lambda step, steps, loss: losses.append(loss))
    assert np.isnan(losses).all()
    assert all(np.isfinite(array).all() for array in update.student.values())


def test_neither_the_recipes_seed_nor_the_site_fixes_what_a_round_gives() -> None:
    config = recipe(federation={"local_steps": 1})
    first, second = (one_round(config)[0].student for _ in range(2))
    assert not np.array_equal(first["head.layers.0.weight"], second["head.layers.0.weight"])


@pytest.mark.parametrize(
    ("trainable", "moves", "stays"),
    [
        ("all", "backbone.patch_embed.proj.weight", None),
        ("last_blocks", "backbone.blocks.1.mlp.fc1.weight", "backbone.blocks.0.mlp.fc1.weight"),
        ("bias", "backbone.blocks.0.mlp.fc1.bias", "backbone.blocks.0.mlp.fc1.weight"),
    ],
)
def test_weights_that_do_not_learn_leave_as_they_came(trainable, moves, stays) -> None:
    config = recipe(privacy={"trainable": trainable}, optim={"warmup": 0.0})
    before = initial_state(config).student
    update, private = one_round(config, received=initial_state(config))
    assert not np.array_equal(update.student[moves], before[moves])
    assert not np.array_equal(update.student["head.layers.0.bias"], before["head.layers.0.bias"])
    if stays is not None:
        assert np.array_equal(update.student[stays], before[stays])
        assert np.array_equal(update.teacher[stays], before[stays])
        assert not any(name.endswith(stays) for name in private)


def test_a_round_goes_on_with_the_moments_of_the_one_before() -> None:
    config = recipe()
    update, private = one_round(config)
    again = GlobalState(student=dict(update.student), teacher=dict(update.teacher))
    _, later = one_round(config, private=private, received=again, first_step=3)
    _, fresh = one_round(config, received=again, first_step=3)
    assert {int(a) for name, a in later.items() if "/step/" in name} == {6}
    assert {int(a) for name, a in fresh.items() if "/step/" in name} == {3}


def test_a_backbone_that_mixes_patients_is_refused() -> None:
    config = recipe(model={"options": {**TINY, "norm_layer": "batchnorm1d"}})
    with pytest.raises(UserError, match="shares statistics between the patients of a batch"):
        one_round(config)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["phantoms", "random"])
def test_the_memory_is_a_function_of_the_recipe_and_what_was_received(kind, centred) -> None:
    config = recipe(privacy={"memory": kind}, memory={"centred": centred})
    modality = MODALITIES.index("us")
    received = Prototypes({"us": np.eye(16, dtype=np.float32)[:3]}, {"us": np.ones(3)})
    found = []
    for _ in range(2):
        state = new_state(config, CPU, "st-mary")
        load_network(state.student, initial_state(config).student)
        load_network(state.teacher, initial_state(config).teacher)
        found.append(public_memory(config, state, modality, received))
    assert torch.equal(found[0].entries, found[1].entries)
    assert found[0].entries.shape == (32 + 3, 16)
    torch.testing.assert_close(found[0].entries.norm(dim=1), torch.ones(35))
    assert (found[0].mean is not None) == centred
    if not centred:
        assert torch.equal(found[0].entries[32:], torch.eye(16)[:3])


@pytest.mark.parametrize("gradients", ["vmap", "loop"])
def test_removing_a_patient_changes_a_steps_sum_by_at_most_one_clip(gradients) -> None:
    torch.set_num_threads(1)
    clip = 0.01
    privacy = {"gradients": gradients, "clip_norm": clip}
    config = recipe(privacy=privacy | {"memory": "phantoms"}, memory={"centred": True})
    shards = [shard("us", patients=9), shard("pathology", patients=9), shard("us", "q", 3)]
    patients = Patients(shards)
    state = new_state(config, CPU, "st-mary")
    load_network(state.student, initial_state(config).student)
    load_network(state.teacher, initial_state(config).teacher)
    memories = {m: public_memory(config, state, m, Prototypes({}, {})) for m in patients.modalities}
    compared = comparisons(config, memories, "st-mary", 0)
    learns = dict(state.student.named_parameters())

    def clipped_sum(drawn: list) -> torch.Tensor:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(learns.values(), lr=0.0), learns, noise_multiplier=1.0, clip_norm=clip,
            expected_patients=8, random=Fixed(),
        )  # fmt: skip
        add_patients(config, state, optimizer, patients, drawn, compared, Fixed())
        return torch.cat([p.summed_grad.flatten() for p in learns.values()])

    drawn = [patients.images_of(number)[:3] for number in range(len(patients))]
    whole = clipped_sum(drawn)
    changes = [
        float((whole - clipped_sum(drawn[:number] + drawn[number + 1 :])).norm()) / clip
        for number in range(len(drawn))
    ]
    assert 0.99 < max(changes) <= 1.0001
    both = {len({patients.kind_of(int(image))[0] for image in images}) for images in drawn}
    assert both == {1, 2}  # some patients have images of two modalities, in two shards
