# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernel of the delta rule between its chunks: states that pass over chunks, forwards or backwards.

States have 32 bits; arrays of chunks are contiguous and have 32 bits or are bfloat16, then products take their factors
so. Products in 32 bits split each factor into two numbers of 19 bits (`tf32x3`), so that tensor cores compute them to
nearly 32 bits. Blocks have at least 16 rows and columns, as tensor cores require.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
        u = tl.load(own + row * chunk * d_value + of_values, mask=in_values, other=0.0).to(tl.float32)
        by_state = tl.load(seen + row * chunk * d_key + of_keys, mask=in_keys, other=0.0)
        keys = tl.load(kept + row * chunk * d_key + of_keys_across, mask=in_keys_across, other=0.0)
        end = tl.load(ends + row)
        if backward:
            u += tl.dot(by_state, s.to(by_state.dtype), input_precision="tf32x3")
            more = tl.load(added + row * d_key * d_value + of_state, mask=in_state, other=0.0)
            s = end * s + more - tl.dot(keys, u.to(keys.dtype), input_precision="tf32x3")
        else:
            u -= tl.dot(by_state, s.to(by_state.dtype), input_precision="tf32x3")
            s = end * s + tl.dot(keys, u.to(keys.dtype), input_precision="tf32x3")
        tl.store(corrections + row * chunk * d_value + of_values, u, mask=in_values)
    tl.store(last + m * d_key * d_value + of_state, s, mask=in_state)
