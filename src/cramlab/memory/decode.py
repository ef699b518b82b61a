"""Decoding with a CRAM layer: one token at a time, in place, without the parts that only training and analysis need.

`Decoder` waits for the decisions of the gates and computes only the reads and writes that they open for. `GraphDecoder`
never waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from cramlab.memory.buffer import Buffer
from cramlab.memory.layer import CRAMLayer, CRAMState, weighed
from cramlab.memory.window import window_step
from cramlab.ops.read import attention

_GROWTH = 256  # slots added at a time, until the capacity is reached


class Ring:
    """The buffer of a decoder. When `capacity` slots are in use, a new entry overwrites the oldest.

    Holds at most `capacity * (2 D + 1)` numbers per sequence, and before that at most `_GROWTH` slots more than it
    needs. Each sequence fills its slots at its own pace. The order of slots does not matter to attention.
    """

    def __init__(self, buffer: Buffer, capacity: int | None) -> None:
        self.capacity = capacity
        filled, n_held = buffer.filled, buffer.filled.sum(dim=1)
        self.n_written: list[int] = buffer.n_written.tolist()
        self.clock = buffer.times.new_zeros(len(filled))  # time since the ring was made, (B,)
        n_places = self._rounded(int(n_held.max()) if len(n_held) else 0)
        self.keys = buffer.keys.new_zeros(len(filled), n_places, buffer.keys.shape[-1])
        self.values, self.written_at = torch.zeros_like(self.keys), self.clock.new_zeros(len(filled), n_places)
        for b in range(len(filled)):
            row, place = filled[b], self._order(b)
            self.keys[b, place], self.values[b, place] = buffer.keys[b, row], buffer.values[b, row]
            self.written_at[b, place] = -buffer.times[b, row]

    def _rounded(self, n_places: int) -> int:
        n_places = -(-n_places // _GROWTH) * _GROWTH
        return n_places if self.capacity is None else min(n_places, self.capacity)

    def _order(self, row: int) -> Tensor:
        """Slots of a sequence's entries, oldest first."""
        n, n_places = self.n_written[row], self.keys.shape[1]
        return torch.arange(n - self.held(row), n, device=self.keys.device) % max(1, n_places)

    def held(self, row: int) -> int:
        """Number of entries of a sequence."""
        return min(self.n_written[row], self.keys.shape[1])

    def put(self, rows: list[int], keys: Tensor, values: Tensor) -> None:
        """Writes an entry of each of some sequences, keys (R, D) and values (R, D), over its oldest if it is full."""
        n_places, n_most = self.keys.shape[1], max(self.n_written[row] for row in rows)
        if n_most >= n_places and n_places != self.capacity:
            more = self._rounded(n_most + 1) - n_places
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
            self.written_at = F.pad(self.written_at, (0, more))
        places = [self.n_written[row] % self.keys.shape[1] for row in rows]
        if len(rows) == len(self.keys) and len(set(places)) == 1:  # one write for all sequences
            self.keys[:, places[0]], self.values[:, places[0]] = keys, values
            self.written_at[:, places[0]] = self.clock
        else:
            for row, place, key, value in zip(rows, places, keys, values, strict=True):
                self.keys[row, place], self.values[row, place] = key, value
                self.written_at[row, place] = self.clock[row]
        for row in rows:
            self.n_written[row] += 1

    def buffer(self) -> Buffer:
        """A copy as `EpisodicMemory` keeps it: oldest entry first, empty slots in front."""
        n_most = max((self.held(b) for b in range(len(self.keys))), default=0)
        keys, values = (t.new_zeros(len(t), n_most, t.shape[-1]) for t in (self.keys, self.values))
        times = self.written_at.new_zeros(len(keys), n_most)
        filled = torch.zeros_like(times, dtype=torch.bool)
        for b in range(len(keys)):
            order, here = self._order(b), slice(n_most - self.held(b), n_most)
            keys[b, here], values[b, here], filled[b, here] = self.keys[b, order], self.values[b, order], True
            times[b, here] = self.clock[b] - self.written_at[b, order]
        return Buffer(keys=keys, values=values, times=times, filled=filled, n_written=self.counts())

    def counts(self) -> Tensor:
        """Number of entries that each sequence has written, evicted ones included, int64 (B,)."""
        return torch.tensor(self.n_written, dtype=torch.int64, device=self.keys.device)

    @property
    def n_bytes(self) -> int:
        """Size in bytes, of all sequences together."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.written_at, self.clock))


class LayerDecoder(ABC):
    """Decoding steps of one layer in evaluation mode; equal to calling the layer with one token after another."""

    def __init__(self, layer: CRAMLayer, state: CRAMState) -> None:
        """Starts from a copy of `state`.

        Raises:
            ValueError: for a router that cannot decide from one token alone: `gumbel`, `oracle`, `random`.
        """
        name = layer.config.router.name
        if name not in ("benefit", "always", "never"):
            raise ValueError(f'router "{name}" cannot decide from one token alone; call the layer with its state')
        self.layer, self.working = layer, state.working

    @abstractmethod
    def step(self, x: Tensor, gaps: Tensor) -> Tensor:
        """Output for the next token of each sequence, (B, D), from x (B, D) and the time since the last token, (B,)."""


@final
class Decoder(LayerDecoder):
    """Projects and scores only the tokens that the gates choose, and waits for their decisions."""

    def __init__(self, layer: CRAMLayer, state: CRAMState) -> None:
        super().__init__(layer, state)
        self.ring = Ring(state.buffer, layer.config.episodic.capacity)

    @torch.no_grad()
    def step(self, x: Tensor, gaps: Tensor) -> Tensor:
        """Implements `LayerDecoder.step`."""
        layer, ring = self.layer, self.ring
        episodic = layer.episodic
        working, _, self.working = layer.working(x[:, None], gaps[:, None], self.working)
        working = working[:, 0]
        h = layer.norm(working)
        ring.clock += gaps
        position = ring.counts() if episodic.config.rope else None
        rows = list(range(len(h))) if episodic.salience is None else _true(episodic.salience(h))
        if rows:
            chosen, place = _rows(h, rows), None if position is None else _rows(position, rows)
            ring.put(rows, episodic.keys(chosen, place), episodic.w_value(chosen))
        recognised = layer.semantic.recognise(h)
        nearby, window = None, layer.config.window
        if window is not None:
            nearby = window_step(episodic, h, position, ring.keys, ring.values, ring.counts(), window)
        readers, weight = self._readers(h, recognised, nearby)
        if len(readers) == len(h) and weight is None:
            return working + self._read(h, position, readers)
        answer = layer.semantic.answer(recognised)
        answer = answer if nearby is None else answer + nearby
        y = working + answer
        if readers:
            which = torch.tensor(readers, device=h.device)
            found = self._read(h, position, readers)
            if weight is not None:
                found = weighed(answer.index_select(0, which), found, weight.index_select(0, which))
            y.index_copy_(0, which, (working.index_select(0, which) + found).to(y.dtype))
        return y

    def _readers(self, h: Tensor, recognised: Tensor, nearby: Tensor | None) -> tuple[list[int], Tensor | None]:
        """The sequences whose token reads, and the weight of each sequence's read, (B,); None: 1."""
        layer, name = self.layer, self.layer.config.router.name
        if name == "never":
            return [], None
        if name == "always":
            return [row for row in range(len(h)) if self.ring.held(row)], None
        margin = layer.gate_margin(h, recognised, nearby)
        readers = [row for row in _true(margin) if self.ring.held(row)]
        return readers, layer.gate.weight(margin, margin > 0)

    def _read(self, h: Tensor, position: Tensor | None, readers: list[int]) -> Tensor:
        """Eq. 3 for some sequences, (R, D), given the h (B, D) and positions (B,) of all."""
        episodic, ring, found = self.layer.episodic, self.ring, []
        queries = episodic.queries(_rows(h, readers), None if position is None else _rows(position, readers))
        held = {ring.held(row) for row in readers}
        if len(held) == 1 and len(readers) == len(ring.keys):  # all sequences at once, and no entry is copied
            (n,) = held
            answer = attention.dense(queries[:, None], ring.keys[:, :n], ring.values[:, :n], episodic.config.n_heads)
            return episodic.w_out(answer[:, 0])
        for row, query in zip(readers, queries, strict=True):
            keys, values = (t[row : row + 1, : ring.held(row)] for t in (ring.keys, ring.values))
            found.append(attention.dense(query[None, None], keys, values, episodic.config.n_heads)[0, 0])
        return episodic.w_out(torch.stack(found))

    def state(self) -> CRAMState:
        """A copy of the state, for calling the layer itself."""
        return CRAMState(working=self.working, buffer=self.ring.buffer())

    @property
    def n_bytes(self) -> int:
        """Size of the state in bytes, of all sequences together."""
        return self.working.numel() * self.working.element_size() + self.ring.n_bytes


