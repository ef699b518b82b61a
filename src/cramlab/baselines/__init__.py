"""Other mixers under the same contract, one file each."""

from cramlab.baselines.transformer import CausalAttention, TransformerConfig

__all__ = ["CausalAttention", "TransformerConfig"]
