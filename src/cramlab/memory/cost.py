"""FLOPs and bytes of a CRAM layer, computed from its sizes. Tests compare them with a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cramlab.memory.delta import DeltaMemory
from cramlab.memory.episodic import EpisodicMemory
from cramlab.memory.router import RouterConfig
from cramlab.memory.semantic import SemanticMemory
from cramlab.memory.working import NoWorkingMemory, WorkingMemory
from cramlab.mixer import Cost, Path
from cramlab.ops.read.windows import tiles


class CostedLayer(NamedTuple):
    """The parts of a CRAM layer that have a cost.

    Attributes:
        d_model: width of the layer.
        working: the working memory.
        episodic: the episodic memory.
        semantic: the semantic memory.
        router: sizes of the router.
        window: number of entries that every token attends to; None: there is no window.
        parameter_bytes: size of all parameters.
    """

    d_model: int
    working: WorkingMemory | DeltaMemory | NoWorkingMemory
    episodic: EpisodicMemory
    semantic: SemanticMemory
    router: RouterConfig
    window: int | None
    parameter_bytes: int


def cram_cost(layer: CostedLayer, seq_len: int, *, read_frac: float, write_frac: float, training: bool) -> Cost:
    """Cost of one sequence. Only matrix products count; norms, activations, gathers and scans are memory-bound.

    Args:
        layer: the parts of the layer.
        seq_len: number of tokens.
        read_frac: share of the tokens scored for any reason, including audits, evenly spread.
        write_frac: share of the tokens written, evenly spread. Taken as 1 unless a gate decides on writes.
        training: forward and backward in training mode, with the consolidation loss and the labels of the write gate
            (as many tokens ask as read). Backward costs twice the forward pass, or once where the input needs no
            gradient. For scores in tiles it costs 2.5 times, as it computes them again. A fused kernel, used for few
            readers and slots or for all of them, computes them again too, which is not counted.
    """
    d, capacity = layer.d_model, layer.episodic.config.capacity
    write_frac = 1.0 if layer.episodic.salience is None else write_frac
    read_frac = 1.0 if layer.router.name == "gumbel" else read_frac
    n_reads, n_writes = read_frac * seq_len, write_frac * seq_len
    full, half = (3, 2) if training else (1, 1)  # factors with and without a gradient to the input
    unused = n_reads == seq_len and layer.router.name != "gumbel"  # f_sem is computed, but without gradient
    answers = 1 if unused else full
    parts = {
        "working memory": seq_len * layer.working.product_flops(d, full, half),
        "semantic memory": seq_len * layer.semantic.product_flops(d, answers, answers),
        "read gate": seq_len * _router(layer, full, half),
        "write gate": 0.0,
        "keys and values": full * 2 * 2 * d * d * n_writes,
        "queries and output": full * 2 * 2 * d * d * n_reads,
        "scores": 2 * 2 * d * _pairs(layer, n_reads, n_writes, training),
    }
    if layer.episodic.salience is not None:
        hidden = layer.episodic.salience.d_hidden
        parts["write gate"] = seq_len * 2.0 * hidden * (half * d + full)
        if training:
            parts["write gate's labels"] = 2 * d * n_reads * (d + n_writes)
    if layer.window is not None:
        pairs = _spread_pairs(seq_len, n_writes, min(layer.window, n_writes), training=training and not unused)
        parts["window"] = answers * 2 * 2 * d * d * seq_len + 2 * 2 * d * pairs
    if training:
        parts["consolidation"] = n_reads * layer.semantic.product_flops(d, half, full)
    read_flops = parts["queries and output"] + parts["scores"]
    held = n_writes if capacity is None else min(n_writes, capacity)
    return Cost(
        projection_flops=sum(parts.values()) - read_flops,
        read_flops=read_flops,
        state_bytes=4 * layer.working.state_size + round(held) * (2 * d * 4 + 4 + 1) + 8,
        reads=n_reads,
        parameter_bytes=layer.parameter_bytes,
        parts=parts,
    )


def _router(layer: CostedLayer, full: int, half: int) -> float:
    """FLOPs of the router per token."""
    d, router = layer.d_model, layer.router
    if router.name == "gumbel":
        # Its inputs are x and scalars, of which the size of the state carries a gradient.
        return float(full * 2 * (d + (4 + len(Path)) * router.d_hidden))
    if router.name != "benefit":
        return 0.0
    d_in = d + layer.semantic.rank + (0 if layer.window is None else d)
    return float(2 * router.d_hidden * (half * d_in + full))


def _pairs(layer: CostedLayer, n_reads: float, n_writes: float, training: bool) -> float:
    """Number of query-key pairs that are scored; in training, multiplied to include the backward pass."""
    if not n_reads or not round(n_writes):
        return 0.0
    capacity = layer.episodic.config.capacity
    bound = n_writes if capacity is None else min(capacity, n_writes)
    if n_reads >= n_writes and layer.episodic.salience is None:  # all read: the causal half, or a mask over all slots
        return (3 if training else 1) * n_reads * ((n_writes + 1) / 2 if bound == n_writes else n_writes)
    return _spread_pairs(n_reads, n_writes, bound, training=training)


def _spread_pairs(n_reads: float, n_writes: float, bound: float, *, training: bool) -> float:
    """`_pairs` of readers spread evenly, each of which sees the newest `bound` entries."""
    if not round(n_writes):
        return 0.0
    count = max(1, round(n_reads))
    last = [int(n_writes * (reader + 0.5) / count) for reader in range(count)]
    first = [max(0, place - round(bound) + 1) for place in last]
    found = [tile.n_pairs for tile in tiles(first, last)]
    return (1 if not training else 3 if len(found) == 1 else 3.5) * sum(found) * n_reads / count


def break_even_length(
    ours: Callable[[int], float], theirs: Callable[[int], float], *, longest: int = 1 << 24
) -> int | None:
    """The least length, to 1%, from which `ours` costs no more than `theirs`; None if it exceeds `longest`.

    Both map a length to a cost, and `theirs` grows faster.
    """
    high = 1
    while ours(high) > theirs(high):
        high *= 2
        if high > longest:
            return None
    low = high // 2  # ours costs more there, or it is 0
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if ours(middle) > theirs(middle) else (low, middle)
    return high
