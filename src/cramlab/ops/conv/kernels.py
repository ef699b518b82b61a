# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of a short causal convolution that makes queries, keys and values.

A program processes some tokens of one sequence, and the queries, keys or values of one head. Inputs are (B, T, 3 H E),
inputs before the first token (B, n - 1, 3 H E), queries, keys and values (B, T, H, E), all contiguous. Sums have 32
bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["n_tokens", "n_heads"]
_EPS = tl.constexpr(1e-12)  # least length that is divided by


@triton.jit
def _place(n_tokens, n_heads, block: tl.constexpr, block_e: tl.constexpr):
    """The sequence, the first token, the part (queries, keys, values), the head, and the channels of the program."""
    n_blocks = tl.cdiv(n_tokens, block)
    b, first = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks * block
    return b, first, tl.program_id(1) // n_heads, tl.program_id(1) % n_heads, tl.arange(0, block_e)


@triton.jit
def _history(x, before, b, at, n_tokens, width, column, e, channels: tl.constexpr, n_taps: tl.constexpr):
    """Inputs at places of the history, (places, channels); the first token has place n_taps - 1; zeros outside."""
    within = (e < channels)[None, :]
    old, new = (at >= 0) & (at < n_taps - 1), (at >= n_taps - 1) & (at < n_tokens + n_taps - 1)
    here = column + e[None, :]
    now = (b * n_tokens + at - (n_taps - 1))[:, None] * width + here
    found = tl.load(x + now, mask=new[:, None] & within, other=0.0).to(tl.float32)
    if n_taps > 1:
        then = (b * (n_taps - 1) + at)[:, None] * width + here
        found += tl.load(before + then, mask=old[:, None] & within, other=0.0).to(tl.float32)
    return found


@triton.jit
def _convolved(
    x, taps, before, b, token, n_tokens, width, column, e, channels: tl.constexpr, n_taps: tl.constexpr,
    block: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    """The convolution at tokens, (tokens, channels)."""
    z = tl.zeros((block, block_e), tl.float32)
    for i in tl.static_range(n_taps):
        tap = tl.load(taps + (column + e) * n_taps + i, mask=e < channels, other=0.0).to(tl.float32)
        z += tap[None, :] * _history(x, before, b, token + i, n_tokens, width, column, e, channels, n_taps)
    return z


@triton.jit(do_not_specialize=_SIZES)
def forward(
    x, taps, before, q, k, v, n_tokens, n_heads, scale,
    channels: tl.constexpr, n_taps: tl.constexpr, block: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values."""
    b, first, part, head, e = _place(n_tokens, n_heads, block, block_e)
    token, width = first + tl.arange(0, block), 3 * n_heads * channels
    column = (part * n_heads + head) * channels
    z = _convolved(x, taps, before, b, token, n_tokens, width, column, e, channels, n_taps, block, block_e)
    y = z * tl.sigmoid(z)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), _EPS)[:, None]
    rows = ((b * n_tokens + token) * n_heads + head)[:, None] * channels + e[None, :]
    there = (token < n_tokens)[:, None] & (e < channels)[None, :]
    if part == 0:
        tl.store(q + rows, y * (scale / length), mask=there)
    elif part == 1:
        tl.store(k + rows, y / length, mask=there)
    else:
        tl.store(v + rows, y, mask=there)


@triton.jit(do_not_specialize=_SIZES)
def to_convolved(
    to_q, to_k, to_v, x, taps, before, to_z, to_taps, n_tokens, n_heads, scale,
    channels: tl.constexpr, n_taps: tl.constexpr, block: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution, (B, T, 3 H E), and that of taps, summed over the program's tokens.

    The latter is (B blocks, n, 3 H E).
    """
    b, first, part, head, e = _place(n_tokens, n_heads, block, block_e)
    token, width = first + tl.arange(0, block), 3 * n_heads * channels
    column = (part * n_heads + head) * channels
    to_part = to_v
    if part == 0:
        to_part = to_q
    elif part == 1:
        to_part = to_k
    there = (token < n_tokens)[:, None] & (e < channels)[None, :]
    rows = ((b * n_tokens + token) * n_heads + head)[:, None] * channels + e[None, :]
    to_y = tl.load(to_part + rows, mask=there, other=0.0).to(tl.float32)
    z = _convolved(x, taps, before, b, token, n_tokens, width, column, e, channels, n_taps, block, block_e)
    chance = tl.sigmoid(z)
    if part < 2:
        y = z * chance
        length = tl.sqrt(tl.sum(y * y, axis=1))[:, None]
        divisor = tl.maximum(length, _EPS)
        along = tl.where(length > _EPS, tl.sum(to_y * y, axis=1)[:, None] / (divisor * divisor), 0.0)
        to_y = (to_y - along * y) * (tl.where(part == 0, scale, 1.0) / divisor)
    found = tl.where(there, to_y * chance * (1.0 + z * (1.0 - chance)), 0.0)
    tl.store(to_z + (b * n_tokens + token)[:, None] * width + column + e[None, :], found, mask=there)
    for i in tl.static_range(n_taps):
        inputs = _history(x, before, b, token + i, n_tokens, width, column, e, channels, n_taps)
        row = (tl.program_id(0).to(tl.int64) * n_taps + i) * width + column
        tl.store(to_taps + row + e, tl.sum(found * inputs, axis=0), mask=e < channels)


@triton.jit(do_not_specialize=_SIZES)
def to_inputs(
    to_z, taps, to_x, to_before, n_tokens, n_heads,
    channels: tl.constexpr, n_taps: tl.constexpr, block: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    """Gradients of inputs and of earlier inputs: each place of the history is in the convolution of `n_taps` tokens."""
    b, first, part, head, e = _place(n_tokens + n_taps - 1, n_heads, block, block_e)
    at, width = first + tl.arange(0, block), 3 * n_heads * channels
    here, within = (part * n_heads + head) * channels + e, e < channels
    found = tl.zeros((block, block_e), tl.float32)
    for i in tl.static_range(n_taps):
        token = at - i
        there = ((token >= 0) & (token < n_tokens))[:, None] & within[None, :]
        rows = (b * n_tokens + token)[:, None] * width + here[None, :]
        tap = tl.load(taps + here * n_taps + i, mask=within, other=0.0).to(tl.float32)
        found += tap[None, :] * tl.load(to_z + rows, mask=there, other=0.0).to(tl.float32)
    new = (at >= n_taps - 1) & (at < n_tokens + n_taps - 1)
    rows = (b * n_tokens + at - (n_taps - 1))[:, None] * width + here[None, :]
    tl.store(to_x + rows, found, mask=new[:, None] & within[None, :])
    if n_taps > 1:
        rows = (b * (n_taps - 1) + at)[:, None] * width + here[None, :]
        tl.store(to_before + rows, found, mask=(at < n_taps - 1)[:, None] & within[None, :])
