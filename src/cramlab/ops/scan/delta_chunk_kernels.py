# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of the delta rule inside its chunks: before and after the states pass over them, and backwards.

A program processes a chunk of tokens of one sequence and head. Queries, keys, values, strengths and decays are
(B, T, H, E) or (B, T, H), read where they stand; arrays of chunks are (N, B H, chunk, E), contiguous, in bfloat16 or
32 bits. Products take their factors in that type (`kind`) and are summed in 32 bits. Matrices of two tokens stay in the
program, but for the inverse. Names are those of `delta_naive.delta_rule`. Backwards, blocks are read again at each use,
after a store or a barrier, since registers cannot hold them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PRECISION = tl.constexpr("tf32x3")  # of products in 32 bits: each factor is split into two numbers of 19 bits
_TILE = tl.constexpr(16)  # rows of the diagonal blocks that are inverted by themselves
_SIZES = ["n_tokens", "n_heads"]


@triton.jit
def _product(a, b, kind: tl.constexpr):
    """The matrix product, in 32 bits; numbers of 16 bits fit the 19 of a tensor core and are not split."""
    if kind != tl.float32:
        found = tl.dot(a.to(kind), b.to(kind))
    elif a.dtype != tl.float32 and b.dtype != tl.float32:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=_PRECISION)
    return found


@triton.jit
def _load(x, rows, there, width: tl.constexpr, block: tl.constexpr):
    """Rows of `width` numbers that begin at `x + rows`; zeros outside."""
    e = tl.arange(0, block)
    return tl.load(x + rows[:, None] + e[None, :], mask=there[:, None] & (e < width)[None, :], other=0.0)


@triton.jit
def _store(x, rows, there, found, width: tl.constexpr, block: tl.constexpr):
    """Writes rows of `width` numbers that begin at `x + rows`."""
    e = tl.arange(0, block)
    tl.store(x + rows[:, None] + e[None, :], found, mask=there[:, None] & (e < width)[None, :])


@triton.jit
def _place(n_tokens, n_heads, chunk: tl.constexpr, block_c: tl.constexpr):
    """The sequence, the head, the tokens, whether they exist, their rows in (B, T, H) and in (N, B H, chunk)."""
    b, h = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    c = tl.arange(0, block_c)
    token = (tl.program_id(1) * chunk + c).to(tl.int64)
    there = (c < chunk) & (token < n_tokens)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    return b, h, token, there, (b * n_tokens + token) * n_heads + h, row * chunk + c, row


@triton.jit
def _past(since, row, chunk: tl.constexpr, block_c: tl.constexpr):
    """Logarithms of what the decays leave at each token of the state before a chunk; after its end, as at its end."""
    return tl.load(since + row * chunk + tl.minimum(tl.arange(0, block_c), chunk - 1))


@triton.jit
def _decays(since, block_c: tl.constexpr):
    """What the decays leave from the column's token to the row's, zero above the diagonal."""
    i, j = tl.arange(0, block_c)[:, None], tl.arange(0, block_c)[None, :]
    return tl.exp(tl.where(i >= j, since[:, None] - since[None, :], float("-inf")))


