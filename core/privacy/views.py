"""The drawn patients of a step in stacks of equal shape, and their views."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.augment import draws_per_image, make_views
from core.config import ViewsConfig
from core.modalities import MODALITIES
from core.privacy.noise import PrivateRandom
from core.privacy.sampling import Kind, Patients, Rows


def stacks(
    patients: Patients, drawn: Sequence[Rows], size: int
) -> Iterator[tuple[tuple[Kind, ...], list[Rows]]]:
    """Cut the drawn patients into stacks of at most `size` with the same kinds of images.

    Yields:
        The kinds of a patient's images, and the images of each patient in that order.
    """
    alike: dict[tuple[Kind, ...], list[Rows]] = defaultdict(list)
    for images in drawn:
        kinds = [patients.kind_of(int(image)) for image in images]
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        alike[tuple(kinds[place] for place in order)].append(images[order])
    for key in sorted(alike):
        for start in range(0, len(alike[key]), size):
            yield key, alike[key][start : start + size]


def patient_views(
    patients: Patients,
    kinds: Sequence[Kind],
    stack: Sequence[Rows],
    config: ViewsConfig,
    random: PrivateRandom,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Views of a stack of patients.

    Args:
        patients: of the site.
        kinds: of a patient's m images, from `stacks`.
        stack: n patients' images, from `stacks`.
        config: sizes and strengths.
        random: the source of all draws, `draws_per_image` of its own for each image.
        device: where the views are made.

    Returns:
        Global views [n, 2, m, 3, P, P] and local views [n, L, m, 3, p, p].

    **Guarantees**: a patient's views are a function of its images and of draws for these alone.
    """
    global_views, local_views = [], []
    for place, (modality, _) in enumerate(kinds):
        pixels = np.stack([patients.pixels_of(int(images[place])) for images in stack])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        draws = random.uniform(len(stack) * draws_per_image(config)).reshape(len(stack), -1)
        views = make_views(images, MODALITIES[modality], config, torch.from_numpy(draws))
        global_views.append(views.global_VBCHW)
        local_views.append(views.local_VBCHW)
    # [V, n, m, 3, H, W] -> [n, V, m, 3, H, W]
    return torch.stack(global_views, 2).transpose(0, 1), torch.stack(local_views, 2).transpose(0, 1)
