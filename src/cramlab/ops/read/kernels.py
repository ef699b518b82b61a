# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of attention.

A program processes a block of readers, or of slots, of one head of one sequence. Arrays are (B, R, D) for readers, (B,
S, D) for slots and (B, H, R) for scalars of a reader, all contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes change from call to call, so no kernel is compiled for a particular one.
_SIZES = ["n_splits", "n_batch", "n_readers", "n_places", "capacity"]


@triton.jit
def _seen(
    place, last, begin, filled, n_filled, b, n_places, capacity,
    masked: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """The slots (S,) that each reader sees, given its `last` (R,): bool (R, S). A reader always sees its last slot."""
    seen = (place[None, :] <= last[:, None]) & (place[None, :] >= begin)
    inside = place < n_places
    if bounded:
        if masked:
            at_last = tl.load(n_filled + b * n_places + last, mask=last >= 0, other=0)
            at_place = tl.load(n_filled + b * n_places + place, mask=inside, other=0)
            seen = seen & (at_last[:, None] - at_place[None, :] < capacity)
        else:
            seen = seen & (last[:, None] - place[None, :] < capacity)
    if masked:
        there = tl.load(filled + b * n_places + place, mask=inside, other=0)
        seen = (seen & (there != 0)[None, :]) | ((place[None, :] == last[:, None]) & (place[None, :] >= begin))
    return seen & inside[None, :]


@triton.jit
def _part(
    last, split, n_splits, capacity, masked: tl.constexpr, bounded: tl.constexpr, block_s: tl.constexpr
):  # fmt: skip
    """The slots [begin, end) that one split scores for a block of readers with these last slots."""
    end = tl.max(last, axis=0) + 1
    begin = 0
    if bounded and not masked:
        begin = tl.maximum(tl.min(tl.where(last >= 0, last, 2147483647), axis=0) - capacity + 1, 0)
        begin = tl.minimum(begin, end) // block_s * block_s
    size = tl.cdiv(tl.cdiv(end - begin, n_splits), block_s) * block_s
    begin = begin + split * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def _log_sums(lse, row, present):
    """Log-sum-exp of readers (R,); zero for a reader that sees nothing."""
    total = tl.load(lse + row, mask=present, other=0.0)
    return tl.where(total == float("-inf"), 0.0, total)


@triton.jit
def _weights(asked, k, total, seen, scale):
    """Attention weights of readers (R, width) with slots (S, width), recomputed from the log-sum-exp, (R, S)."""
    score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
    return tl.exp(tl.where(seen, score - total[:, None], float("-inf")))


@triton.jit(do_not_specialize=_SIZES)
def forward(
    q, keys, values, last, filled, n_filled, y, lse, n_splits, n_heads, n_readers, n_places, capacity, scale,
    masked: tl.constexpr, bounded: tl.constexpr, width: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Attention of a block of readers over one split of their prefix, and log-sum-exp; -inf if they see nothing."""
    b, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    split = tl.program_id(2)
    n_batch = tl.num_programs(1) // n_heads
    reader = tl.program_id(0) * block_r + tl.arange(0, block_r)
    channel = tl.arange(0, width)
    d = n_heads * width
    present = reader < n_readers
    place_of = tl.load(last + b * n_readers + reader, mask=present, other=-1).to(tl.int32)
    begin, end = _part(place_of, split, n_splits, capacity, masked, bounded, block_s)
    at = (b * n_readers + reader).to(tl.int64)[:, None] * d + head * width + channel[None, :]
    asked = tl.load(q + at, mask=present[:, None], other=0.0)
    most = tl.full([block_r], float("-inf"), tl.float32)
    total = tl.zeros([block_r], tl.float32)
    answer = tl.zeros([block_r, width], tl.float32)
    for start in range(begin, end, block_s):
        place = start + tl.arange(0, block_s)
        inside = place < n_places
        where = (b * n_places + place).to(tl.int64)[:, None] * d + head * width + channel[None, :]
        k = tl.load(keys + where, mask=inside[:, None], other=0.0)
        v = tl.load(values + where, mask=inside[:, None], other=0.0)
        seen = _seen(place, place_of, begin, filled, n_filled, b, n_places, capacity, masked, bounded)
        seen = seen & (place < end)[None, :]
        score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen, score, float("-inf"))
        new_most = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(new_most == float("-inf"), 0.0, new_most)  # nothing seen so far: exp(-inf - 0) = 0
        weight = tl.exp(score - base[:, None])
        fade = tl.exp(most - base)
        total = total * fade + tl.sum(weight, axis=1)
        answer = answer * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = new_most
    answer = answer / tl.where(total > 0, total, 1.0)[:, None]
    found = tl.where(total > 0, most + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    shift = split.to(tl.int64) * n_batch * n_readers
    tl.store(y + shift * d + at, answer.to(y.dtype.element_ty), mask=present[:, None])
    tl.store(lse + shift * n_heads + tl.program_id(1) * n_readers + reader, found, mask=present)


@triton.jit(do_not_specialize=_SIZES)
def join(
    part, part_lse, y, lse, n_splits, n_batch, n_heads, n_readers, width: tl.constexpr, block_r: tl.constexpr
):  # fmt: skip
    """Joins the results of all splits (n_splits, B, R, D) by their log-sum-exp."""
    b, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    reader = tl.program_id(0) * block_r + tl.arange(0, block_r)
    channel = tl.arange(0, width)
    d = n_heads * width
    present = reader < n_readers
    at = (b * n_readers + reader).to(tl.int64)[:, None] * d + head * width + channel[None, :]
    row = tl.program_id(1) * n_readers + reader
    most = tl.full([block_r], float("-inf"), tl.float32)
    total = tl.zeros([block_r], tl.float32)
    answer = tl.zeros([block_r, width], tl.float32)
    shift = tl.program_id(0).to(tl.int64) * 0
    for _ in range(0, n_splits):
        found = tl.load(part_lse + shift * n_heads + row, mask=present, other=float("-inf"))
        some = tl.load(part + shift * d + at, mask=present[:, None], other=0.0)
        new_most = tl.maximum(most, found)
        base = tl.where(new_most == float("-inf"), 0.0, new_most)
        fade, weight = tl.exp(most - base), tl.exp(found - base)
        total = total * fade + weight
        answer = answer * fade[:, None] + weight[:, None] * some
        most = new_most
        shift += n_batch * n_readers
    safe = tl.where(total > 0, total, 1.0)
    tl.store(y + at, (answer / safe[:, None]).to(y.dtype.element_ty), mask=present[:, None])
    tl.store(lse + row, tl.where(total > 0, most + tl.log(safe), float("-inf")), mask=present)


@triton.jit(do_not_specialize=_SIZES)
def to_queries(
    q, keys, values, last, filled, n_filled, grad, lse, own, to_q,
    n_splits, n_heads, n_readers, n_places, capacity, scale,
    masked: tl.constexpr, bounded: tl.constexpr, width: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries from one split of their prefix."""
    b, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    split = tl.program_id(2)
    n_batch = tl.num_programs(1) // n_heads
    reader = tl.program_id(0) * block_r + tl.arange(0, block_r)
    channel = tl.arange(0, width)
    d = n_heads * width
    present = reader < n_readers
    place_of = tl.load(last + b * n_readers + reader, mask=present, other=-1).to(tl.int32)
    begin, end = _part(place_of, split, n_splits, capacity, masked, bounded, block_s)
    at = (b * n_readers + reader).to(tl.int64)[:, None] * d + head * width + channel[None, :]
    row = tl.program_id(1) * n_readers + reader
    asked = tl.load(q + at, mask=present[:, None], other=0.0)
    to_answer = tl.load(grad + at, mask=present[:, None], other=0.0)
    total = _log_sums(lse, row, present)
    size = tl.load(own + row, mask=present, other=0.0)
    found = tl.zeros([block_r, width], tl.float32)
    for start in range(begin, end, block_s):
        place = start + tl.arange(0, block_s)
        inside = place < n_places
        where = (b * n_places + place).to(tl.int64)[:, None] * d + head * width + channel[None, :]
        k = tl.load(keys + where, mask=inside[:, None], other=0.0)
        v = tl.load(values + where, mask=inside[:, None], other=0.0)
        seen = _seen(place, place_of, begin, filled, n_filled, b, n_places, capacity, masked, bounded)
        seen = seen & (place < end)[None, :]
        weight = _weights(asked, k, total, seen, scale)
        to_weight = tl.dot(to_answer, tl.trans(v), input_precision="ieee")
        to_score = weight * (to_weight - size[:, None]) * scale
        found += tl.dot(to_score.to(k.dtype), k, input_precision="ieee")
    shift = split.to(tl.int64) * n_batch * n_readers * d
    tl.store(to_q + shift + at, found.to(to_q.dtype.element_ty), mask=present[:, None])


@triton.jit(do_not_specialize=_SIZES)
def to_places(
    q, keys, values, last, filled, n_filled, grad, lse, own, to_keys, to_values,
    n_heads, n_readers, n_places, capacity, scale,
    masked: tl.constexpr, bounded: tl.constexpr, width: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from all readers of their sequence that see them."""
    b, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    place = tl.program_id(0) * block_s + tl.arange(0, block_s)
    channel = tl.arange(0, width)
    d = n_heads * width
    inside = place < n_places
    where = (b * n_places + place).to(tl.int64)[:, None] * d + head * width + channel[None, :]
    k = tl.load(keys + where, mask=inside[:, None], other=0.0)
    v = tl.load(values + where, mask=inside[:, None], other=0.0)
    to_k = tl.zeros([block_s, width], tl.float32)
    to_v = tl.zeros([block_s, width], tl.float32)
    for start in range(0, n_readers, block_r):
        reader = start + tl.arange(0, block_r)
        present = reader < n_readers
        place_of = tl.load(last + b * n_readers + reader, mask=present, other=-1).to(tl.int32)
        if tl.max(place_of, axis=0) >= tl.program_id(0) * block_s:  # else none of them sees any of these places
            at = (b * n_readers + reader).to(tl.int64)[:, None] * d + head * width + channel[None, :]
            row = tl.program_id(1) * n_readers + reader
            asked = tl.load(q + at, mask=present[:, None], other=0.0)
            to_answer = tl.load(grad + at, mask=present[:, None], other=0.0)
            total = _log_sums(lse, row, present)
            size = tl.load(own + row, mask=present, other=0.0)
            seen = _seen(place, place_of, 0, filled, n_filled, b, n_places, capacity, masked, bounded)
            weight = _weights(asked, k, total, seen, scale)
            to_v += tl.dot(tl.trans(weight).to(v.dtype), to_answer, input_precision="ieee")
            to_weight = tl.dot(to_answer, tl.trans(v), input_precision="ieee")
            to_score = weight * (to_weight - size[:, None]) * scale
            to_k += tl.dot(tl.trans(to_score).to(k.dtype), asked, input_precision="ieee")
    tl.store(to_keys + where, to_k.to(to_keys.dtype.element_ty), mask=inside[:, None])
    tl.store(to_values + where, to_v.to(to_values.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def use(
    q, keys, last, own, filled, n_filled, lse, found,
    n_heads, n_readers, n_places, capacity, scale,
    masked: tl.constexpr, bounded: tl.constexpr, width: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    """Squared weights of a block of slots, summed over the readers of one head except each slot's own reader."""
    b, head = tl.program_id(1) // n_heads, tl.program_id(1) % n_heads
    place = tl.program_id(0) * block_s + tl.arange(0, block_s)
    channel = tl.arange(0, width)
    d = n_heads * width
    inside = place < n_places
    where = (b * n_places + place).to(tl.int64)[:, None] * d + head * width + channel[None, :]
    k = tl.load(keys + where, mask=inside[:, None], other=0.0)
    used = tl.zeros([block_s], tl.float32)
    for start in range(0, n_readers, block_r):
        reader = start + tl.arange(0, block_r)
        present = reader < n_readers
        place_of = tl.load(last + b * n_readers + reader, mask=present, other=-1).to(tl.int32)
        if tl.max(place_of, axis=0) >= tl.program_id(0) * block_s:  # else none of them sees any of these places
            own_place = tl.load(own + b * n_readers + reader, mask=present, other=-1).to(tl.int32)
            at = (b * n_readers + reader).to(tl.int64)[:, None] * d + head * width + channel[None, :]
            asked = tl.load(q + at, mask=present[:, None], other=0.0)
            total = _log_sums(lse, tl.program_id(1) * n_readers + reader, present)
            seen = _seen(place, place_of, 0, filled, n_filled, b, n_places, capacity, masked, bounded)
            seen = seen & (place[None, :] != own_place[:, None])
            weight = _weights(asked, k, total, seen, scale)
            used += tl.sum(weight * weight, axis=0)
    tl.store(found + tl.program_id(1).to(tl.int64) * n_places + place, used, mask=inside)
