"""A check that all baselines with attention make."""

from __future__ import annotations


def check_heads(n_heads: int, d_model: int) -> None:
    """Raises `ValueError` if the heads cannot share the width equally."""
    if d_model % n_heads:
        raise ValueError(
            f"model.mixer.n_heads = {n_heads} does not divide model.d_model = {d_model}; change one of them"
        )
