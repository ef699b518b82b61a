"""Longer experiments than a command of `cramlab` runs: each writes records under `results/`."""
