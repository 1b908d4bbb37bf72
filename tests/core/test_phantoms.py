import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import core.phantoms
from core.errors import UserError
from core.modalities import MODALITIES
from core.phantoms import CLASSES, draw_pictures, make_phantoms
from core.phantoms_draw import blur, ellipse, inside, new_canvas, soft_noise
from core.shards import Shard, check_shard

COLOUR = {"pathology", "cfp", "dermatology"}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Shard]:
    """Enough patients of each modality to compare classes."""
    return {
        m: make_phantoms(m, patients=24, images_per_patient=2, px=32, seed=3) for m in MODALITIES
    }


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_same_arguments_give_the_same_bits(modality: str) -> None:
    first, again, other = (
        make_phantoms(modality, patients=3, images_per_patient=2, px=24, seed=seed)
        for seed in (5, 5, 6)
    )
    assert first.images.tobytes() == again.images.tobytes()
    assert first.images.tobytes() != other.images.tobytes()


@pytest.mark.parametrize("modality", MODALITIES)
def test_more_patients_and_images_extend_what_fewer_give(modality: str) -> None:
    few = make_phantoms(modality, patients=2, images_per_patient=1, px=24, seed=0)
    many = make_phantoms(modality, patients=3, images_per_patient=2, px=24, seed=0)
    np.testing.assert_array_equal(few.images, many.images[[0, 2]])


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_shard_is_whole_and_balanced_and_split_by_patient(
    drawn: dict[str, Shard], modality: str
) -> None:
    shard = drawn[modality]
    check_shard(shard)  # no patient in two splits
    assert shard.images.shape == (48, 32, 32, 3 if modality in COLOUR else 1)
    assert shard.images.dtype == np.uint8
    assert shard.classes == {modality: CLASSES[modality]}
    assert set(shard.modality.tolist()) == {MODALITIES.index(modality)}
    counts = np.bincount(shard.label)
    assert len(counts) == len(CLASSES[modality])
    assert len(set(counts.tolist())) == 1
    for patient in range(24):
        assert len(set(shard.label[shard.patient == patient].tolist())) == 1
    for split in ("train", "val", "test"):
        assert set(shard.label[shard.split == split].tolist()) == set(range(len(counts)))


def nearest_class_auroc(features: np.ndarray, label: np.ndarray, chosen: int) -> float:
    """Chance that an image of the class scores above one of another, by one feature, either way."""
    inner, outer = features[label == chosen], features[label != chosen]
    share = (inner[:, None] > outer).mean() + 0.5 * (inner[:, None] == outer).mean()
    return float(max(share, 1 - share))


@pytest.mark.parametrize("modality", MODALITIES)
def test_mean_brightness_does_not_tell_the_classes_apart(
    drawn: dict[str, Shard], modality: str
) -> None:
    shard = drawn[modality]
    mean = shard.images.mean(axis=(1, 2, 3))
    for label in range(len(CLASSES[modality])):
        assert nearest_class_auroc(mean, shard.label, label) < 0.85


@pytest.mark.parametrize("modality", MODALITIES)
def test_images_of_a_patient_differ_yet_resemble_each_other_most(
    drawn: dict[str, Shard], modality: str
) -> None:
    shard = drawn[modality]
    pixels = shard.images.reshape(48, -1).astype(float)
    pixels = (pixels - pixels.mean(1, keepdims=True)) / pixels.std(1, keepdims=True)
    alike = pixels @ pixels.T / pixels.shape[1]
    assert alike[np.arange(0, 48, 2), np.arange(1, 48, 2)].max() < 0.999
    own = alike[np.arange(0, 48, 2), np.arange(1, 48, 2)].mean()
    others = alike[np.triu_indices(48, 2)].mean()
    # Nuclei and turned lesions move too freely for pixels to match.
    assert own > others - (0.05 if modality in {"pathology", "dermatology"} else 0)


def test_several_processes_draw_the_pictures_that_one_draws(monkeypatch) -> None:
    alone = draw_pictures(5, px=16, seed=3)
    monkeypatch.setattr(core.phantoms, "WORTH_A_PROCESS", 10)
    monkeypatch.setattr(core.phantoms, "PART", 2)
    monkeypatch.setattr(core.phantoms.os, "sched_getaffinity", lambda _: {0, 1})
    shared = draw_pictures(5, px=16, seed=3)
    assert list(shared) == list(alone) == list(MODALITIES)
    for name, pictures in shared.items():
        shard = make_phantoms(name, patients=5, images_per_patient=1, px=16, seed=3)
        assert np.array_equal(pictures, shard.images)
        assert np.array_equal(pictures, alone[name])


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told on Linux alone")
def test_who_draws_ends_when_who_asked_is_killed(tmp_path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import core.phantoms as p\n"
        "if __name__ == '__main__':\n"
        "    p.os.sched_getaffinity = lambda _: {0, 1}\n"
        "    p.draw_pictures(100_000, px=64, seed=0)\n"
    )
    root = Path(__file__).parents[2]
    asking = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)}
    )
    try:
        _until(lambda: len(_children(asking.pid)) == 3)
        drawing = _children(asking.pid)
    finally:
        asking.kill()
        asking.wait()
    _until(lambda: not any(_runs(pid) for pid in drawing))


def _children(parent: int) -> list[int]:
    """Processes that it spawned: two that draw, and one that keeps count of semaphores."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected a modality of ct, .* found 'mri'"):
        make_phantoms("mri", patients=1, images_per_patient=1, px=32, seed=0)
    for wrong in ({"patients": 0}, {"images_per_patient": 0}, {"px": 8}, {"seed": -1}):
        with pytest.raises(UserError, match="phantoms need at least 1 patient"):
            make_phantoms(
                "ct", **{"patients": 1, "images_per_patient": 1, "px": 32, "seed": 0, **wrong}
            )


def test_a_disc_covers_its_area() -> None:
    canvas = new_canvas(64)
    covered = inside(ellipse(canvas, 0.1, -0.2, 0.5, 0.5), canvas.soft).sum()
    assert covered / 64**2 * 4 == pytest.approx(np.pi * 0.25, rel=0.01)


def test_blur_keeps_a_constant_and_spreads_a_point_as_a_gaussian() -> None:
    np.testing.assert_allclose(blur(np.full((16, 16), 0.3, np.float32), 2, 1), 0.3, rtol=1e-5)
    point = np.zeros((33, 33), np.float32)
    point[16, 16] = 1
    spread = blur(point, 2.0, 0.0)
    rows = np.arange(33) - 16
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread[:, 16] * rows**2).sum() == pytest.approx(4.0, rel=0.1)


def test_soft_noise_has_about_unit_deviation() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([soft_noise(rng, 32, 8, 8) for _ in range(50)])
    assert values.mean() == pytest.approx(0, abs=0.1)
    assert values.std() == pytest.approx(1, abs=0.2)
