"""The cache of a CRAM language model: recurrent state and buffer of each layer, in transformers' `Cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionAndFullAttentionLayer

from cramlab.language_model.packed_rows import Past
from cramlab.memory import CRAMLayer, CRAMState
from cramlab.memory.decode import Decoder
from cramlab.memory.episodic import Buffer


class CRAMCacheLayer(LinearAttentionAndFullAttentionLayer):
    """One layer's state: the recurrence, and a buffer of keys and values of bounded size.

    Attributes:
        owner: name of the model that the state belongs to.
        state: the state; None before the first token, and while tokens come one at a time.
        decoder: holds the state while tokens come one at a time; else None.
        n_tokens: number of tokens seen, padding included.
        newest: newest valid token of each sequence, for a model with a table of bigrams, int64 (B,); held by the first
            layer; None in the others, before the first token and without a table.
        valid: false where these were padding, bool (B, up to `n_tokens`); later tokens were all valid. None: all were.
    """

    is_croppable = False  # type: ignore[assignment]

    def __init__(self, owner: str = "") -> None:
        super().__init__()
        self.owner = owner
        self.state: CRAMState | None = None
        self.decoder: Decoder | None = None
        self.n_tokens = 0
        self.newest: Tensor | None = None
        self.valid: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without a decoder, which refers to its layer: a copy must not copy weights."""
        self.take()
        return self.__dict__.copy()

    @property
    def n_rows(self) -> int | None:
        """Number of sequences; None before the first token."""
        working = self.decoder.working if self.decoder is not None else None if self.state is None else self.state[0]
        return None if working is None else len(working)

    @property
    def past(self) -> Past:
        """The tokens seen."""
        if self.valid is None or self.valid.shape[1] < self.n_tokens:
            return Past(self.n_tokens)
        return Past(self.n_tokens, ~self.valid.any(dim=1))

    def saw(self, valid: Tensor | None) -> None:
        """Records which of the next tokens are valid, bool (B, T); None: all are."""
        if valid is not None:
            n_rest = self.n_tokens - (0 if self.valid is None else self.valid.shape[1])
            before = [] if self.valid is None else [self.valid]
            self.valid = torch.cat([*before, valid.new_ones(len(valid), n_rest), valid], dim=1)

    def put(self, state: CRAMState, n_tokens: int) -> None:
        """Stores the state after another `n_tokens` tokens."""
        self.state, self.decoder, self.n_tokens = state, None, self.n_tokens + n_tokens
        self._show(state.buffer.keys, state.buffer.values)

    def take(self) -> CRAMState | None:
        """Returns the state, for a continuation by other means than `step`."""
        if self.decoder is not None:
            self.put(self.decoder.state(), 0)
        return self.state

    def step(self, layer: CRAMLayer, x: Tensor, gaps: Tensor) -> Tensor:
        """Mixes one more token in place: (B, 1, D) from x (B, 1, D) and gaps (B, 1)."""
        if self.decoder is None:
            assert self.state is not None
            self.decoder, self.state = Decoder(layer, self.state), None
        y = self.decoder.step(x[:, 0], gaps[:, 0])
        self.n_tokens += 1
        self._show(self.decoder.ring.keys, self.decoder.ring.values)
        return y[:, None]

    def _show(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.device, self.dtype, self.is_initialized = keys.device, keys.dtype, True

    def get_seq_length(self) -> int:
        """Number of tokens seen; the buffer may hold fewer entries."""
        return self.n_tokens

    def get_max_length(self) -> int:
        """Returns -1: the context is unbounded, whatever the capacity of the buffer."""
        return -1

    def reset(self) -> None:
        """Removes the state."""
        self.state, self.decoder, self.n_tokens, self.valid, self.newest = None, None, 0, None, None
        self.keys, self.values, self.is_initialized = None, None, False

    def _select(self, rows: Tensor) -> None:
        state = self.take()
        if state is not None:
            rows = rows.to(state.working.device)
            buffer = Buffer(*(part.index_select(0, rows) for part in state.buffer))
            self.put(CRAMState(working=state.working.index_select(0, rows), buffer=buffer), 0)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows.to(self.valid.device))
        if self.newest is not None:
            self.newest = self.newest.index_select(0, rows.to(self.newest.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces each row by a copy of the row that its beam continues."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows with these indices."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        state = self.take()
        if state is not None:
            self._select(torch.arange(len(state.working)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to remove tokens.

        Raises:
            NotImplementedError: unless there is nothing to remove: the state is a sum over all tokens, and evicted
                entries are gone.
        """
        if tokens_to_remove and self.n_tokens:
            raise NotImplementedError(
                f"cannot remove {abs(tokens_to_remove)} tokens: the recurrent state is a sum over all tokens seen, and "
                "entries that the buffer has evicted are gone; run the shorter context again"
            )


def new_cache(owner: str, n_layers: int) -> Cache:
    """An empty cache for a model."""
    return Cache(layers=[CRAMCacheLayer(owner) for _ in range(n_layers)])


def checked_cache(cache: Any, owner: str, n_layers: int, n_batch: int) -> Cache:
    """The caller's cache, checked.

    An empty `Cache` or `DynamicCache` gets layers of our kind, so that the caller's object holds the state.

    Args:
        cache: the cache that the caller gave.
        owner: name of the model.
        n_layers: number of layers of the model.
        n_batch: number of sequences of the call.

    Raises:
        ValueError: for a cache of another kind, model or number of sequences.
    """
    first = cache.layers[0] if isinstance(cache, Cache) and len(cache.layers) == n_layers else None
    if isinstance(first, CRAMCacheLayer) and first.owner == owner and first.n_rows == n_batch:
        return cache  # the usual case in decoding
    kind = type(cache).__name__
    ours = isinstance(cache, Cache) and bool(cache.layers) and all(isinstance(x, CRAMCacheLayer) for x in cache.layers)
    if not ours and not (type(cache) in (Cache, DynamicCache) and not cache.offloading):
        raise ValueError(
            f"past_key_values is a {kind}{' that offloads' if getattr(cache, 'offloading', False) else ''}, which "
            "cannot hold a recurrent state; leave it out, or give an empty transformers.DynamicCache()"
        )
    layers: Any = cache.layers
    empty = all(x.n_tokens == 0 if isinstance(x, CRAMCacheLayer) else not x.get_seq_length() for x in layers)
    if not ours and not empty:
        raise ValueError(
            f"past_key_values is a {kind} that another model has filled; give an empty transformers.DynamicCache()"
        )
    if empty and (not ours or len(layers) != n_layers or layers[0].owner != owner):
        cache.layers, cache.layer_class_to_replicate = new_cache(owner, n_layers).layers, None
        return cache
    if len(layers) != n_layers or layers[0].owner != owner:
        raise ValueError(
            f"past_key_values holds the state of another model ({len(layers)} layers); give one that this model filled"
        )
    n_rows = layers[0].n_rows
    if n_rows not in (None, n_batch):
        raise ValueError(
            f"past_key_values holds {n_rows} sequences, but the input has {n_batch}; continue the same ones, "
            "or select rows with past_key_values.batch_select_indices"
        )
    return cache
