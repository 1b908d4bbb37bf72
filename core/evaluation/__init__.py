"""Measuring a model: metrics with intervals, baselines, stability, report."""
