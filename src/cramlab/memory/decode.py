"""One token at a time, in place: a CRAM layer as it decodes, without what only training and analysis need.

`Decoder` computes what the gates ask for and nothing else, for which it waits for their decisions; `GraphDecoder` never
waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.memory.episodic import Buffer
from cramlab.ops.read import fused as fused_read

if TYPE_CHECKING:
    from cramlab.memory.layer import CRAMLayer, CRAMState

_GROWTH = 256  # places added at a time, until the capacity is reached


class Ring:
    """The buffer of a decoder: places that are overwritten, the oldest first, once `capacity` of them are in use.

    Holds at most `capacity * (2 D + 1)` numbers a sequence, and up to `_GROWTH` places more than it needs before that.
    Each sequence fills its places at its own pace. Attention does not care about the order of places.
    """

    def __init__(self, buffer: Buffer, capacity: int | None) -> None:
        self.capacity = capacity
        filled, n_held = buffer.filled, buffer.filled.sum(dim=1)
        self.n_written: list[int] = n_held.tolist()
        self.clock = buffer.times.new_zeros(len(filled))  # since the ring was made
        n_places = self._rounded(max(self.n_written, default=0))
        self.keys = buffer.keys.new_zeros(len(filled), n_places, buffer.keys.shape[-1])
        self.values, self.written_at = torch.zeros_like(self.keys), self.clock.new_zeros(len(filled), n_places)
        for b, n in enumerate(self.n_written):
            row = filled[b]
            self.keys[b, :n], self.values[b, :n] = buffer.keys[b, row], buffer.values[b, row]
            self.written_at[b, :n] = -buffer.times[b, row]

    def _rounded(self, n_places: int) -> int:
        n_places = -(-n_places // _GROWTH) * _GROWTH
        return n_places if self.capacity is None else min(n_places, self.capacity)

    def held(self, row: int) -> int:
        """Entries of a sequence."""
        return min(self.n_written[row], self.keys.shape[1])

    def put(self, row: int, key: Tensor, value: Tensor) -> None:
        """Writes an entry, each part (D,), over the oldest one when the ring is full."""
        n, n_places = self.n_written[row], self.keys.shape[1]
        if n >= n_places and n_places != self.capacity:
            more = self._rounded(n + 1) - n_places
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
            self.written_at = F.pad(self.written_at, (0, more))
        place = n % self.keys.shape[1]
        self.keys[row, place], self.values[row, place] = key, value
        self.written_at[row, place] = self.clock[row]
        self.n_written[row] = n + 1

    def buffer(self) -> Buffer:
        """A copy, oldest first and empty places in front, as `EpisodicMemory` keeps them."""
        n_most = max((self.held(b) for b in range(len(self.keys))), default=0)
        keys, values = (t.new_zeros(len(t), n_most, t.shape[-1]) for t in (self.keys, self.values))
        times = self.written_at.new_zeros(len(keys), n_most)
        filled = torch.zeros_like(times, dtype=torch.bool)
        for b, n in enumerate(self.n_written):
            held, n_places = self.held(b), self.keys.shape[1]
            order = torch.arange(n - held, n, device=keys.device) % max(1, n_places)
            here = slice(n_most - held, n_most)
            keys[b, here], values[b, here], filled[b, here] = self.keys[b, order], self.values[b, order], True
            times[b, here] = self.clock[b] - self.written_at[b, order]
        return Buffer(keys=keys, values=values, times=times, filled=filled)

    @property
    def n_bytes(self) -> int:
        """Held, all sequences and all parts together."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.written_at, self.clock))


class Decoder:
    """Steps of one layer in evaluation mode; equal to calling the layer with one token after another."""

    def __init__(self, layer: CRAMLayer, state: CRAMState) -> None:
        """Takes over from `state`, of which it keeps a copy.

        Raises:
            ValueError: for a router that decodes nothing on its own: `gumbel`, `oracle`, `random`.
        """
        _check_decides_alone(layer)
        self.layer, self.working = layer, state.working
        self.ring = Ring(state.buffer, layer.config.episodic.capacity)

    @torch.no_grad()
    def step(self, x: Tensor, gaps: Tensor) -> Tensor:
        """The next token of each sequence, (B, D), given x (B, D) and the time since the token before, (B,)."""
        layer, ring = self.layer, self.ring
        episodic, name = layer.episodic, layer.config.router.name
        working, _, self.working = layer.working(x[:, None], gaps[:, None], self.working)
        working = working[:, 0]
        h = layer.norm(working)
        ring.clock += gaps
        rows = list(range(len(h))) if episodic.salience is None else _true(episodic.salience(h))
        if rows:
            chosen = _rows(h, rows)
            for row, key, value in zip(rows, episodic.w_key(chosen), episodic.w_value(chosen), strict=True):
                ring.put(row, key, value)
        recognised = layer.semantic.recognise(h)
        if name == "never":
            readers = []
        else:
            asking = range(len(h)) if name == "always" else _true(layer.gate(h, recognised))
            readers = [row for row in asking if ring.held(row)]
        if len(readers) == len(h):
            return working + self._read(h, readers)
        y = working + layer.semantic.answer(recognised)
        if readers:
            y[readers] = working[readers] + self._read(h[readers], readers)
        return y

    def _read(self, h: Tensor, readers: list[int]) -> Tensor:
        """Eq. 3 for some sequences, (R, D), given their h, (R, D)."""
        episodic, heads, found = self.layer.episodic, (self.layer.config.episodic.n_heads, -1), []
        for row, query in zip(readers, episodic.w_query(h), strict=True):
            held = self.ring.held(row)
            q = query.unflatten(-1, heads)[:, None]  # (H, 1, E)
            k, v = (t[row, :held].unflatten(-1, heads).transpose(0, 1) for t in (self.ring.keys, self.ring.values))
            found.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0].flatten())
        return episodic.w_out(torch.stack(found))

    def state(self) -> CRAMState:
        """For the layer's own call, as a copy."""
        from cramlab.memory.layer import CRAMState

        return CRAMState(working=self.working, buffer=self.ring.buffer())

    @property
    def n_bytes(self) -> int:
        """Of state, all sequences together."""
        return self.working.numel() * self.working.element_size() + self.ring.n_bytes


