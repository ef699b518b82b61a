# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of decoding behind a gate.

A program processes the query heads of one KV head of one sequence. Arrays are (B, H, width) for queries and heads, (B,
H / G, S, width) for keys and values, all contiguous; positions are int64 (B,).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes change from buffer to buffer, so no kernel is compiled for a particular one.
_SIZES = ["window", "n_sinks", "n_groups", "shared", "n_places", "n_splits", "n_heads"]


@triton.jit
def _scored(asked, keys, values, begin, stop, scale, width: tl.constexpr, block_g: tl.constexpr, block_s: tl.constexpr):
    """Softmax of queries (G, width) over the keys [begin, stop): largest score, total of weights, weighted sum."""
    channel = tl.arange(0, width)
    most = tl.full([block_g], float("-inf"), tl.float32)
    total = tl.zeros([block_g], tl.float32)
    answer = tl.zeros([block_g, width], tl.float32)
    for start in range(begin, stop, block_s):
        place = start + tl.arange(0, block_s)
        inside = place < stop
        at = place.to(tl.int64)[:, None] * width + channel[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_most = tl.maximum(most, tl.max(score, axis=1))  # finite: the first key of a block is inside
        weight = tl.exp(score - new_most[:, None])
        fade = tl.exp(most - new_most)
        total = total * fade + tl.sum(weight, axis=1)
        answer = answer * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = new_most
    return most, total, answer


@triton.jit
def _log_sum(most, total):
    """Log-sum-exp of scores; -1e30 without any."""
    return tl.where(total > 0, most + tl.log(tl.where(total > 0, total, 1.0)), -1e30)


@triton.jit(do_not_specialize=_SIZES)
def near(
    q, keys, values, first, end, heads, masses, window, n_sinks, scale, n_groups, shared, n_places,
    width: tl.constexpr, block_g: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Attention to window and first keys, and the log-sum-exp of either."""
    row = tl.program_id(0)
    b, group = row // n_groups, row % n_groups
    n_heads = n_groups * shared
    begin = tl.load(first + b).to(tl.int32)
    stop = tl.load(end + b).to(tl.int32)
    head = tl.arange(0, block_g)
    real = head < shared
    at = (row * shared + head)[:, None] * width + tl.arange(0, width)[None, :]
    asked = tl.load(q + at, mask=real[:, None], other=0.0)
    base = row.to(tl.int64) * n_places * width
    middle = tl.minimum(begin + n_sinks, stop)
    recent = tl.maximum(middle, stop - window)
    sink_most, sink_total, sink_answer = _scored(
        asked, keys + base, values + base, begin, middle, scale, width, block_g, block_s
    )
    most, total, answer = _scored(asked, keys + base, values + base, recent, stop, scale, width, block_g, block_s)
    mass, sink_mass = _log_sum(most, total), _log_sum(sink_most, sink_total)
    top = tl.maximum(most, sink_most)
    top = tl.where(top == float("-inf"), 0.0, top)
    fade, sink_fade = tl.exp(most - top), tl.exp(sink_most - top)
    both = total * fade + sink_total * sink_fade
    answer = answer * fade[:, None] + sink_answer * sink_fade[:, None]
    answer = answer / tl.where(both > 0, both, 1.0)[:, None]
    tl.store(heads + at, answer.to(heads.dtype.element_ty), mask=real[:, None])
    where = masses + b * 2 * n_heads + group * shared + head
    tl.store(where, mass, mask=real)
    tl.store(where + n_heads, sink_mass, mask=real)


@triton.jit
def _far_keys(first, end, gates, b, group, step_b, step_g, window, n_sinks, gated: tl.constexpr):
    """The far keys [begin, stop) of a sequence; none of them behind a shut gate."""
    begin = tl.load(first + b).to(tl.int32) + n_sinks
    stop = tl.load(end + b).to(tl.int32) - window
    if gated:
        stop = tl.where(tl.load(gates + b * step_b + group * step_g) != 0, stop, begin)
    return begin, stop


@triton.jit(do_not_specialize=_SIZES)
def far(
    q, keys, values, first, end, gates, step_b, step_g, part, sums, window, n_sinks, n_splits, scale,
    n_groups, shared, n_places,
    gated: tl.constexpr, width: tl.constexpr, block_g: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Attention to one split of the far keys, and its log-sum-exp; nothing is loaded or stored where there are none."""
    split, row = tl.program_id(0), tl.program_id(1)
    begin, stop = _far_keys(first, end, gates, row // n_groups, row % n_groups, step_b, step_g, window, n_sinks, gated)
    if stop > begin:
        size = tl.cdiv(tl.cdiv(stop - begin, n_splits), block_s) * block_s
        begin = begin + split * size
        stop = tl.minimum(begin + size, stop)
        channel = tl.arange(0, width)
        head = tl.arange(0, block_g)
        real = head < shared
        of_head = row * shared + head
        asked = tl.load(q + of_head[:, None] * width + channel[None, :], mask=real[:, None], other=0.0)
        base = row.to(tl.int64) * n_places * width
        most, total, answer = _scored(asked, keys + base, values + base, begin, stop, scale, width, block_g, block_s)
        answer = answer / tl.where(total > 0, total, 1.0)[:, None]
        at = of_head.to(tl.int64) * n_splits + split
        tl.store(part + at[:, None] * width + channel[None, :], answer, mask=real[:, None])
        tl.store(sums + at, _log_sum(most, total), mask=real)


@triton.jit(do_not_specialize=_SIZES)
def join(
    part, sums, first, end, gates, step_b, step_g, near_heads, masses, heads, n_heads, shared,
    window, n_sinks, n_splits,
    gated: tl.constexpr, width: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Joins near keys and all splits of one head by their log-sum-exp."""
    row = tl.program_id(0)
    b, head = row // n_heads, row % n_heads
    channel = tl.arange(0, width)
    begin, stop = _far_keys(first, end, gates, b, head // shared, step_b, step_g, window, n_sinks, gated)
    if gated:  # noqa: SIM108 - a constant decides, so one branch alone is compiled
        answer = tl.load(near_heads + row * width + channel).to(tl.float32)
    else:
        answer = tl.zeros([width], tl.float32)
    if stop > begin:
        split = tl.arange(0, block_n)
        found = tl.load(sums + row.to(tl.int64) * n_splits + split, mask=split < n_splits, other=-1e30)
        top = tl.max(found, axis=0)
        if gated:
            mass = tl.load(masses + b * 2 * n_heads + head)
            sink_mass = tl.load(masses + b * 2 * n_heads + n_heads + head)
            top = tl.maximum(top, tl.maximum(mass, sink_mass))
            total = tl.exp(mass - top) + tl.exp(sink_mass - top)
        else:
            total = 0.0
        weight = tl.exp(found - top)
        at = (row.to(tl.int64) * n_splits + split)[:, None] * width + channel[None, :]
        some = tl.load(part + at, mask=(found > -1e30)[:, None], other=0.0)  # an empty split stored no heads
        answer = answer * total + tl.sum(some * weight[:, None], axis=0)
        answer = answer / (total + tl.sum(weight, axis=0))
    tl.store(heads + row * width + channel, answer.to(heads.dtype.element_ty))
