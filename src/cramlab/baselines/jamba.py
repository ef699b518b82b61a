"""Jamba-like static interleaving: one layer of attention among seven of recurrence, whatever the input.

Source: Lieber et al., "Jamba", arXiv 2403.19887. Differs: no mixture of experts, and Mamba-2 instead of Mamba.
"""

from __future__ import annotations

from cramlab.baselines.recurrence import RecurrenceConfig
from cramlab.baselines.transformer import TransformerConfig
from cramlab.mixer import MixerConfig

N_LAYERS = 8
ATTENTION_LAYER = 4  # index of the attention layer, counted from 0, as published


def jamba() -> tuple[MixerConfig, ...]:
    """Configs of the mixers of eight layers."""
    return tuple(TransformerConfig() if layer == ATTENTION_LAYER else RecurrenceConfig() for layer in range(N_LAYERS))
