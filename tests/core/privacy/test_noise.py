"""Randomness for privacy."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

from core.privacy.noise import PrivateRandom


def test_normal_draws_are_standard_normal_and_independent():
    draws = PrivateRandom().normal(200_001)
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    half = len(draws) // 2
    for lag in (1, half, half + 1):  # Box and Muller give pairs
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 0.02


def test_uniform_draws_fill_the_unit_interval():
    draws = PrivateRandom().uniform(100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-6


def test_no_seed_of_the_process_fixes_the_draws():
    found = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002  (what must have no effect)
        torch.manual_seed(0)
        found.append(PrivateRandom().normal(8))
    assert not np.isclose(found[0], found[1]).any()


def test_the_key_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(os, "urandom", lambda n: asked.append(n) or bytes(n))
    first, second = PrivateRandom().normal(8), PrivateRandom().normal(8)
    assert asked == [32, 32]
    assert (first == second).all()  # so nothing else entered
