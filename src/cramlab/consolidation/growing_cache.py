"""A cache layer that writes new tokens in place, so that a token which does not read the far past does not copy it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """As `DynamicLayer`, which copies all it holds at every token; here the room doubles when it is used up.

    `keys` and `values` are views of the room, as long as what they hold. While gradients are recorded it copies like
    its parent, as a graph may hold what would be written over.
    """

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) each; returns all that is held."""
        if torch.is_grad_enabled():
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self._fits(total):
            pairs = ((self.keys, key_states), (self.values, value_states))
            keys, values = (self._grown(old, new, held, total) for old, new in pairs)
            self._room = keys, values
        assert self._room is not None
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, held:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._room)
        return self.keys, self.values

    def _fits(self, total: int) -> bool:
        """Whether the room is the one that `keys` looks into (others replace it), and large enough."""
        if self._room is None or self.keys is None or self.keys.numel() == 0:
            return False
        if self._room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # it must not be written to
        return (
            self.keys.data_ptr() == self._room[0].data_ptr()
            and total <= self._room[0].shape[2]
            and (self.keys.shape[0] == self._room[0].shape[0])
        )

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor, held: int, total: int) -> Tensor:
        room = new.new_zeros(*new.shape[:2], max(64, total + total // 2), new.shape[3])
        if held:
            assert old is not None
            room[:, :, :held] = old
        return room


def let_grow(cache: Any) -> None:
    """Replaces the plain layers of a cache by growing ones, unless they are offloaded; takes along what they hold."""
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder with cross-attention
    if not isinstance(cache, Cache) or cache.offloading:  # whose layers leave the device, with all their room
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            grown = GrowingLayer()
            for name, value in vars(layer).items():
                setattr(grown, name, value)
            cache.layers[i] = grown
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
