"""Decoding behind a gate in Triton kernels: near keys, then far keys in splits, then their join.

The grid is fixed by the size of the buffer, and every program takes its part of the far keys from positions on the
device. Programs behind a shut gate end before they load a key. Reference implementation: `naive`. Source: ours;
splitting the keys is the idea of Flash-Decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cramlab.ops import dispatch

_LEAST_QUERIES = 16  # rows of queries a program multiplies: the least that a matrix unit takes
_BLOCK = 64  # keys a program loads at a time
_LEAST_SPLIT = 256  # keys a split, at least
_PROGRAMS = 528  # programs of one sequence in a long buffer: four for each of the 132 multiprocessors of an H100


def usable(query: Tensor, key: Tensor) -> bool:
    """True if the kernels support the device, the type and the head width of queries (..., D)."""
    fits = query.shape[-1] in (16, 32, 64, 128) and key.is_contiguous()
    return fits and dispatch.known_floats(query) and dispatch.usable(query)


def n_splits_of(n_places: int, n_groups: int) -> int:
    """Number of parts that the far keys of a sequence and KV head are split into."""
    return max(1, min(-(-_PROGRAMS // n_groups), n_places // _LEAST_SPLIT, 128))


_POSITIONS = "Tensor query, Tensor key, Tensor value, Tensor first, Tensor end"
_SIZES = "int window, int n_sinks, float scale"


@torch.library.custom_op("cramlab::near_read", mutates_args=(), schema=f"({_POSITIONS}, {_SIZES}) -> (Tensor, Tensor)")
@dispatch.launching
def near_read(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, window: int, n_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the near keys; arguments and result as in `attention.near_read`."""
    heads, masses = _empty_near(query, key, value, first, end, window, n_sinks, scale)
    go = _Launch(query, key)
    dispatch.kernels("gated_decode").near[(go.n_rows,)](
        query.contiguous(), key, value, first, end, heads, masses, window, n_sinks, scale, **go.sizes, **go.fixed
    )
    return heads, masses


@near_read.register_fake
def _empty_near(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads = query.new_empty(query.shape)
    return heads, query.new_empty(query.shape[0], 2, query.shape[1], dtype=torch.float32)


def gated_read(
    near: tuple[Tensor, Tensor], reads: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor,
    window: int, n_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Full attention where a gate is open; arguments and result as in `attention.gated_read`."""
    return _gated_read(query, key, value, first, end, *near, reads, window, n_sinks, scale)


def full_read(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Attention to all visible keys; arguments and result as in `attention.full_read`."""
    return _gated_read(query, key, value, first, end, None, None, None, 0, 0, scale)


@torch.library.custom_op(
    "cramlab::gated_read",
    mutates_args=(),
    schema=f"({_POSITIONS}, Tensor? near, Tensor? masses, Tensor? reads, {_SIZES}) -> Tensor",
)
@dispatch.launching
def _gated_read(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, near: Tensor | None, masses: Tensor | None,
    reads: Tensor | None, window: int, n_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Far keys in splits and their join with the near keys; without near keys and gates, all keys are far."""
    go, heads, kernels = _Launch(query, key), query.new_empty(query.shape), dispatch.kernels("gated_decode")
    n_splits = n_splits_of(key.shape[2], key.shape[1])
    part = query.new_empty(*query.shape[:2], n_splits, query.shape[2], dtype=torch.float32)
    sums = query.new_empty(*query.shape[:2], n_splits, dtype=torch.float32)
    gates = query if reads is None else reads.view(torch.int8)  # the kernels need some pointer
    steps = (0, 0) if reads is None else (reads.stride(0), reads.stride(1) if reads.shape[1] > 1 else 0)
    far = {"window": window, "n_sinks": n_sinks, "n_splits": n_splits, "gated": reads is not None}
    kernels.far[(n_splits, go.n_rows)](
        query.contiguous(),
        key,
        value,
        first,
        end,
        gates,
        *steps,
        part,
        sums,
        scale=scale,
        **far,
        **go.sizes,
        **go.fixed,
    )
    empty = query if near is None else near.contiguous(), query if masses is None else masses
    kernels.join[(query.shape[0] * query.shape[1],)](
        part, sums, first, end, gates, *steps, *empty, heads, n_heads=query.shape[1], shared=go.sizes["shared"],
        width=go.fixed["width"], block_n=_power(n_splits), **far,
    )  # fmt: skip
    return heads


@_gated_read.register_fake
def _empty_heads(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


class _Launch:
    """Sizes and constants that the launches of one call share."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        n_groups, n_places, width = key.shape[1:]
        shared = query.shape[1] // n_groups
        self.n_rows = len(query) * n_groups
        self.sizes = {"n_groups": n_groups, "shared": shared, "n_places": n_places}
        narrow = width == 128 and query.dtype == torch.float32
        self.fixed = {
            "width": width,
            "block_g": max(_LEAST_QUERIES, _power(shared)),
            "block_s": _BLOCK // 2 if narrow else _BLOCK,
        }


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
