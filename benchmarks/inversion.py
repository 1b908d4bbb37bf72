"""Gradient inversion: what the coordinator reads of an image in one answer of a site.

A patch token is W x_t + b + pos_t, so that pos_t's gradient d_t is the token's, and W's gradient is
sum_t d_t x_t'. With no more tokens than the network is wide the x_t follow by least squares,
whatever lies behind (Lu et al., APRIL, CVPR 2022). Several views, or images, in one gradient add
their d_t up: then the equations are too few. `attacks.py` runs this and explains the rows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.augment import make_views
from core.backbone import Network
from core.config import Recipe
from core.import_npz import read_npz
from core.initial import initial_state
from core.losses import centre, consistency_loss, random_blocks
from core.modalities import MEAN_STD, MODALITIES
from core.privacy.noise import PrivateRandom
from core.privacy.step import PrivateOptimizer
from core.randomness import torch_generator
from core.schedules import teacher_temperature
from core.shards import Shard
from core.site_data import SiteData
from core.site_round import site_round
from core.step import TrainState
from core.train import load_network, new_state

Floats = NDArray[np.float64]
Gradient = dict[str, Tensor]
POSITION, PATCH = "backbone.pos_embed", "backbone.patch_embed.proj.weight"
FILES = ("ct_mednist*", "cxr_nih*", "derm_ham*", "us_busi*")
IMAGES = 5
"""Of each file."""
SIGMA = CLIP = 1.0
ADAM_EPSILON = 1e-8
SITE = "site"


@dataclass(frozen=True)
class Case:
    """One image, or the eight that begin with it, and the views that a row's step made of them."""

    shard: Shard
    modality: str
    recipe: Recipe


Attack = Callable[[Case], tuple[Gradient, Tensor]]
"""From a case to a gradient as the coordinator sees it, and the views that went into it."""


def cases(data: Path, recipe: Recipe, images: int) -> Iterator[Case]:
    """Small shards of `images` training images."""
    for pattern in FILES:
        (path,) = sorted((data).glob(pattern))[:1]
        shard = read_npz(path)
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(shard.split == "train"))
        for start in range(0, IMAGES * images, images):
            rows = chosen[start : start + images]
            names = ("images", "modality", "patient", "label", "split")
            part = {name: getattr(shard, name)[rows] for name in names}
            yield Case(
                dataclasses.replace(shard, **part), MODALITIES[shard.modality[rows[0]]], recipe
            )


def one_gradient(case: Case, views: str) -> tuple[Gradient, Tensor]:
    """Gradient of the loss of the case's first image at the initial weights, and its views.

    Args:
        case: the image.
        views: 'one': the student sees one global view; 'all': all views, as in training.

    Returns:
        The gradient by name, and the global views [U, 3, P, P] that went in.
    """
    recipe, modality = case.recipe, MODALITIES.index(case.modality)
    state = _start(recipe)
    pixels = torch.from_numpy(np.array(case.shard.images[:1])).permute(0, 3, 1, 2)
    draws = torch_generator(recipe.seed, SITE, "step", 0, case.modality)
    made = make_views(pixels, case.modality, recipe.views, draws)
    with torch.no_grad():
        teacher = state.teacher(made.global_VBCHW[:, 0])[:, None]  # [2, 1, D]
    if views == "one":
        student, seen = state.student(made.global_VBCHW[0])[None], made.global_VBCHW[:1, 0]
        teacher = teacher[1:].expand(2, -1, -1)  # the first is never compared with itself
    else:
        student, seen = state.student(made.global_VBCHW[:, 0])[:, None], made.global_VBCHW[:, 0]
        local = state.student(made.local_VBCHW[:, 0])[:, None]
        student = torch.cat([student, local])
    memory = state.bank.embeddings[modality]
    blocks = random_blocks(len(memory), recipe.memory.blocks, draws)
    if recipe.memory.centred:
        mean = state.bank.mean(modality)
        student, teacher, memory = (centre(e, mean) for e in (student, teacher, memory))
    loss, _ = consistency_loss(
        student, teacher, memory, blocks,
        recipe.loss.student_temperature, teacher_temperature(recipe, 0),
    )  # fmt: skip
    names, parameters = zip(*state.student.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True)), seen


def adamw(gradient: Gradient, recipe: Recipe, clip: float) -> Gradient:
    """What the coordinator makes of a first AdamW step on a clipped gradient, from float32 weights.

    The step is g / (|g| + 1e-8): the sign of g, unless g was clipped to less than 1e-8. Then it is
    as good as g.
    """
    network, seen = Network.of(recipe), {}
    load_network(network, initial_state(recipe).student)
    rate = recipe.optim.learning_rate
    for name, parameter in network.named_parameters():
        if name not in (POSITION, PATCH):
            continue
        before = parameter.detach().double().clone()
        norm = gradient[name].norm()
        parameter.grad = gradient[name] * (clip / norm.clamp(min=clip))
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0, eps=ADAM_EPSILON).step()
        step = ((before - parameter.detach().double()) / rate).clamp(-1 + 1e-9, 1 - 1e-9)
        seen[name] = ADAM_EPSILON * step / (1 - step.abs())
    return seen


