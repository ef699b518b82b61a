"""What a CRAM layer computes and holds: arithmetic over its matrix products, checked by tests against a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cramlab.mixer import Cost, Path
from cramlab.ops.read.windows import tiles

if TYPE_CHECKING:
    from cramlab.memory.layer import CRAMLayer


def cram_cost(layer: CRAMLayer, seq_len: int, *, read_frac: float, write_frac: float, training: bool) -> Cost:
    """Cost of one sequence, matrix products only: norms, activations, gathers and the scan are bytes, not FLOPs.

    Args:
        layer: for its config and parameters.
        seq_len: tokens.
        read_frac: share of them scored for any reason, audits included; evenly spread.
        write_frac: share of them written; evenly spread. Taken as 1 unless a gate decides on writes.
        training: forward and backward in training mode, with the consolidation loss and the labels of the write gate
            (for which as many tokens ask as read). Backward takes twice the forward, once where the input needs no
            gradient; that of scores in tiles two and a half times, as it computes them again. A fused kernel, which
            serves few readers and places, or all of them, does so too, and is not charged for it.
    """
    d, config = layer.d_model, layer.config
    write_frac = 1.0 if layer.episodic.salience is None else write_frac
    read_frac = 1.0 if config.router.name == "gumbel" else read_frac
    n_reads, n_writes = read_frac * seq_len, write_frac * seq_len
    full, half = (3, 2) if training else (1, 1)  # with and without a gradient to the input
    unused = n_reads == seq_len and config.router.name != "gumbel"  # the semantic answers: measured all the same
    answers = 1 if unused else full
    parts = {
        "working memory": _working(layer, seq_len, full, half),
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
    if training:
        parts["consolidation"] = n_reads * layer.semantic.product_flops(d, half, full)
    read_flops = parts["queries and output"] + parts["scores"]
    held = n_writes if config.episodic.capacity is None else min(n_writes, config.episodic.capacity)
    return Cost(
        projection_flops=sum(parts.values()) - read_flops,
        read_flops=read_flops,
        state_bytes=4 * (config.working.d_state if config.working else 0) + round(held) * (2 * d * 4 + 4 + 1),
        reads=n_reads,
        parameter_bytes=sum(p.numel() * p.element_size() for p in layer.parameters()),
        parts=parts,
    )


def _working(layer: CRAMLayer, seq_len: int, full: int, half: int) -> float:
    work, d = layer.config.working, layer.d_model
    if work is None:
        return 0.0
    a_token = full * 2 * d * work.d_state * 2  # in and out
    if work.refine_steps:
        a_token += full * 2 * work.d_state * (d + work.refine_steps * work.d_state) + half * 2 * work.d_state
    return float(a_token * seq_len)


def _router(layer: CRAMLayer, full: int, half: int) -> float:
    """A token."""
    d, router = layer.d_model, layer.config.router
    if router.name == "gumbel":
        # As a bystander of the loss in Eq. 8: its inputs are x, and numbers of which the sizes carry a gradient.
        return float(full * 2 * (d + (4 + len(Path)) * router.d_hidden))
    if router.name != "benefit":
        return 0.0
    return float(2 * router.d_hidden * (half * (d + layer.semantic.rank) + full))


def _pairs(layer: CRAMLayer, n_reads: float, n_writes: float, training: bool) -> float:
    """Reader and place, scored together, when reads and writes are evenly spread; times what training costs more."""
    if not n_reads or not round(n_writes):
        return 0.0
    capacity = layer.config.episodic.capacity
    bound = n_writes if capacity is None else min(capacity, n_writes)
    if n_reads >= n_writes and layer.episodic.salience is None:  # everybody: the causal half, or a mask over all
        return (3 if training else 1) * n_reads * ((n_writes + 1) / 2 if bound == n_writes else n_writes)
    count = max(1, round(n_reads))
    last = [int(n_writes * (reader + 0.5) / count) for reader in range(count)]
    first = [max(0, place - round(bound) + 1) for place in last]
    found = [tile.n_pairs for tile in tiles(first, last)]
    return (1 if not training else 3 if len(found) == 1 else 3.5) * sum(found) * n_reads / count


def break_even_length(
    ours: Callable[[int], float], theirs: Callable[[int], float], *, longest: int = 1 << 24
) -> int | None:
    """The least length, to 1%, from which `ours` costs no more than `theirs`; None if there is none up to `longest`.

    Both are costs by length, and theirs grows the faster.
    """
    high = 1
    while ours(high) > theirs(high):
        high *= 2
        if high > longest:
            return None
    low = high // 2  # ours is dearer there, or it is 0
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if ours(middle) > theirs(middle) else (low, middle)
    return high
