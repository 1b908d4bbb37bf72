import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_arrays, save_arrays
from core.config import Recipe
from core.device import resolve_device
from core.errors import UserError
from core.export import export_teacher
from core.initial import initial_state
from core.modalities import MODALITIES
from core.phantoms import make_phantoms
from core.site_data import SiteData
from core.site_round import site_round
from core.wire import GlobalState, metric_is_declared

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def recipe(**sections: dict[str, object]) -> Recipe:
    small: dict[str, dict[str, object]] = {
        "model": {"options": TINY, "head_hidden": 32, "embedding_dim": 16},
        "views": {"global_px": 16, "local_px": 8, "local_views": 1},
        "memory": {"entries_per_modality": 32},
        "optim": {"batch_size": 12, "precision": "fp32"},
        "federation": {"rounds": 2, "local_steps": 3, "prototype_min_patients": 2},
    }
    merged = {key: {**small.get(key, {}), **sections.get(key, {})} for key in {*small, *sections}}
    return Recipe.model_validate_json(json.dumps(merged))


def shards(*modalities: str):
    return [make_phantoms(m, patients=20, images_per_patient=2, px=16, seed=1) for m in modalities]


def one_round(config: Recipe, *modalities: str):
    torch.set_num_threads(1)
    return site_round(
        config, initial_state(config), shards(*modalities), {}, site="st-mary", first_step=0,
        device="cpu",
    )  # fmt: skip


def test_a_round_answers_with_declared_names_and_keeps_the_memory_home() -> None:
    update, private = one_round(recipe(), "ct", "us")
    assert all(metric_is_declared(name) for name in update.metrics)
    assert {"loss/ct", "loss/us", "knn_auroc/ct", "rankme/us"} <= set(update.metrics)
    pools = SiteData(shards("ct", "us")).pools
    assert update.num_examples == {MODALITIES[m]: len(pool) for m, pool in pools.items()}
    sent = update.to_arrays()
    held = [a for name, a in private.items() if name.startswith("memory/embeddings")]
    assert held
    assert not any(np.array_equal(a, h) for a in sent.values() for h in held)


def test_prototypes_are_unit_rows_of_the_memorys_width() -> None:
    update, _ = one_round(recipe(), "ct")
    centroids = update.prototypes.centroids["ct"]
    assert centroids.shape[1] == 16
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(1, abs=1e-5)
    assert (update.prototypes.counts["ct"] >= 2).all()


def test_a_rebuilt_teacher_does_not_leave_the_site() -> None:
    update, _ = one_round(recipe(federation={"teacher": "rebuild", "local_steps": 1}), "ct")
    assert update.teacher == {}
    assert not any(name.startswith("teacher/") for name in update.to_arrays())


def test_a_refilled_memory_holds_real_images_from_the_start_and_is_not_stored() -> None:
    config = recipe(memory={"at_round_start": "refilled"}, federation={"local_steps": 1})
    update, private = one_round(config, "ct")
    assert not any(name.startswith("memory/") for name in private)
    assert update.prototypes.counts["ct"].sum() > 12  # more patients than one batch can bring


def test_grey_and_colour_shards_of_one_modality_share_a_batch() -> None:
    grey, colour = shards("us")[0], shards("dermatology")[0]
    data = SiteData([grey, colour])
    batches = data.batches(recipe(), "st-mary", 0)
    assert [tuple(b.images[:].shape[1:]) for b in batches] == [(1, 16, 16), (3, 16, 16)]
    assert len({*batches[0].patients.tolist()} & {*batches[1].patients.tolist()}) == 0


def test_the_initial_state_depends_on_the_seed_alone() -> None:
    first, again = initial_state(recipe()), initial_state(recipe())
    other = initial_state(recipe().model_copy(update={"seed": 7}))
    for name, array in first.student.items():
        assert np.array_equal(array, again.student[name])
        assert np.array_equal(array, first.teacher[name])
    assert any(not np.array_equal(a, other.student[n]) for n, a in first.student.items())


def test_a_pretrained_file_is_read_and_its_positions_fit_a_larger_image(tmp_path: Path) -> None:
    file = tmp_path / "pretrained.safetensors"
    export_teacher(recipe(), initial_state(recipe()), file)
    larger = recipe(model={"init_file": str(file)}, views={"global_px": 32})
    state = initial_state(larger)
    weights, _ = load_arrays(file)
    assert np.array_equal(state.student["backbone.cls_token"], weights["cls_token"])
    assert state.student["backbone.pos_embed"].shape == (1, 17, 32)


def test_a_study_may_begin_with_all_that_another_run_learnt(
    tmp_path: Path,
) -> None:
    describing = {"loss": {"description_weight": 1.0}}
    ended = initial_state(recipe(**describing).model_copy(update={"seed": 7}))
    file = tmp_path / "round-0002.safetensors"
    save_arrays(file, ended.to_arrays(), {})
    begun = initial_state(recipe(model={"init_file": str(file)}, **describing))
    assert "description.grid.weight" in ended.teacher
    for name, array in ended.teacher.items():
        assert np.array_equal(begun.student[name], array)
        assert np.array_equal(begun.teacher[name], array)


def test_a_pretrained_file_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pretrained.safetensors"
    export_teacher(recipe(), initial_state(recipe()), file)
    with pytest.raises(UserError, match=r"does not fit the backbone: .* give the file of the same"):
        initial_state(recipe(model={"init_file": str(file), "options": {**TINY, "embed_dim": 64}}))


@pytest.mark.parametrize("backbone", ["vit_no_such", "resnet18"])
def test_a_backbone_that_is_no_vision_transformer_of_timm_is_refused(backbone: str) -> None:
    with pytest.raises(UserError, match=f"backbone '{backbone}'"):
        initial_state(recipe(model={"backbone": backbone, "options": {}}))


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "unknown; give 'auto'"), ("cuda:x", "unknown"), ("cuda:99", r"torch sees \d+ usable")],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_device(name)


def test_the_automatic_device_is_usable() -> None:
    torch.zeros(1, device=resolve_device("auto"))


def test_wire_names_round_trip() -> None:
    state = initial_state(recipe())
    again = GlobalState.from_arrays(state.to_arrays())
    assert again.student.keys() == state.student.keys()
    assert again.teacher.keys() == state.teacher.keys()
