"""Views of drawn patients."""

import dataclasses

import numpy as np
import pytest
import torch

from core.augment import draws_per_image, make_views
from core.config import ViewsConfig
from core.phantoms import make_phantoms
from core.privacy.noise import PrivateRandom
from core.privacy.sampling import Patients
from core.privacy.views import patient_views, stacks
from core.shards import Shard

CONFIG = ViewsConfig(global_px=16, local_px=8, local_views=2, blur_probability=(0.5, 0.1, 0.5))
CPU = torch.device("cpu")


def shard(modality: str, key: str, images: int = 2, patients: int = 12) -> Shard:
    drawn = make_phantoms(modality, patients=patients, images_per_patient=images, px=16, seed=1)
    keys = [f"{key}{number}".encode() for number in range(patients)]
    return dataclasses.replace(drawn, keys=np.array(keys))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_views_of_an_image_do_not_change_when_another_is_removed(channels: int) -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, channels, 16, 16), generator=draws, dtype=torch.uint8)
    rows = torch.rand(6, draws_per_image(CONFIG), generator=draws)
    every = make_views(images, "us", CONFIG, rows)
    for removed in range(6):
        kept = [image for image in range(6) if image != removed]
        left = make_views(images[kept], "us", CONFIG, rows[kept])
        assert torch.equal(left.global_VBCHW, every.global_VBCHW[:, kept])
        assert torch.equal(left.local_VBCHW, every.local_VBCHW[:, kept])


def test_a_row_of_draws_is_used_up_and_every_draw_counts() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=draws, dtype=torch.uint8)
    certain = CONFIG.model_copy(
        update={
            "jitter_probability": 1.0,
            "blur_probability": (1.0, 1.0, 1.0),
            "blur_sigma": (5, 9),
        }
    )
    rows = torch.full((1, draws_per_image(certain)), 0.3)
    before = make_views(images, "us", certain, rows)
    certainties = {place for place in range(rows.shape[1]) if place % 13 in (6, 11)}
    for place in set(range(rows.shape[1])) - certainties:
        changed = rows.clone()
        changed[0, place] = 0.8
        after = make_views(images, "us", certain, changed)
        same = torch.equal(before.global_VBCHW, after.global_VBCHW) and torch.equal(
            before.local_VBCHW, after.local_VBCHW
        )
        assert not same, place
    with pytest.raises(RuntimeError, match="invalid for input"):
        make_views(images, "us", certain, rows[:, :-1])


def test_stacks_hold_every_drawn_patient_once_and_only_like_images() -> None:
    patients = Patients([shard("us", "a"), shard("pathology", "a"), shard("us", "b", 1)])
    drawn = [patients.images_of(number)[:3] for number in range(len(patients))]
    seen: list[list[int]] = []
    for kinds, stack in stacks(patients, drawn, 4):
        assert len(stack) <= 4
        for images in stack:
            assert tuple(patients.kind_of(int(image)) for image in images) == kinds
            seen.append(sorted(images.tolist()))
    assert sorted(seen) == sorted(sorted(images.tolist()) for images in drawn)


def test_the_views_of_a_patient_have_an_axis_for_its_images() -> None:
    patients = Patients([shard("us", "a"), shard("pathology", "a")])
    drawn = [patients.images_of(number)[1:4] for number in range(5)]
    kinds, stack = next(iter(stacks(patients, drawn, 8)))
    large, small = patient_views(patients, kinds, stack, CONFIG, PrivateRandom(), CPU)
    assert large.shape == (5, 2, 3, 3, 16, 16)
    assert small.shape == (5, 2, 3, 3, 8, 8)


def test_a_recipe_without_local_views_has_none() -> None:
    patients = Patients([shard("us", "a")])
    config = CONFIG.model_copy(update={"local_views": 0})
    ((kinds, stack),) = stacks(patients, [patients.images_of(0)], 8)
    _, small = patient_views(patients, kinds, stack, config, PrivateRandom(), CPU)
    assert small.shape == (1, 0, 2, 3, 8, 8)
