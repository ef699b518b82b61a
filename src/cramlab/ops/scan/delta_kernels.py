# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of the delta rule: the inverse of triangular matrices, and states that pass over chunks.

Arrays are contiguous and have 32 bits. Products split each factor into two numbers of 19 bits (`tf32x3`), so that
tensor cores compute them to nearly 32 bits. Blocks have at least 16 rows and columns, as tensor cores require.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def invert(lower, found, chunk: tl.constexpr, block: tl.constexpr, levels: tl.constexpr):
    """The inverse of `1 + L`, where L is the part of `lower` below the diagonal. A program inverts one matrix.

    Blocks on the diagonal are inverted at twice the size in each step: with X the inverse of both blocks of a pair and
    B the block of L that joins them, the inverse of the pair is `X - X B X`. No power of L is formed, which would grow
    beyond the precision where many keys of a chunk are alike.
    """
    program = tl.program_id(0).to(tl.int64) * chunk * chunk
    i, j = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    there = (i < chunk) & (j < chunk)
    given = tl.load(lower + program + i * chunk + j, mask=there & (j < i), other=0.0)
    one = tl.where(i == j, 1.0, 0.0)
    x = one - tl.where((i // 2 == j // 2) & (j < i), given, 0.0)
    for level in tl.static_range(1, levels):
        pair = 2 << level
        joins = (i // pair == j // pair) & (i % pair >= pair // 2) & (j % pair < pair // 2)
        joined = tl.dot(tl.where(joins, given, 0.0), x, input_precision="tf32x3")
        x -= tl.dot(x, joined, input_precision="tf32x3")
    tl.store(found + program + i * chunk + j, x, mask=there)


@triton.jit(do_not_specialize=["n_chunks", "n_states"])
def pass_state(
    own, seen, kept, ends, state, added, before, corrections, last, n_chunks, n_states,
    chunk: tl.constexpr, d_key: tl.constexpr, d_value: tl.constexpr, backward: tl.constexpr,
    block_c: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """States that pass over chunks, as in `delta_naive.pass_state`. A program holds some columns of one state.

    Backwards the states are gradients: `U[n] = own[n] + seen[n] S`, then `S = ends[n] S + added[n] - kept[n]' U[n]`,
    from the last chunk to the first, where `before` receives the gradient of the state after each chunk.
    """
    m = tl.program_id(0).to(tl.int64)
    c, k, v = tl.arange(0, block_c), tl.arange(0, block_k), tl.program_id(1) * block_v + tl.arange(0, block_v)
    of_state = k[:, None] * d_value + v[None, :]
    of_values = c[:, None] * d_value + v[None, :]
    of_keys = c[:, None] * d_key + k[None, :]
    of_keys_across = c[None, :] * d_key + k[:, None]
    in_state = (k < d_key)[:, None] & (v < d_value)[None, :]
    in_values = (c < chunk)[:, None] & (v < d_value)[None, :]
    in_keys = (c < chunk)[:, None] & (k < d_key)[None, :]
    in_keys_across = (c < chunk)[None, :] & (k < d_key)[:, None]
    s = tl.load(state + m * d_key * d_value + of_state, mask=in_state, other=0.0)
    for step in range(n_chunks):
        n = step
        if backward:
            n = n_chunks - 1 - step
        row = n * n_states + m
        tl.store(before + row * d_key * d_value + of_state, s, mask=in_state)
        u = tl.load(own + row * chunk * d_value + of_values, mask=in_values, other=0.0)
        by_state = tl.load(seen + row * chunk * d_key + of_keys, mask=in_keys, other=0.0)
        keys = tl.load(kept + row * chunk * d_key + of_keys_across, mask=in_keys_across, other=0.0)
        end = tl.load(ends + row)
        if backward:
            u += tl.dot(by_state, s, input_precision="tf32x3")
            more = tl.load(added + row * d_key * d_value + of_state, mask=in_state, other=0.0)
            s = end * s + more - tl.dot(keys, u, input_precision="tf32x3")
        else:
            u -= tl.dot(by_state, s, input_precision="tf32x3")
            s = end * s + tl.dot(keys, u, input_precision="tf32x3")
        tl.store(corrections + row * chunk * d_value + of_values, u, mask=in_values)
    tl.store(last + m * d_key * d_value + of_state, s, mask=in_state)
