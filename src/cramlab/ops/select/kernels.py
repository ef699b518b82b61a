# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The Triton kernels for selecting tokens. A program processes a block of tokens of one sequence.

Scalars of tokens are (B, T) or (B, R), their entries (B, T, D) or (B, R, D).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["most"])
def count(x, total, token, there, n_tokens, most, select: tl.constexpr, block: tl.constexpr, wide: tl.constexpr):
    """Cumulative sums of x into `total`, and with `select` the indices of the first tokens where x is not zero.

    Every program sums what comes before its block itself, which costs less than waiting for the other programs.
    """
    b, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    row = x + b * n_tokens
    exact = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    before = tl.zeros([wide], exact)
    after = tl.zeros([wide], exact)
    for start in range(0, n_tokens if select else begin, wide):
        at = start + tl.arange(0, wide)
        some = tl.load(row + at, mask=at < n_tokens, other=0).to(exact)
        before += tl.where(at < begin, some, 0)
        if select:
            after += tl.where(at >= begin, some, 0)
    n_before = tl.sum(before, axis=0)
    inner = tl.arange(0, block)
    at = begin + inner
    mine = tl.load(row + at, mask=at < n_tokens, other=0).to(exact)
    rank = n_before + tl.cumsum(mine, axis=0)
    if select:
        chosen = (mine != 0) & (rank <= most)
        slot = b * most + rank - 1
        tl.store(token + slot, at.to(tl.int64), mask=chosen)
        tl.store(there + slot, tl.full([block], 1, tl.int8), mask=chosen)
        n_chosen = n_before + tl.sum(after, axis=0)
        # Each program writes a part of the padding.
        share = tl.cdiv(most, tl.num_programs(0))
        end = tl.minimum((tl.program_id(0) + 1) * share, most)
        for start in range(tl.program_id(0) * share, end, block):
            empty = (start + inner >= n_chosen) & (start + inner < end)
            tl.store(token + b * most + start + inner, tl.zeros([block], tl.int64) + n_tokens - 1, mask=empty)
            tl.store(there + b * most + start + inner, tl.zeros([block], tl.int8), mask=empty)
    tl.store(total + b * n_tokens + at, rank.to(total.dtype.element_ty), mask=at < n_tokens)


@triton.jit(do_not_specialize=["absent"])
def take(x, token, there, found, n_tokens, n_chosen, absent, d, block: tl.constexpr, block_d: tl.constexpr):
    """Gathers the entries (B, T, D) of chosen tokens into (B, R, D), and writes `absent` into padding."""
    b = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(2) * block_d + tl.arange(0, block_d)
    inside = row < n_chosen
    which = tl.load(token + b * n_chosen + row, mask=inside, other=0)
    is_there = tl.load(there + b * n_chosen + row, mask=inside, other=0) != 0
    within = inside[:, None] & (channel < d)[None, :]
    entry = tl.load(x + (b * n_tokens + which)[:, None] * d + channel[None, :], mask=within & is_there[:, None])
    entry = tl.where(is_there[:, None], entry, absent.to(entry.dtype))
    tl.store(found + (b * n_chosen + row)[:, None] * d + channel[None, :], entry, mask=within)


@triton.jit
def put(
    rank, found, onto, y, n_tokens, n_chosen, d,
    has_found: tl.constexpr, has_onto: tl.constexpr, block: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Scatters `found` (B, R, D) to the chosen tokens and copies `onto` (B, T, D) elsewhere; zero if one is missing."""
    b = tl.program_id(1).to(tl.int64)
    token, channel = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(2) * block_d + tl.arange(0, block_d)
    inside = token < n_tokens
    own = tl.load(rank + b * n_tokens + token, mask=inside, other=0)
    before = tl.load(rank + b * n_tokens + token - 1, mask=inside & (token > 0), other=0)
    chosen = ((own > before) & (own <= n_chosen))[:, None]
    within = inside[:, None] & (channel < d)[None, :]
    at = (b * n_tokens + token)[:, None] * d + channel[None, :]
    entry = tl.zeros([block, block_d], y.dtype.element_ty)
    if has_onto:
        entry = tl.load(onto + at, mask=within & ~chosen, other=0)
    if has_found:
        source = (b * n_chosen + own - 1)[:, None] * d + channel[None, :]
        entry = tl.where(chosen, tl.load(found + source, mask=within & chosen, other=0), entry)
    tl.store(y + at, entry, mask=within)
