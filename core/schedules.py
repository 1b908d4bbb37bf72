"""Schedules as pure functions of the global step; the server uses them too, so no torch here.

A step counts from 0 over the whole study, not over a round, so that a site that joins late or
resumes follows the same curves.
"""

import math

from core.config import Recipe


def _progress(step: int, first: int, last: int) -> float:
    """Position of `step` between two steps, in [0, 1]."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up from 0, then a cosine to the final rate; scaled with batch_size / 256.

    Under record-mode privacy a step's images are `privacy.expected_patients` patients instead.
    """
    optim, privacy = recipe.optim, recipe.privacy
    size = privacy.expected_patients if privacy.mode == "record" else optim.batch_size
    peak = optim.learning_rate * size / 256
    warmup_steps = round(optim.warmup * recipe.total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = _progress(step, warmup_steps, recipe.total_steps - 1)
    return _cosine(peak, optim.final_learning_rate, progress)


def weight_decay(recipe: Recipe, step: int) -> float:
    """Cosine from the first to the last value."""
    start, end = recipe.optim.weight_decay
    return _cosine(start, end, _progress(step, 0, recipe.total_steps - 1))


def ema_momentum(recipe: Recipe, step: int) -> float:
    """Weight of the old teacher, rising to 1 by a cosine."""
    return _cosine(recipe.optim.ema_momentum, 1.0, _progress(step, 0, recipe.total_steps))


def teacher_temperature(recipe: Recipe, step: int) -> float:
    """Linear from the first to the last value over the warm-up, then constant."""
    start, end = recipe.loss.teacher_temperature
    steps = round(recipe.loss.temperature_warmup * recipe.total_steps)
    return start + (end - start) * (_progress(step, 0, steps) if steps else 1.0)
