import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from core.backbone import create_backbone
from core.config import ModelConfig
from core.evaluate import Task, auroc, labelled_tasks
from core.evaluation.baselines import HAND_MADE, PIXELS, hand_made, pixels, random_weights
from core.evaluation.models import LoadedModel
from core.evaluation.protocol import predict
from core.export import Model
from core.import_npz import read_npz
from core.phantoms import make_phantoms

IMAGES64 = Path(__file__).parents[3].parent / "shared/data/images64"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HOG_LENGTH = 7 * 7 * 2 * 2 * 9  # blocks of 2 x 2 cells, 8 x 8 cells, 9 orientations


def task_of(images: np.ndarray) -> Task:
    shard = make_phantoms("cfp", patients=14, images_per_patient=1, px=16, seed=0)
    (task,) = labelled_tasks([shard])
    return dataclasses.replace(task, shard=dataclasses.replace(shard, images=images))


def test_pixels_are_means_of_squares() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    features = pixels(task_of(images), np.array([1])).reshape(3, 16, 16)
    assert features[2, 5, 9] == pytest.approx(images[1, 20:24, 36:40, 2].mean() / 255)


def test_hand_made_features_hold_edges_a_thumbnail_and_colour_shares() -> None:
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, 32:, 0] = 255  # one vertical edge in red
    (features,) = hand_made(task_of(image), np.array([0]))
    assert features.shape == (HOG_LENGTH + 3 * 256 + 3 * 16,)
    orientations = features[:HOG_LENGTH].reshape(-1, 9).sum(0)
    assert orientations.argmax() == 0  # scikit-image numbers a horizontal gradient 0 degrees
    assert orientations[1:].max() < 1e-3
    red, green, _ = features[-48:].reshape(3, 16)
    assert red == pytest.approx([0.5] + [0] * 14 + [0.5])
    assert green == pytest.approx([1] + [0] * 15)


def test_hand_made_features_are_as_long_at_every_size() -> None:
    for px in (28, 64, 100):
        images = np.random.default_rng(0).integers(0, 256, (2, px, px, 1)).astype(np.uint8)
        features = hand_made(task_of(images), np.arange(2))
        assert features.shape == (2, HOG_LENGTH + 256 + 16)
        assert features.dtype == np.float32


def loaded(backbone: torch.nn.Module) -> LoadedModel:
    return LoadedModel("tiny", "export", Model(backbone, 16), Path("tiny"), "", 0)


@pytest.mark.parametrize("kind", ["transformer", "convolutional"])
def test_random_weights_replace_every_matrix_and_leave_the_model_as_it_was(kind: str) -> None:
    if kind == "transformer":
        model = loaded(create_backbone(ModelConfig(options=TINY), 16))
    else:
        model = loaded(timm.create_model("resnet10t", num_classes=0).eval())
        model.model.backbone.bn1.running_mean.fill_(3)
    before = {name: p.clone() for name, p in model.model.backbone.named_parameters()}
    first, again, other = (random_weights(model, seed).model.backbone for seed in (0, 0, 1))
    for name, parameter in first.named_parameters():
        assert torch.equal(model.model.backbone.get_parameter(name), before[name])
        assert torch.equal(again.get_parameter(name), parameter)
        if parameter.ndim >= 2:
            assert not torch.equal(parameter, before[name])
            assert not torch.equal(parameter, other.get_parameter(name))
            if parameter.numel() > 2000:
                deviation = parameter.detach().std() * parameter[0].numel() ** 0.5
                assert float(deviation) == pytest.approx(1, 0.1)
    if kind == "convolutional":
        assert not first.bn1.running_mean.any()
    px = 16 if kind == "transformer" else 32
    with torch.no_grad():
        assert torch.isfinite(first(torch.rand(2, 3, px, px))).all()


@pytest.mark.skipif(not IMAGES64.is_dir(), reason="the shared images are not here")
def test_chest_x_rays_give_about_the_known_figures() -> None:
    (task,) = labelled_tasks([read_npz(IMAGES64 / "cxr_nih_pneumonia_64.npz")])
    for source, expected in ((HAND_MADE, 0.86), (PIXELS, 0.84)):
        (found,) = predict(source, task, ("probe",), (100,))
        assert auroc(found.scores, found.labels) == pytest.approx(expected, abs=0.04)