class GraphDecoder:
    """Steps of one layer whose decisions stay on the device, so that a CUDA graph can record one; equal to `Decoder`.

    The ring has all its places from the start. Keys and answers are computed for every token and dropped where the
    gates say so; the fused kernel fetches no entry for a token that does not read. Source: ours.
    """

    def __init__(self, layer: CRAMLayer, state: CRAMState) -> None:
        """Takes over from `state`, of which it keeps a copy.

        Raises:
            ValueError: for a router that decodes nothing on its own, and for a buffer without a bound.
        """
        _check_decides_alone(layer)
        capacity = layer.config.episodic.capacity
        if capacity is None:
            raise ValueError("episodic.capacity = None has no bound, which a recorded step needs; set one")
        self.layer, self.capacity, self.working = layer, capacity, state.working.clone()
        ring = Ring(state.buffer, capacity)
        more = capacity + 1 - ring.keys.shape[1]  # one place more, for what is not written
        self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (ring.keys, ring.values))
        self.n_written = torch.tensor(ring.n_written, device=self.keys.device)
        self.row = torch.arange(len(self.keys), device=self.keys.device)

    @torch.no_grad()
    def step(self, x: Tensor, gaps: Tensor) -> Tensor:
        """As `Decoder.step`; changes the state in place."""
        layer, episodic, name = self.layer, self.layer.episodic, self.layer.config.router.name
        working, _, state = layer.working(x[:, None], gaps[:, None], self.working)
        self.working.copy_(state)
        working = working[:, 0]
        h = layer.norm(working)
        if episodic.salience is None:
            place, writes = self.n_written % self.capacity, 1
        else:
            writes = episodic.salience(h) > 0
            place = torch.where(writes, self.n_written % self.capacity, self.capacity)
        self.keys[self.row, place], self.values[self.row, place] = episodic.w_key(h), episodic.w_value(h)
        self.n_written += writes
        recognised = layer.semantic.recognise(h)
        answer = layer.semantic.answer(recognised)
        if name == "never":
            return working + answer
        last = self.n_written.clamp(max=self.capacity) - 1  # -1: nothing to read
        if name == "benefit":
            last = torch.where(layer.gate(h, recognised) > 0, last, -1)
        return working + torch.where(last[:, None] >= 0, self._read(h, last), answer)

    def _read(self, h: Tensor, last: Tensor) -> Tensor:
        """Eq. 3, (B, D), of the places up to `last`, (B,); anything where that is -1."""
        episodic, n_heads = self.layer.episodic, self.layer.config.episodic.n_heads
        q, last = episodic.w_query(h)[:, None], last[:, None]
        if fused_read.usable(q, n_heads):
            return episodic.w_out(fused_read.attend(q, last, self.keys, self.values, None, n_heads, None)[:, 0])
        q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (q, self.keys, self.values))
        visible = torch.arange(k.shape[2], device=h.device) <= last  # (B, S)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
        return episodic.w_out(found.transpose(1, 2).flatten(1))


def _check_decides_alone(layer: CRAMLayer) -> None:
    name = layer.config.router.name
    if name not in ("benefit", "always", "never"):
        raise ValueError(f'router "{name}" does not decide by a token alone; call the layer with its state')


def _true(logits: Tensor) -> list[int]:
    """The rows (B,) that a gate lets pass."""
    return [row for row, logit in enumerate(logits.tolist()) if logit > 0]


def _rows(entries: Tensor, rows: list[int]) -> Tensor:
    """Some rows of (B, D); as they are when all are meant."""
    return entries if len(rows) == len(entries) else entries[rows]
