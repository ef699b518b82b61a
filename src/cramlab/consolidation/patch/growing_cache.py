"""A cache layer that appends in place, so that decoding does not copy the keys and values of all earlier tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with a buffer that grows by half when it is full; the parent copies all entries at every token.

    `keys` and `values` are views of the filled part of the buffer. While gradients are recorded it copies like its
    parent, as the graph may hold what would be overwritten.
    """

    _buffer: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values, (B, H, T, D) each; returns all that the layer holds."""
        if torch.is_grad_enabled():
            self._buffer = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self._fits(total):
            pairs = ((self.keys, key_states), (self.values, value_states))
            keys, values = (self._grown(old, new, held, total) for old, new in pairs)
            self._buffer = keys, values
        assert self._buffer is not None
        for buffer, new in zip(self._buffer, (key_states, value_states), strict=True):
            buffer[:, :, held:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffer)
        return self.keys, self.values

    def _fits(self, total: int) -> bool:
        """Whether `keys` is a view of the buffer (other code may have replaced it) and the buffer is large enough."""
        if self._buffer is None or self.keys is None or self.keys.numel() == 0:
            return False
        if self._buffer[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids writing to it outside inference mode
        return (
            self.keys.data_ptr() == self._buffer[0].data_ptr()
            and total <= self._buffer[0].shape[2]
            and (self.keys.shape[0] == self._buffer[0].shape[0])
        )

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor, held: int, total: int) -> Tensor:
        buffer = new.new_zeros(*new.shape[:2], max(64, total + total // 2), new.shape[3])
        if held:
            assert old is not None
            buffer[:, :, :held] = old
        return buffer


def let_grow(cache: Any) -> None:
    """Replaces the plain layers of a cache by growing ones with the same contents; skips offloaded caches."""
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder with cross-attention
    if not isinstance(cache, Cache) or cache.offloading:  # an offloaded layer moves its whole buffer
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            grown = GrowingLayer()
            for name, value in vars(layer).items():
                setattr(grown, name, value)
            cache.layers[i] = grown
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
