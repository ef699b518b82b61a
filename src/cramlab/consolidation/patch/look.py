"""Looking at attention while the original runs: what each module hands to transformers' AttentionInterface."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cramlab.consolidation.patch.originals import Original, register
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.structure import hidden_states

_LOOKING = {"sdpa": "cramlab_looking", "eager": "cramlab_looking_eager"}


@dataclass
class Look:
    """What one attention module did in one pass of the original.

    Attributes:
        hidden: its input, (B, T, D).
        output: what it returned, (B, T, D).
        projected: input of the output projection.
        arguments: keyword arguments that it handed to the interface; None: it did not ask.
        n_heads: number of query heads.
        d_head: width of the output of one head.
        n_calls: how often it asked.
        direct: whether the projection took the heads' outputs as they were.
    """

    hidden: Tensor | None = None
    output: Tensor | None = None
    projected: Tensor | None = None
    arguments: dict[str, Any] | None = None
    n_heads: int = 0
    d_head: int = 0
    n_calls: int = 0
    direct: bool = False


class _Stack(threading.local):
    """The looks of the pass that this thread runs, by attention module."""

    def __init__(self) -> None:
        self.looks: dict[nn.Module, tuple[Look, list[Tensor]]] = {}


_stack = _Stack()


@torch.no_grad()
def looked(model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor) -> list[Look]:
    """What the attention of each site does with tokens (B, T), in a model with "sdpa" or "eager" attention."""
    changed = cast(PreTrainedModel, model)
    implementation = cast(str, changed.config._attn_implementation)
    looks = [Look() for _ in sites]
    seen: list[list[Tensor]] = [[] for _ in sites]
    with _hooks(sites, looks):
        _stack.looks = {site.attention: (look, s) for site, look, s in zip(sites, looks, seen, strict=True)}
        try:
            changed.set_attn_implementation(_LOOKING[implementation])
            hidden_states(model, tokens)
        finally:
            changed.set_attn_implementation(implementation)
            _stack.looks = {}
    for look, heads in zip(looks, seen, strict=True):
        if look.projected is not None and len(heads) == 1:
            look.direct = torch.equal(look.projected.flatten(), heads[0].flatten())
    return looks


@contextmanager
def _hooks(sites: Sequence[AttentionSite], looks: Sequence[Look]) -> Iterator[None]:
    handles = []
    for site, look in zip(sites, looks, strict=True):

        def enter(_: nn.Module, args: Any, kwargs: Any, look: Look = look) -> None:
            look.hidden = args[0] if args else kwargs["hidden_states"]

        def project(_: nn.Module, args: Any, look: Look = look) -> None:
            look.projected = args[0]

        def leave(_: nn.Module, __: Any, output: Any, look: Look = look) -> None:
            look.output = first(output)

        handles += [
            site.attention.register_forward_pre_hook(enter, with_kwargs=True),
            site.out_proj.register_forward_pre_hook(project),
            site.attention.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """The output of an attention module, which may return more beside it."""
    return output[0] if isinstance(output, tuple | list) else output


def _look(
    original: Original,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function that notes its arguments and answers as the original."""
    output = original(module)(module, query, key, value, attention_mask, **kwargs)
    if module in _stack.looks:
        look, heads = _stack.looks[module]
        look.arguments, look.n_calls = kwargs, look.n_calls + 1
        look.n_heads, look.d_head = output[0].shape[-2:]
        heads.append(output[0])
    return output


register(_LOOKING, _look)