@triton.jit
def _inverse(lower, block: tl.constexpr, precision: tl.constexpr):
    """The inverse of `1 + L` for a strictly lower triangular matrix L.

    Blocks on the diagonal are inverted at twice the size in each step: with X the inverse of both blocks of a pair and
    B the block of L that joins them, the inverse of the pair is `X - X B X`. No power of L is formed, which would grow
    beyond the precision where many keys of a chunk are alike. Blocks of at most 16 are taken out of the matrix, since
    products of the whole would be zeros for the most part.
    """
    n: tl.constexpr = block // _TILE  # 1, 2 or 4
    levels: tl.constexpr = n // 2
    cut = tl.reshape(lower, (n, _TILE, n, _TILE))
    same = tl.arange(0, n)[:, None, None, None] == tl.arange(0, n)[None, None, :, None]
    tiles = tl.sum(tl.where(same, cut, 0.0), axis=2)
    i, j = tl.arange(0, _TILE)[None, :, None], tl.arange(0, _TILE)[None, None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, tiles, 0.0)
    for level in tl.static_range(1, 4):
        pair = 2 << level
        joins = (i // pair == j // pair) & (i % pair >= pair // 2) & (j % pair < pair // 2)
        inner = tl.dot(tl.where(joins, tiles, 0.0), x, input_precision="ieee")
        x -= tl.dot(x, inner, input_precision="ieee")
    whole = tl.reshape(tl.where(same, tl.expand_dims(x, 2), 0.0), (block, block))
    i, j = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    for level in tl.static_range(0, levels):
        pair = 2 * _TILE << level
        joins = (i // pair == j // pair) & (i % pair >= pair // 2) & (j % pair < pair // 2)
        inner = tl.dot(tl.where(joins, lower, 0.0), whole, input_precision=precision)
        whole -= tl.dot(whole, inner, input_precision=precision)
    return whole


@triton.jit(do_not_specialize=_SIZES)
def corrections(
    k, v, beta, log_decay, since, ends, inverse, own, seen, kept, n_tokens, n_heads, k_b, k_t, k_h, v_b, v_t, v_h,
    floor: tl.constexpr, chunk: tl.constexpr, d_key: tl.constexpr, d_value: tl.constexpr,
    block_c: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """What `pass_state` is given: own and seen corrections, kept keys, decays over chunks."""
    kind: tl.constexpr = seen.dtype.element_ty
    b, h, token, there, at, slot, row = _place(n_tokens, n_heads, chunk, block_c)
    c = tl.arange(0, block_c)
    steps = tl.load(log_decay + at, mask=there, other=0.0).to(tl.float32)
    past = tl.cumsum(tl.maximum(steps, floor, propagate_nan=tl.PropagateNan.ALL), axis=0)
    whole = tl.sum(tl.where(c == chunk - 1, past, 0.0), axis=0)
    tl.store(since + slot, past, mask=c < chunk)
    tl.store(ends + row, tl.exp(whole))
    strength = tl.load(beta + at, mask=there, other=0.0).to(tl.float32)
    keys = _load(k, b * k_b + token * k_t + h * k_h, there, d_key, block_k)
    _store(kept, slot * d_key, c < chunk, tl.exp(whole - past)[:, None] * keys.to(tl.float32), d_key, block_k)
    alike = strength[:, None] * _product(keys, tl.trans(keys), kind) * _decays(past, block_c)
    precision: tl.constexpr = _PRECISION if kind == tl.float32 else "tf32"
    x = _inverse(tl.where(c[:, None] > c[None, :], alike, 0.0), block_c, precision)
    _store(inverse, slot * chunk, c < chunk, x, chunk, block_c)
    by_state = _product(x, (strength * tl.exp(past))[:, None] * keys.to(tl.float32), kind)
    _store(seen, slot * d_key, c < chunk, by_state, d_key, block_k)
    values = _load(v, b * v_b + token * v_t + h * v_h, there, d_value, block_v).to(tl.float32)
    _store(own, slot * d_value, c < chunk, _product(x, strength[:, None] * values, kind), d_value, block_v)


@triton.jit(do_not_specialize=_SIZES)
def outputs(
    q, k, since, before, corrections, output, n_tokens, n_heads, q_b, q_t, q_h, k_b, k_t, k_h,
    chunk: tl.constexpr, d_key: tl.constexpr, d_value: tl.constexpr,
    block_c: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """The outputs, from the state before a chunk and the corrections inside it."""
    kind: tl.constexpr = before.dtype.element_ty
    b, h, token, there, at, slot, row = _place(n_tokens, n_heads, chunk, block_c)
    c, e = tl.arange(0, block_c), tl.arange(0, block_k)
    past = _past(since, row, chunk, block_c)
    queries = _load(q, b * q_b + token * q_t + h * q_h, there, d_key, block_k)
    keys = _load(k, b * k_b + token * k_t + h * k_h, there, d_key, block_k)
    inside = _product(queries, tl.trans(keys), kind) * _decays(past, block_c)
    found = _product(inside, _load(corrections, slot * d_value, c < chunk, d_value, block_v), kind)
    s = _load(before, (row * d_key + e) * d_value, e < d_key, d_value, block_v)
    found += _product(tl.exp(past)[:, None] * queries.to(tl.float32), s, kind)
    _store(output, at * d_value, there, found, d_value, block_v)


@triton.jit(do_not_specialize=_SIZES)
def outputs_back(
    to_output, q, k, since, before, corrections, to_q, to_k, to_past, to_before, to_corrections,
    n_tokens, n_heads, q_b, q_t, q_h, k_b, k_t, k_h,
    chunk: tl.constexpr, d_key: tl.constexpr, d_value: tl.constexpr,
    block_c: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """Gradients of all that `outputs` reads; those of keys and of `since` are arrays of chunks, to be added to."""
    kind: tl.constexpr = before.dtype.element_ty
    b, h, token, there, at, slot, row = _place(n_tokens, n_heads, chunk, block_c)
    c, e = tl.arange(0, block_c), tl.arange(0, block_k)
    past = _past(since, row, chunk, block_c)
    of_q, of_k, of_output = b * q_b + token * q_t + h * q_h, b * k_b + token * k_t + h * k_h, at * d_value
    of_values, of_states = slot * d_value, (row * d_key + e) * d_value
    faded = tl.exp(past)[:, None] * _load(q, of_q, there, d_key, block_k).to(tl.float32)
    to_state = _product(tl.trans(faded), _load(to_output, of_output, there, d_value, block_v), kind)
    _store(to_before, of_states, e < d_key, to_state, d_value, block_v)

    queries, keys = _load(q, of_q, there, d_key, block_k), _load(k, of_k, there, d_key, block_k)
    pairs = _product(queries, tl.trans(keys), kind) * _decays(past, block_c)
    to_values = _product(tl.trans(pairs), _load(to_output, of_output, there, d_value, block_v), kind)
    _store(to_corrections, of_values, c < chunk, to_values, d_value, block_v)

    u = _load(corrections, of_values, c < chunk, d_value, block_v)
    to_pairs = _product(_load(to_output, of_output, there, d_value, block_v), tl.trans(u), kind)
    of_past = tl.sum(to_pairs * pairs, axis=1) - tl.sum(to_pairs * pairs, axis=0)
    to_pairs *= _decays(past, block_c)
    of_keys = _product(tl.trans(to_pairs), _load(q, of_q, there, d_key, block_k), kind)
    _store(to_k, slot * d_key, c < chunk, of_keys, d_key, block_k)

    of_pairs = _product(to_pairs, _load(k, of_k, there, d_key, block_k), kind)
    s = _load(before, of_states, e < d_key, d_value, block_v)
    by_state = tl.exp(past)[:, None] * _product(_load(to_output, of_output, there, d_value, block_v), tl.trans(s), kind)
    _store(to_q, at * d_key, there, by_state + of_pairs, d_key, block_k)
    of_past += tl.sum(by_state * _load(q, of_q, there, d_key, block_k).to(tl.float32), axis=1)
    tl.store(to_past + slot, of_past, mask=c < chunk)


@triton.jit(do_not_specialize=_SIZES)
def corrections_back(
    to_own, after, k, v, beta, log_decay, since, ends, inverse, before, corrections, of_k, of_past,
    to_k, to_v, to_beta, to_decay, n_tokens, n_heads, k_b, k_t, k_h, v_b, v_t, v_h,
    floor: tl.constexpr, chunk: tl.constexpr, d_key: tl.constexpr, d_value: tl.constexpr,
    block_c: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values, strengths and decays, given those of own corrections and of states after chunks.

    `of_k` and `of_past` are the shares of `outputs_back`. With U the corrections, S the state before the chunk and Y
    the gradient of `b v`, the gradient of `b left k` is `-Y S'` and that of L is `-Y U'`. The gradient of `since` is
    summed from the end of the chunk.
    """
    kind: tl.constexpr = before.dtype.element_ty
    b, h, token, there, at, slot, row = _place(n_tokens, n_heads, chunk, block_c)
    c, e = tl.arange(0, block_c), tl.arange(0, block_k)
    past = _past(since, row, chunk, block_c)
    strength = tl.load(beta + at, mask=there, other=0.0).to(tl.float32)
    of_keys, of_v, of_values = b * k_b + token * k_t + h * k_h, b * v_b + token * v_t + h * v_h, slot * d_value
    of_states = (row * d_key + e) * d_value
    whole = tl.sum(tl.where(c == chunk - 1, past, 0.0), axis=0)
    to_state = _load(after, of_states, e < d_key, d_value, block_v)
    s = _load(before, of_states, e < d_key, d_value, block_v)
    to_whole = tl.load(ends + row) * tl.sum(tl.sum(to_state.to(tl.float32) * s, axis=1), axis=0)
    u = _load(corrections, of_values, c < chunk, d_value, block_v)
    to_keys = tl.exp(whole - past)[:, None] * _product(u, tl.trans(to_state), kind)
    of_kept = tl.sum(to_keys * _load(k, of_keys, there, d_key, block_k).to(tl.float32), axis=1)
    to_past = tl.load(of_past + slot, mask=c < chunk, other=0.0) - of_kept
    to_past += tl.where(c == chunk - 1, tl.sum(of_kept, axis=0) + to_whole, 0.0)
    to_keys += _load(of_k, slot * d_key, c < chunk, d_key, block_k)
    tl.debug_barrier()

    x = _load(inverse, slot * chunk, c < chunk, chunk, block_c)
    y = _product(tl.trans(x), _load(to_own, of_values, c < chunk, d_value, block_v), kind)
    _store(to_v, at * d_value, there, strength[:, None] * y, d_value, block_v)
    to_strength = tl.sum(y * _load(v, of_v, there, d_value, block_v).to(tl.float32), axis=1)
    tl.debug_barrier()

    s = _load(before, of_states, e < d_key, d_value, block_v)
    to_seen = -tl.exp(past)[:, None] * _product(y, tl.trans(s), kind)
    of_seen = tl.sum(to_seen * _load(k, of_keys, there, d_key, block_k).to(tl.float32), axis=1)
    to_keys += strength[:, None] * to_seen
    tl.debug_barrier()

    u = _load(corrections, of_values, c < chunk, d_value, block_v)
    to_alike = tl.where(c[:, None] > c[None, :], -_product(y, tl.trans(u), kind) * _decays(past, block_c), 0.0)
    keys = _load(k, of_keys, there, d_key, block_k)
    to_lower = to_alike * _product(keys, tl.trans(keys), kind)
    of_lower = tl.sum(to_lower, axis=1)
    tl.store(to_beta + at, to_strength + of_seen + of_lower, mask=there)
    to_past += strength * (of_seen + of_lower) - tl.sum(strength[:, None] * to_lower, axis=0)
    steps = tl.load(log_decay + at, mask=there, other=0.0).to(tl.float32)
    to_steps = tl.where(steps < floor, 0.0, tl.cumsum(to_past, axis=0, reverse=True))
    tl.store(to_decay + at, to_steps, mask=there)
    tl.debug_barrier()

    to_alike *= strength[:, None]
    to_keys += _product(to_alike + tl.trans(to_alike), _load(k, of_keys, there, d_key, block_k), kind)
    _store(to_k, at * d_key, there, to_keys, d_key, block_k)
