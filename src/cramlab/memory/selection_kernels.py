# pyright: reportMissingImports=false
"""The Triton kernels of `selection`. A program owns a block of tokens of one sequence; arrays are (B, T) or (B, R)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens", "most"])
def count(x, total, token, there, n_tokens, most, select: tl.constexpr, block: tl.constexpr):
    """Running sums of x into `total`, and, to `select`, the numbers of the first tokens where x is not zero.

    Every program sums by itself what comes before its block, which costs less than waiting for the others.
    """
    b, own = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = x + b * n_tokens
    inner = tl.arange(0, block)
    exact = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    before = tl.zeros([block], exact)
    after = tl.zeros([block], exact)
    for start in range(0, n_tokens, block):
        some = tl.load(row + start + inner, mask=start + inner < n_tokens, other=0).to(exact)
        before += tl.where(start < own * block, some, 0)
        if select:
            after += tl.where(start >= own * block, some, 0)
    n_before = tl.sum(before, axis=0)
    at = own * block + inner
    mine = tl.load(row + at, mask=at < n_tokens, other=0).to(exact)
    rank = n_before + tl.cumsum(mine, axis=0)
    if select:
        chosen = (mine != 0) & (rank <= most)
        slot = b * most + rank - 1
        tl.store(token + slot, at.to(tl.int64), mask=chosen)
        tl.store(there + slot, tl.full([block], 1, tl.int8), mask=chosen)
        n_chosen = n_before + tl.sum(after, axis=0)
        # What is left over is filled up, by each program a part.
        share = tl.cdiv(most, tl.num_programs(0))
        end = tl.minimum((own + 1) * share, most)
        for start in range(own * share, end, block):
            empty = (start + inner >= n_chosen) & (start + inner < end)
            tl.store(token + b * most + start + inner, tl.zeros([block], tl.int64) + n_tokens - 1, mask=empty)
            tl.store(there + b * most + start + inner, tl.zeros([block], tl.int8), mask=empty)
    tl.store(total + b * n_tokens + at, rank.to(total.dtype.element_ty), mask=at < n_tokens)


@triton.jit(do_not_specialize=["n_tokens", "n_chosen", "absent"])
def entries_at(x, token, there, found, n_tokens, n_chosen, absent, all_there: tl.constexpr, block: tl.constexpr):
    """The numbers of chosen tokens, and another one where there is none."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < n_chosen
    which = tl.load(token + b * n_chosen + at, mask=inside, other=0)
    entry = tl.load(x + b * n_tokens + which, mask=inside, other=0)
    if not all_there:
        entry = tl.where(tl.load(there + b * n_chosen + at, mask=inside, other=0) != 0, entry, absent.to(entry.dtype))
    tl.store(found + b * n_chosen + at, entry, mask=inside)