@final
class GraphDecoder(LayerDecoder):
    """Leaves all decisions on the device, so that a CUDA graph can record a step.

    The ring has all its slots from the start. Keys and outputs of the semantic memory are computed for every token and
    dropped where the gates decide against them; the fused kernel loads no entry for a token that does not read. Source:
    ours.
    """

    def __init__(self, layer: CRAMLayer, state: CRAMState) -> None:
        """Starts from a copy of `state`.

        Raises:
            ValueError: for a router as in `LayerDecoder`, and for a buffer without a capacity.
        """
        super().__init__(layer, state)
        capacity = layer.config.episodic.capacity
        if capacity is None:
            raise ValueError("episodic.capacity = None is unbounded, but a recorded step needs a bound; set a capacity")
        self.capacity, self.working = capacity, state.working.clone()
        ring = Ring(state.buffer, capacity)
        more = capacity + 1 - ring.keys.shape[1]  # one more slot receives entries that are not written
        self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (ring.keys, ring.values))
        self.n_written = ring.counts()
        self.row = torch.arange(len(self.keys), device=self.keys.device)

    @torch.no_grad()
    def step(self, x: Tensor, gaps: Tensor) -> Tensor:
        """Implements `LayerDecoder.step`. Changes the state in place."""
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
        position = self.n_written.clone() if episodic.config.rope else None
        self.keys[self.row, place], self.values[self.row, place] = episodic.keys(h, position), episodic.w_value(h)
        self.n_written += writes
        recognised = layer.semantic.recognise(h)
        answer = layer.semantic.answer(recognised)
        nearby, window = None, layer.config.window
        if window is not None:
            keys, values = (t[:, : self.capacity] for t in (self.keys, self.values))
            nearby = window_step(episodic, h, position, keys, values, self.n_written, window)
            answer = answer + nearby
        if name == "never":
            return working + answer
        last = self.n_written.clamp(max=self.capacity) - 1  # -1: nothing to read
        weight = None
        if name == "benefit":
            margin = layer.gate_margin(h, recognised, nearby)
            last, weight = torch.where(margin > 0, last, -1), layer.gate.weight(margin, margin > 0)
        q, n_heads = episodic.queries(h, position)[:, None], episodic.config.n_heads
        found = attention.attend(q, last[:, None], self.keys, self.values, None, n_heads, None)
        read = episodic.w_out(found[:, 0])
        read = read if weight is None else weighed(answer, read, weight)
        return working + torch.where(last[:, None] >= 0, read, answer)


def _true(logits: Tensor) -> list[int]:
    """The rows (B,) whose logit is positive."""
    return [row for row, logit in enumerate(logits.tolist()) if logit > 0]


def _rows(entries: Tensor, rows: list[int]) -> Tensor:
    """Some rows of (B, ...), without a copy if these are all."""
    return entries if len(rows) == len(entries) else entries[rows]
