import pytest

from core.config import Recipe
from core.privacy.config import PrivacyConfig
from core.schedules import ema_momentum, learning_rate, teacher_temperature, weight_decay

RECIPE = Recipe.model_validate_json(
    '{"federation": {"rounds": 10, "local_steps": 10}, "loss": {"temperature_warmup": 0.5},'
    ' "optim": {"batch_size": 128, "learning_rate": 0.004, "warmup": 0.1, "ema_momentum": 0.9}}'
)


def test_learning_rate_warms_up_to_the_scaled_peak_and_falls_by_a_cosine() -> None:
    assert learning_rate(RECIPE, 0) == pytest.approx(0.0002)
    assert learning_rate(RECIPE, 9) == pytest.approx(0.002)
    assert learning_rate(RECIPE, 10) == pytest.approx(0.002)
    assert learning_rate(RECIPE, 99) == pytest.approx(1e-6)


def test_under_record_privacy_the_rate_is_scaled_by_the_expected_patients() -> None:
    private = RECIPE.model_copy(
        update={"privacy": PrivacyConfig(mode="record", expected_patients=512)}
    )
    assert learning_rate(private, 9) == pytest.approx(0.008)


def test_weight_decay_rises_from_first_to_last_value() -> None:
    assert weight_decay(RECIPE, 0) == pytest.approx(0.04)
    assert weight_decay(RECIPE, 99) == pytest.approx(0.4)


def test_momentum_rises_to_one_and_a_teacher_frozen_from_the_start_stays_frozen() -> None:
    assert ema_momentum(RECIPE, 0) == pytest.approx(0.9)
    assert ema_momentum(RECIPE, 50) == pytest.approx(0.95)
    assert ema_momentum(RECIPE, 100) == pytest.approx(1.0)
    frozen = RECIPE.model_copy(
        update={"optim": RECIPE.optim.model_copy(update={"ema_momentum": 1.0})}
    )
    assert all(ema_momentum(frozen, step) == 1.0 for step in range(100))


def test_teacher_temperature_rises_over_the_warm_up_only() -> None:
    assert teacher_temperature(RECIPE, 0) == pytest.approx(0.02)
    assert teacher_temperature(RECIPE, 25) == pytest.approx(0.025)
    assert teacher_temperature(RECIPE, 80) == pytest.approx(0.03)
