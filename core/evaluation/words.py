"""Figures of results.json in words: signs, intervals, p-values, names of metrics and methods."""

import math
from typing import Any

from core.evaluation.types import Interval

METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier",
    "ece": "ECE",
}
METHODS = {
    "probe": "linear probe",
    "knn20": "20 nearest neighbours",
    "knn11": "11 nearest neighbours",
    "finetune": "full fine-tuning",
}
"""In the order in which a report shows them; the first one found carries the headline."""
MISSING = "\N{EN DASH}"


def as_interval(value: Any) -> Interval | None:
    """An interval from a JSON object, from a bare number, or None."""
    if isinstance(value, dict):
        point, low, high = (value.get(key) for key in ("value", "low", "high"))
        if point is None:
            return None
        return Interval(point, *(math.nan if x is None else x for x in (low, high)))
    return None if value is None else Interval(float(value), math.nan, math.nan)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return (
        (text[1:] if float(text) == 0 else "\N{MINUS SIGN}" + text[1:])
        if text.startswith("-")
        else text
    )


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    text = number(value)
    return text if value is None or value < 0 or float(f"{value:.3f}") == 0 else f"+{text}"


def span(interval: Interval | None, *, sign: bool = False) -> str:
    """The bounds of an interval, or nothing."""
    if interval is None or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    write = signed if sign else number
    return f"{write(interval.low)} to {write(interval.high)}"


def p_value(value: float | None) -> str:
    """A p-value as one writes it."""
    return MISSING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
