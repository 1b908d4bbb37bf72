"""The audit against our own private training, as it is and broken in every way we know."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

import core.private_round
from core.privacy import step
from core.privacy.audit import AS_SENT, REPLAYED
from core.privacy.canaries import audit, train_on_canaries
from core.privacy.config import PrivacyConfig
from core.privacy.noise import PrivateRandom
from core.privacy.unit import together

PRIVACY = PrivacyConfig(mode="record", noise_multiplier=2.6, chunk=512)
CANARIES, STEPS = 1000, 2
CLAIMED = math.sqrt(STEPS) / PRIVACY.noise_multiplier


def run(privacy=PRIVACY):
    return audit(privacy, canaries=CANARIES, steps=STEPS)


def without_noise(optimizer):
    for parameter in optimizer.params:
        parameter.grad = parameter.summed_grad.clone()


def noise_of(monkeypatch, scale):
    """Noise whose deviation is the right one times scale(optimizer)."""

    def add_noise(optimizer):
        for parameter in optimizer.params:
            noise = torch.from_numpy(optimizer._random.normal(parameter.numel())).float()
            deviation = optimizer.noise_multiplier * optimizer.max_grad_norm * scale(optimizer)
            parameter.grad = parameter.summed_grad + deviation * noise

    monkeypatch.setattr(step._Noisy, "add_noise", add_noise)


@pytest.mark.parametrize("gradients", ["vmap", "loop"])
def test_a_canary_moves_its_own_weights_by_one_clip_a_step_and_no_others(monkeypatch, gradients):
    monkeypatch.setattr(step._Noisy, "add_noise", without_noise)
    privacy = PRIVACY.model_copy(update={"clip_norm": 0.5, "gradients": gradients})
    member = np.arange(40) % 3 == 0
    scores = train_on_canaries(privacy, member, steps=2, device="cpu")
    # A clip of .5 over four tensors is .25 on each: 1 in all, twice.
    np.testing.assert_allclose(scores, 2.0 * member, rtol=1e-4)


def test_correct_code_passes_in_20_of_20_runs():
    verdicts = [run() for _ in range(20)]
    assert not any(verdict.flagged for verdict in verdicts)
    assert all(verdict.conclusive for verdict in verdicts)
    assert np.mean([verdict.found_gap for verdict in verdicts]) == pytest.approx(CLAIMED, abs=0.06)
    assert min(verdict.found_epsilon for verdict in verdicts) > 0.1  # it does attack


def test_missing_noise_is_flagged(monkeypatch):
    monkeypatch.setattr(step._Noisy, "add_noise", without_noise)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.found_gap == math.inf


def test_noise_divided_by_the_root_of_the_batch_is_flagged(monkeypatch):
    noise_of(monkeypatch, lambda optimizer: optimizer.expected_batch_size**-0.5)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.gap_flagged


def test_a_known_key_is_flagged_by_the_second_run(monkeypatch):
    tosses = PrivateRandom().uniform(CANARIES)

    def known_key(self):
        self._stream = Cipher(ChaCha20(bytes(32), bytes(16)), mode=None).encryptor()

    monkeypatch.setattr(PrivateRandom, "__init__", known_key)
    assert not np.array_equal(PrivateRandom().uniform(CANARIES), tosses)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.exposed_by == REPLAYED


def test_noise_from_a_seeded_generator_is_flagged_by_the_second_run(monkeypatch):
    normal = lambda self, count: torch.randn(count).double().numpy()  # noqa: E731
    monkeypatch.setattr(PrivateRandom, "normal", normal)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.exposed_by == REPLAYED


def test_missing_clip_is_flagged(monkeypatch):
    def add_up(optimizer):
        for parameter in optimizer.params:
            total = parameter.grad_sample.sum(0)
            held = parameter.summed_grad
            parameter.summed_grad = total if held is None else held + total

    monkeypatch.setattr(step._Noisy, "clip_and_accumulate", add_up)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.exposed_by == AS_SENT


def test_a_clip_for_each_crop_is_flagged(monkeypatch):
    def crops_apart(loss, parameters, large, small, teacher):
        parts = [together(loss, parameters, large, crop, teacher) for crop in small.split(1, dim=1)]
        gradients = {name: torch.cat([g[name] for g, _ in parts]) for name in parameters}
        return gradients, torch.cat([losses for _, losses in parts])

    monkeypatch.setattr(core.private_round, "together", crops_apart)
    verdict = run()
    assert verdict.bound_flagged
    assert verdict.found_gap == pytest.approx(4 * CLAIMED, rel=0.15)


def test_a_clip_for_each_tensor_is_flagged(monkeypatch):
    def clip_each(optimizer):
        for parameter in optimizer.params:
            rows = parameter.grad_sample.flatten(1)
            scale = optimizer.max_grad_norm / rows.norm(dim=1).clamp(min=optimizer.max_grad_norm)
            total = scale @ rows
            held = parameter.summed_grad
            parameter.summed_grad = total if held is None else held + total

    monkeypatch.setattr(step._Noisy, "clip_and_accumulate", clip_each)
    assert run().gap_flagged


def test_half_the_noise_is_flagged_by_the_gap(monkeypatch):
    noise_of(monkeypatch, lambda optimizer: 0.5)
    assert run().gap_flagged
