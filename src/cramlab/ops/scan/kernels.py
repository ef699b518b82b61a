# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels of the recurrence.

A program processes a chunk of tokens of one sequence and a block of channels. Arrays are (B, T, W) for inputs and
states, (B, T) for gaps, (B, n, W) for chunks, all contiguous. A backward scan begins with the last tokens, and decays
the state by the gap of the token after the one it reaches.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["n_tokens", "n_chunks"]


@triton.jit
def _faded_sum(decay, value, more_decay, more_value):
    """Composes two consecutive stretches of the recurrence."""
    return decay * more_decay, value * more_decay + more_value


@triton.jit
def _tokens(i, n_tokens, backward: tl.constexpr):
    """The token at each step of the scan, and the token whose gap decays the state on the way to it."""
    token = i
    fading = i
    if backward:
        token = n_tokens - 1 - i
        fading = n_tokens - i
    return token, fading


@triton.jit
def _gap(gaps, i, inside, n_tokens, backward: tl.constexpr):
    """The gap at each step; zero at the first step of a backward scan, which has no step before it."""
    _, fading = _tokens(i, n_tokens, backward)
    there = inside & (i < n_tokens) & (fading < n_tokens)
    return tl.minimum(tl.load(gaps + fading, mask=there, other=0.0), 1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=_SIZES)
def ends(
    u, gaps, rates, found, spans, n_tokens, n_chunks, channels: tl.constexpr, width: tl.constexpr,
    backward: tl.constexpr, chunk: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    """The last state of a chunk that begins at zero, and the duration of the chunk."""
    b = tl.program_id(1).to(tl.int64)
    step = tl.arange(0, chunk)
    i = tl.program_id(0) * chunk + step
    w = tl.program_id(2) * block_w + tl.arange(0, block_w)
    rate = tl.load(rates + w // width, mask=w < channels, other=1.0)
    token, _ = _tokens(i, n_tokens, backward)
    gap = _gap(gaps + b * n_tokens, i, step >= 0, n_tokens, backward)
    later = _gap(gaps + b * n_tokens, i + 1, step < chunk - 1, n_tokens, backward)
    until_end = tl.cumsum(later, axis=0, reverse=True)
    mask = (i < n_tokens)[:, None] & (w < channels)[None, :]
    given = tl.load(u + (b * n_tokens + token)[:, None] * channels + w[None, :], mask=mask, other=0.0).to(tl.float32)
    left = tl.sum(tl.exp(-rate[None, :] * until_end[:, None]) * given, axis=0)
    row = b * n_chunks + tl.program_id(0)
    tl.store(found + row * channels + w, left, mask=w < channels)
    tl.store(spans + row, tl.sum(gap, axis=0))


@triton.jit(do_not_specialize=["n_chunks"])
def begins(
    ends, spans, rates, state, found, n_chunks, channels: tl.constexpr, width: tl.constexpr,
    block_n: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a sequence, for `block_n` chunks at a time."""
    b = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, block_n)
    w = tl.program_id(1) * block_w + tl.arange(0, block_w)
    rate = tl.load(rates + w // width, mask=w < channels, other=1.0)
    now = tl.load(state + b * channels + w, mask=w < channels, other=0.0)
    for start in range(0, n_chunks, block_n):
        n = start + inner
        span = tl.load(spans + b * n_chunks + n, mask=n < n_chunks, other=0.0)
        mask = (n < n_chunks)[:, None] & (w < channels)[None, :]
        own = tl.load(ends + (b * n_chunks + n)[:, None] * channels + w[None, :], mask=mask, other=0.0)
        decay, value = tl.associative_scan((tl.exp(-rate[None, :] * span[:, None]), own), 0, _faded_sum)
        after = decay * now[None, :] + value
        if start == 0:
            tl.store(found + b * n_chunks * channels + w, now, mask=w < channels)
        following = (n + 1 < n_chunks)[:, None] & (w < channels)[None, :]
        tl.store(found + (b * n_chunks + n + 1)[:, None] * channels + w[None, :], after, mask=following)
        now = tl.sum(tl.where(inner[:, None] == block_n - 1, after, 0.0), axis=0)


@triton.jit(do_not_specialize=_SIZES)
def within(
    u, gaps, rates, begins, found, s, state, of_gaps, of_rates,
    n_tokens, n_chunks, channels: tl.constexpr, width: tl.constexpr,
    backward: tl.constexpr, chunk: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    """All states of a chunk; in a backward scan also the gradients of gaps and rates."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * chunk + tl.arange(0, chunk)
    w = tl.program_id(2) * block_w + tl.arange(0, block_w)
    rate = tl.load(rates + w // width, mask=w < channels, other=1.0)
    token, _ = _tokens(i, n_tokens, backward)
    inside = i < n_tokens
    gap = _gap(gaps + b * n_tokens, i, inside, n_tokens, backward)
    mask = inside[:, None] & (w < channels)[None, :]
    at = (b * n_tokens + token)[:, None] * channels + w[None, :]
    given = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
    decay, value = tl.associative_scan((tl.exp(-rate[None, :] * gap[:, None]), given), 0, _faded_sum)
    row = b * n_chunks + tl.program_id(0)
    first = tl.load(begins + row * channels + w, mask=w < channels, other=0.0)
    solved = decay * first[None, :] + value
    tl.store(found + at, solved.to(found.dtype.element_ty), mask=mask)
    if backward:
        own_gap = tl.load(gaps + b * n_tokens + token, mask=inside, other=0.0)
        own_gap = tl.minimum(own_gap, 1e30, propagate_nan=tl.PropagateNan.ALL)
        before = tl.load(s + at - channels, mask=mask & (token > 0)[:, None], other=0.0)
        at_start = mask & (token == 0)[:, None]
        before += tl.load(state + b * channels + w[None, :] + token[:, None] * 0, mask=at_start, other=0.0)
        of_decay = tl.where(mask, solved * before * tl.exp(-rate[None, :] * own_gap[:, None]), 0.0)
        of_gap = -tl.sum(of_decay * rate[None, :], axis=1)
        n_batch = tl.num_programs(1)
        tl.store(of_gaps + (tl.program_id(2) * n_batch + b) * n_tokens + token, of_gap, mask=inside)
        of_rate = -tl.sum(of_decay * own_gap[:, None], axis=0)
        tl.store(of_rates + (tl.program_id(0) * n_batch + b) * channels + w, of_rate, mask=w < channels)
