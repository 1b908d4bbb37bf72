import argparse
import dataclasses
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from core.checkpoint import save_arrays, sha256_file
from core.config import Recipe
from core.errors import UserError
from core.evaluate import extract
from core.evaluation.models import LoadedModel, feature_blocks, features, open_model
from core.export import export_teacher, load_model
from core.initial import initial_state

NAME = "test_vit"  # timm's smallest transformer: width 64, depth 6, 160 px
RECIPE = Recipe.model_validate_json(
    json.dumps({
        "model": {"options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}},
        "views": {"global_px": 16, "local_px": 8},
    })
)  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A classifier of ten classes with timm's names."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10)
    return {name: tensor + 0.01 for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)


def reference(weights: dict[str, Tensor], images: NDArray[np.uint8]) -> Tensor:
    """Class token, patch tokens' mean and deviation of timm's own model, over two mirror images."""
    model = timm.create_model(NAME, num_classes=10).eval()
    model.load_state_dict(weights)
    found = []
    for pixels in (own_pixels(model, images), own_pixels(model, images[:, :, ::-1].copy())):
        with torch.no_grad():
            tokens = model.forward_features(pixels)
        patches = tokens[:, 1:]
        deviation = (patches - patches.mean(1, keepdim=True)).square().mean(1).sqrt()
        found.append(torch.cat([tokens[:, 0], patches.mean(1), deviation], 1))
    return (found[0] + found[1]) / 2


def own_pixels(model: Any, images: NDArray[np.uint8]) -> Tensor:
    """Images at the size and with the statistics that timm states for the model."""
    pixels = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        model.pretrained_cfg["input_size"][1:], mode="bilinear", antialias=True,
        align_corners=False,
    )  # fmt: skip
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def save(file: Path, content: Any) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("w.safetensors", lambda w: w),
        ("w.pth", lambda w: w),
        ("w.safetensors", lambda w: prefixed("module.backbone.", w)),
        ("w.pt", lambda w: {"epoch": 3, "state_dict": prefixed("module.", w)}),
        ("w.pt", lambda w: {"model": w, "args": argparse.Namespace(lr=0.1)}),
        (
            "w.pth",
            lambda w: {
                "student": prefixed("module.backbone.", {k: v * 2 for k, v in w.items()}),
                "teacher": prefixed("backbone.", w) | {"head.mlp.0.weight": torch.ones(3)},
                "optimizer": {"state": {}},
            },
        ),
        (
            "w.pth",
            lambda w: {
                "model": w | {"mask_token": torch.ones(1), "decoder_norm.bias": w["norm.bias"]}
            },
        ),
    ],
    ids=["plain safetensors", "plain torch", "prefixes", "state_dict", "options", "dino", "mae"],
)
def test_a_timm_name_with_a_weight_file_gives_the_features_of_timms_own_model(
    tmp_path: Path, weights, images, file: str, wrap
) -> None:
    path = save(tmp_path / file, wrap(weights))
    loaded = open_model(f"{NAME}:{path}")
    found = features(loaded, images, "cxr", last_blocks=1)
    assert found == pytest.approx(reference(weights, images).numpy(), abs=1e-4)
    assert (loaded.name, loaded.kind, loaded.path) == (NAME, "timm", path)
    assert loaded.sha256 == sha256_file(path)
    head = 64 * 10 + 10
    assert loaded.parameters == sum(tensor.numel() for tensor in weights.values()) - head
    assert re.search(r"left out .*head.bias.*: not the backbone", loaded.note)


def test_the_teacher_is_taken_before_the_student_and_the_note_says_so(tmp_path, weights) -> None:
    content = {"student": weights, "teacher": {k: v + 1 for k, v in weights.items()}}
    loaded = open_model(f"{NAME}:{save(tmp_path / 'w.pth', content)}")
    assert torch.equal(loaded.model.backbone.norm.weight, weights["norm.weight"] + 1)
    assert "took 'teacher' of teacher, student" in loaded.note


def test_position_embeddings_are_resized_to_another_input_size(tmp_path, weights, images) -> None:
    path = save(tmp_path / "w.safetensors", weights)
    loaded = open_model(f"{NAME}@48:{path}")
    expected = resample_abs_pos_embed(
        weights["pos_embed"], [3, 3], num_prefix_tokens=1, interpolation="bicubic", antialias=True
    )
    assert loaded.model.px == 48
    assert torch.allclose(loaded.model.backbone.pos_embed, expected)
    assert features(loaded, images, "cxr", last_blocks=2).shape == (3, 2 * 3 * 64)
    assert feature_blocks(loaded, 2) == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit3"])