def noised(gradient: Gradient) -> Gradient:
    """What record mode sends at best: a step with this one patient, plain descent at rate 1."""
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in gradient.items()}
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        parameters,
        noise_multiplier=SIGMA,
        clip_norm=CLIP,
        expected_patients=1,
        random=PrivateRandom(),
    )
    optimizer.add({name: g[None] for name, g in gradient.items()})
    optimizer.step()
    return {name: -parameter.detach() for name, parameter in parameters.items()}


def a_round(case: Case) -> tuple[Gradient, Tensor]:
    """A whole answer of a site, read as if it were one gradient, and the views that went in."""
    recipe, before = case.recipe, initial_state(case.recipe)
    update, _ = site_round(
        recipe, before, [case.shard], {}, site=SITE, first_step=0, device="cpu"
    )  # fmt: skip
    data, seen = SiteData([case.shard]), []
    for step in range(recipe.federation.local_steps):
        (batch,) = data.batches(recipe, SITE, step)
        draws = torch_generator(recipe.seed, SITE, "step", step, case.modality)
        views = make_views(batch.images[:], case.modality, recipe.views, draws)
        seen.append(views.global_VBCHW.flatten(0, 1))
    names = (POSITION, PATCH)
    return {n: torch.from_numpy(before.student[n] - update.student[n]) for n in names}, torch.cat(
        seen
    )


def recover(gradient: Gradient, patch_px: int) -> Floats:
    """The image [3, P, P] by least squares; its brightness and contrast are left open."""
    position = gradient[POSITION][0, 1:].double().numpy()  # [N, d], without the class token's
    weight = gradient[PATCH].flatten(1).double().numpy()  # [d, 3 p p]
    patches = np.linalg.lstsq(position.T, weight, rcond=None)[0]  # [N, 3 p p]
    side = int(len(patches) ** 0.5)
    grid = patches.reshape(side, side, 3, patch_px, patch_px).transpose(2, 0, 3, 1, 4)
    return grid.reshape(3, side * patch_px, side * patch_px)


def likeness(image: Floats, views: Tensor, modality: str) -> tuple[float, float, Floats, Floats]:
    """PSNR in decibels after the best brightness and contrast, for the view that fits best.

    Returns:
        It, the same of a plain grey picture, that view and the fitted image, both [3, P, P] in
        [0, 1].
    """
    mean, std = (np.array(v)[:, None, None] for v in MEAN_STD[modality])
    fits = []
    for view in views.double().numpy():
        design = np.stack([image.ravel(), np.ones(image.size)], axis=1)
        fitted = (design @ np.linalg.lstsq(design, view.ravel(), rcond=None)[0]).reshape(view.shape)
        plain = float((((view - view.mean()) * std) ** 2).mean())
        error = float((((fitted - view) * std) ** 2).mean())
        fits.append((_decibel(error), _decibel(plain), view * std + mean, fitted * std + mean))
    return max(fits, key=lambda fit: fit[0] - fit[1])


def sheet(path: Path, rows: list[list[tuple[Floats, Floats]]]) -> None:
    """A picture of pairs, what went in beside what was recovered; a row of pairs for each row."""
    lines = [np.concatenate([np.concatenate(p, axis=2) for p in row], axis=2) for row in rows]
    picture = (np.clip(np.concatenate(lines, axis=1), 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(picture.transpose(1, 2, 0))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def rows(recipe: Recipe, eight: Recipe, round_of: Recipe) -> dict[str, tuple[Recipe, int, Attack]]:
    """The rows of the table: recipe, images in the answer, and how the gradient is seen."""
    clip = recipe.optim.clip_norm

    def after(change: Callable[[Gradient], Gradient]) -> Attack:
        def attack(case: Case) -> tuple[Gradient, Tensor]:
            gradient, seen = one_gradient(case, "one")
            return change(gradient), seen

        return attack

    return {
        "one image, one view, plain gradient": (recipe, 1, after(lambda g: g)),
        "the same through a step of AdamW": (recipe, 1, after(lambda g: adamw(g, recipe, clip))),
        "the same, clip_norm = 1e-10, which recipes may not have": (
            recipe, 1, after(lambda g: adamw(g, recipe, 1e-10)),
        ),
        "one image, all its views, plain gradient": (
            recipe, 1, lambda case: one_gradient(case, "all"),
        ),
        "eight images, all views, a step of AdamW": (eight, 8, a_round),
        "eight images, a round of 20 steps": (round_of, 8, a_round),
        "record mode: one image, one view, noise 1": (recipe, 1, after(noised)),
    }  # fmt: skip


def _start(recipe: Recipe) -> TrainState:
    state, before = new_state(recipe, torch.device("cpu"), SITE), initial_state(recipe)
    load_network(state.student, before.student)
    load_network(state.teacher, before.teacher)
    return state


def _decibel(error: float) -> float:
    return -10 * float(np.log10(max(error, 1e-30)))
