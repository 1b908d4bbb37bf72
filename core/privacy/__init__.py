"""Differential privacy: what a study may ask, noise, accounting, ledger, private training."""