def test_a_network_without_a_class_token_gives_its_pooled_output(tmp_path, images, name) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()  # test_vit3 pools its patches by attention
    loaded = open_model(f"{name}:{save(tmp_path / 'w.safetensors', plain.state_dict())}")
    found = features(loaded, images, "cxr", last_blocks=3)
    views = (own_pixels(plain, images), own_pixels(plain, images[:, :, ::-1].copy()))
    with torch.no_grad():
        pooled = [plain.forward_head(plain.forward_features(v), pre_logits=True) for v in views]
    assert found == pytest.approx(((pooled[0] + pooled[1]) / 2).numpy(), abs=1e-4)
    assert feature_blocks(loaded, 3) == 1


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run of two rounds as the coordinator leaves it, and its export beside them."""
    run = tmp_path / "study"
    state = initial_state(RECIPE)
    run.mkdir()
    (run / "recipe.json").write_text(RECIPE.to_json())
    save_arrays(run / "round-0001.safetensors", state.to_arrays())
    later = dataclasses.replace(state, teacher={k: v + 0.1 for k, v in state.teacher.items()})
    save_arrays(run / "round-0002.safetensors", later.to_arrays())
    export_teacher(RECIPE, later, run / "model.safetensors")
    (tmp_path / "recipe.toml").write_text(
        "[model]\noptions = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }\n"
        "[views]\nglobal_px = 16\nlocal_px = 8\n"
    )
    return run


def same_features(loaded: LoadedModel, path: Path, images: NDArray[np.uint8]) -> bool:
    ours = load_model(path)
    expected = extract(ours.backbone, images, "us", ours.px, last_blocks=2)
    return bool((features(loaded, images, "us", last_blocks=2) == expected).all())


def test_our_own_files_keep_each_modalitys_statistics(run_directory: Path, images) -> None:
    cases = {
        run_directory: ("study", "run", "round-0002.safetensors"),
        run_directory / "round-0001.safetensors": ("study round-0001", "run", None),
        run_directory / "model.safetensors": ("study", "export", None),
        run_directory.parent / "recipe.toml": ("random init (recipe)", "random", None),
    }
    for path, (name, kind, file) in cases.items():
        loaded = open_model(str(path))
        assert (loaded.name, loaded.kind) == (name, kind)
        assert loaded.path == (path / file if file else path)
        assert loaded.mean_std is None
        assert same_features(loaded, path, images)


def test_the_arguments_of_a_model_rebuild_it_in_plain_timm(run_directory: Path) -> None:
    model = open_model(str(run_directory)).model
    plain = timm.create_model(**model.arguments)
    plain.load_state_dict(model.backbone.state_dict())


def shuffled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = {k: v for k, v in weights.items() if k != "cls_token"} | {"extra.bias": torch.ones(1)}
    return changed | {"norm.weight": torch.ones(5)}


class Payload:
    """Says so when a pickle of it is run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import os; os.environ['PICKLE_WAS_RUN'] = '1'",))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PICKLE_WAS_RUN", raising=False)
    torch.save({"state_dict": Payload()}, tmp_path / "torch.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload()))
    for name in ("torch.pth", "plain.pkl"):
        with pytest.raises(UserError, match="is refused: reading it could run code") as caught:
            open_model(f"{NAME}:{tmp_path / name}")
        assert "\n" not in str(caught.value)
    assert "PICKLE_WAS_RUN" not in os.environ


def test_weights_of_another_architecture_are_refused_by_their_first_keys(tmp_path, weights) -> None:
    path = save(tmp_path / "w.safetensors", shuffled(weights))
    with pytest.raises(UserError, match="does not hold the weights of timm's 'test_vit'") as caught:
        open_model(f"{NAME}:{path}")
    assert "missing 'cls_token', unexpected 'extra.bias', 'norm.weight' is [5], expected [64]" in (
        str(caught.value)
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "dla46_c"])
def test_weights_of_a_transformer_do_not_fit_other_families(tmp_path, weights, name) -> None:
    path = save(tmp_path / "w.safetensors", weights)
    with pytest.raises(UserError, match=f"does not hold the weights of timm's '{name}'"):
        open_model(f"{name}:{path}")


def test_missing_weights_are_refused_even_where_timm_lets_them_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", {"foo": torch.ones(1)})
    timm.create_model(
        "dla46_c", pretrained=True, num_classes=0,
        pretrained_cfg_overlay={"state_dict": {"foo": torch.ones(1)}, "num_classes": 0},
    )  # fmt: skip
    with pytest.raises(UserError, match="timm's 'dla46_c' at 224 px: missing 'base_layer"):
        open_model(f"dla46_c:{path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.safetensors", "model 'nowhere.safetensors' does not exist"),
        ("resnet18", "'resnet18' is a timm name without weights, and nothing is downloaded"),
        ("resnet81:w.pth", "timm does not know a model 'resnet81'; did you mean resnet"),
        ("resnet18.none:w.pth", "timm knows 'resnet18' but not 'resnet18.none'"),
        ("resnet18@x:w.pth", "expected a number of pixels after '@', found 'x'"),
        ("resnet18:w.pth", "weight file 'w.pth' does not exist; nothing is downloaded"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_model(spec)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("w.safetensors", b"\x10", "is not a whole safetensors file"),
        ("w.pth", b"PK\x03\x04 torn", "is not a whole torch file"),
        ("w.pth", b"", "is not a whole torch file"),
        ("w.pth", {"epoch": 3}, "holds no table of weights, .* found epoch"),
        ("w.pth", [1, 2], "holds no table of weights"),
        ("w.pth", {"head.weight": torch.ones(3)}, "holds no weights of a backbone"),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path, file: str, content, message: str) -> None:
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(UserError, match=message):
        open_model(f"{NAME}:{path}")


def test_weights_without_a_name_are_refused_with_the_way_to_name_them(tmp_path, weights) -> None:
    path = save(tmp_path / "w.safetensors", weights)
    with pytest.raises(UserError, match=r"does not say its architecture; put its timm name before"):
        open_model(str(path))
