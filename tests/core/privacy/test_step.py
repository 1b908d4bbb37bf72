"""One noisy step."""

import numpy as np
import pytest
import torch

from core.privacy.noise import PrivateRandom
from core.privacy.step import PrivateOptimizer

CLIP, SIGMA, DIVISOR = 2.0, 1.5, 8


class Silent(PrivateRandom):
    """Noise of nought, to see what is beneath it."""

    def normal(self, count: int):
        return np.zeros(count)


def parameters() -> dict[str, torch.nn.Parameter]:
    return {"a": torch.nn.Parameter(torch.zeros(60, 50)), "b": torch.nn.Parameter(torch.zeros(1))}


def optimizer(held, *, random=None, learner=None) -> PrivateOptimizer:
    return PrivateOptimizer(
        learner or torch.optim.SGD(held.values(), lr=1.0), held, noise_multiplier=SIGMA,
        clip_norm=CLIP, expected_patients=DIVISOR, random=random or PrivateRandom(),
    )  # fmt: skip


def gradients(count: int, size: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"a": (60, 50), "b": (1,)}
    return {n: size * torch.randn(count, *s, generator=draws) for n, s in shapes.items()}


@pytest.mark.parametrize("patients", [0, 5])
def test_the_noise_of_a_step_without_gradient_has_the_stated_deviation(patients: int) -> None:
    held = parameters()
    step = optimizer(held)
    if patients:
        step.add(gradients(patients, 0.0))
    step.step()
    moved = torch.cat([p.detach().flatten() for p in held.values()])  # minus noise over the divisor
    assert float(moved.std()) == pytest.approx(SIGMA * CLIP / DIVISOR, rel=0.05)
    assert abs(float(moved.mean())) < 5 * SIGMA * CLIP / DIVISOR / len(moved) ** 0.5


def test_a_long_gradient_is_cut_over_all_parameters_together_and_a_short_one_is_not() -> None:
    held = parameters()
    step = optimizer(held, random=Silent())
    step.add(gradients(1, 100.0))
    step.step()
    length = torch.cat([p.detach().flatten() for p in held.values()]).norm()
    assert float(length) == pytest.approx(CLIP / DIVISOR, rel=1e-5)
    held = parameters()
    step = optimizer(held, random=Silent())
    step.add(gradients(1, 1e-3))
    step.step()
    torch.testing.assert_close(held["a"].detach(), -gradients(1, 1e-3)["a"][0] / DIVISOR)


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 2, 3], [6, 1]])
def test_in_how_many_parts_the_patients_come_makes_no_difference(sizes: list[int]) -> None:
    found = []
    for cut in ([7], sizes):
        held = parameters()
        step = optimizer(held, random=Silent())
        for parts in zip(*(g.split(cut) for g in gradients(7).values()), strict=True):
            step.add(dict(zip(held, parts, strict=True)))
        step.step()
        found.append(held["a"].detach().clone())
    torch.testing.assert_close(*found)


def test_the_sum_begins_anew_after_a_step() -> None:
    held = parameters()
    step = optimizer(held, random=Silent())
    step.add(gradients(3))
    step.step()
    after_one = held["a"].detach().clone()
    step.step()
    assert torch.equal(held["a"].detach(), after_one)
    step.add(gradients(3))
    step.step()
    torch.testing.assert_close(held["a"].detach(), 2 * after_one)


def test_the_divisor_is_the_same_whatever_the_number_of_patients() -> None:
    lengths = []
    for count in (1, 4):
        held = parameters()
        step = optimizer(held, random=Silent())
        step.add({name: g.repeat(count, *[1] * (g.ndim - 1)) for name, g in gradients(1).items()})
        step.step()
        lengths.append(float(held["a"].detach().norm()))
    assert lengths[1] == pytest.approx(4 * lengths[0], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_with_a_value_that_is_not_finite_is_left_out_whole(value: float) -> None:
    found = []
    for spoilt in (False, True):
        held = parameters()
        step = optimizer(held, random=Silent())
        given = gradients(3)
        if spoilt:
            given = {name: torch.cat([g, g[:1]]) for name, g in given.items()}
            given["b"][3, 0] = value
        step.add(given)
        step.step()
        found.append(held["a"].detach().clone())
    torch.testing.assert_close(*found)


def test_an_empty_step_is_a_step_of_the_optimiser() -> None:
    held = parameters()
    learner = torch.optim.AdamW(held.values(), lr=0.1)
    step = optimizer(held, learner=learner)
    for _ in range(3):
        step.step()
    assert {int(state["step"]) for state in learner.state.values()} == {3}


def test_neither_the_seed_of_the_process_nor_the_site_fixes_the_noise() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  (what must have no effect)
        held = parameters()
        optimizer(held).step()
        found.append(held["a"].detach().flatten())
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.1


def test_the_noise_of_two_steps_is_independent() -> None:
    held = parameters()
    step = optimizer(held)
    step.step()
    first = held["a"].detach().flatten().clone()
    step.step()
    second = held["a"].detach().flatten() - first
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


def test_parameters_that_do_not_learn_neither_move_nor_decay() -> None:
    held = parameters()
    frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    learner = torch.optim.AdamW([*held.values(), frozen], lr=0.1, weight_decay=0.5)
    step = optimizer(held, learner=learner)
    step.add(gradients(2))
    step.step()
    assert torch.equal(frozen, torch.ones(4))
