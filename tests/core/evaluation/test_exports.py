import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from core.errors import UserError
from core.evaluation.exports import export_hugging_face, export_onnx
from core.evaluation.models import LoadedModel, features, open_model
from core.modalities import MEAN_STD


@pytest.fixture
def ours(tmp_path: Path) -> LoadedModel:
    """The weights before round 1 of a recipe with options of its own."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[model]\noptions = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }\n"
        "[views]\nglobal_px = 16\nlocal_px = 8\n"
    )
    return open_model(str(path))


@pytest.fixture
def resnet(tmp_path: Path) -> LoadedModel:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    for module in model.modules():  # as after training: running statistics that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return open_model(f"test_resnet@64:{tmp_path / 'w.pth'}")


@pytest.fixture(params=["ours", "resnet"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    result: LoadedModel = request.getfixturevalue(request.param)
    return result


def images_of(loaded: LoadedModel, count: int) -> torch.Tensor:
    return torch.randn(count, 3, loaded.model.px, loaded.model.px)


def test_onnx_gives_the_same_features_for_any_batch_size(tmp_path, loaded) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    difference = export_onnx(loaded, out)
    assert difference < 1e-4
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = images_of(loaded, count)
        found = session.run(["features"], {"images": images.numpy()})[0]
        with torch.no_grad():
            assert found == pytest.approx(loaded.model.backbone(images).numpy(), abs=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    expected = MEAN_STD if loaded.mean_std is None else loaded.mean_std
    assert json.loads(metadata["mean_std"]) == json.loads(json.dumps(expected))
    assert metadata["sha256_of_weights"] == loaded.sha256
    assert str(Path(timm.__file__).parent).encode() not in out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if ".partial" in path.name) == []


class Batches(torch.nn.Module):
    """Gives another result for a batch of one; a trace for two images cannot know."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> Any:
        return self.backbone(images) + (0.0 if torch.compiler.is_exporting() else 0.01)


def test_an_onnx_file_with_other_features_is_not_written(tmp_path: Path, ours) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = dataclasses.replace(ours.model, backbone=Batches(ours.model.backbone))
    with pytest.raises(UserError, match=r"differ from those of .* by up to 0.01"):
        export_onnx(dataclasses.replace(ours, model=model), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_hugging_face_directory_loads_in_plain_timm_with_the_same_features(
    tmp_path, loaded
) -> None:
    out = tmp_path / "hub"
    assert export_hugging_face(loaded, out, "# Card\n") < 1e-4
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = images_of(loaded, 3)
    with torch.no_grad():
        assert torch.allclose(plain(images), loaded.model.backbone(images), atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["num_features"] == plain.num_features
    assert config["pretrained_cfg"]["input_size"][1] == loaded.model.px
    assert (out / "README.md").read_text() == "# Card\n"


def test_a_hugging_face_directory_opens_again_with_its_pixel_statistics(tmp_path, loaded) -> None:
    export_hugging_face(loaded, tmp_path / "hub", "")
    again = open_model(str(tmp_path / "hub"))
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), dtype=np.uint8)
    expected = features(loaded, images, "us", last_blocks=2)
    assert again.mean_std == loaded.mean_std
    assert again.model.px == loaded.model.px
    assert features(again, images, "us", last_blocks=2) == pytest.approx(expected, abs=1e-5)


def test_an_earlier_directory_is_replaced_and_any_other_is_left_alone(tmp_path, ours) -> None:
    out = tmp_path / "hub"
    export_hugging_face(ours, out, "old")
    export_hugging_face(ours, out, "new")
    assert (out / "README.md").read_text() == "new"
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and holds more than README"):
        export_hugging_face(ours, out, "newer")
    assert (out / "thesis.tex").exists()
    assert (out / "README.md").read_text() == "new"


def test_a_directory_with_other_features_is_not_written(tmp_path: Path, ours) -> None:
    wrong = {**ours.model.arguments, "num_heads": 4}
    model = dataclasses.replace(ours.model, arguments=wrong)
    with pytest.raises(UserError, match="the features differ from those of"):
        export_hugging_face(dataclasses.replace(ours, model=model), tmp_path / "hub", "")
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / ".hub.partial").exists()
