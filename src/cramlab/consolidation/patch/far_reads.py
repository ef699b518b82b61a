"""The patch at one attention sub-layer: an abstract class whose one method decides which tokens read the far past.

Attention is split in two. Every token attends to a window of recent keys and to the first few keys; a *far read* is
attention to all earlier keys. A skipping rule is a subclass of `FarReads` with one method, `decide`. `calls` executes
it, `install` puts it into a model.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cramlab.consolidation.patch.counts import Counts, Tally
from cramlab.hf.weights import PATCH


@dataclass
class Seen:
    """What a rule may base its decision on: one layer on one batch, before any far read.

    Attributes:
        hidden: input of attention, (B, T, D).
        near: outputs of the heads over window and first keys, (B, T, H, Dh).
        masses: log-sum-exp of the scores, over the window and over the first keys, (B, T, 2 H).
        far: whether a token has keys beyond window and first keys, bool (B, T); shared by layers, not to be changed.
        n_keys: number of keys that a token sees, itself included, int64 (B, T); shared by layers, not to be changed.
        start: position of the first token.
    """

    hidden: Tensor
    near: Tensor
    masses: Tensor
    far: Tensor
    n_keys: Tensor
    start: int
    original: Callable[[], Tensor] = field(repr=False)
    again: Callable[[Literal["full", "near"]], Tensor] = field(repr=False)

    @functools.cached_property
    def features(self) -> Tensor:
        """`hidden`, `near` and `masses` side by side, (B, T, F); computing them needs no far read."""
        return torch.cat([self.hidden, self.near.flatten(2), self.masses], dim=-1)

    @functools.cached_property
    def full(self) -> Tensor:
        """Outputs of the heads under full attention, (B, T, H, Dh). Computing them saves nothing; for analysis."""
        return self.original()

    @functools.cached_property
    def added(self) -> Tensor:
        """What far reads add to the output of the output projection, (B, T, D), from two more runs of the module.

        It is right where a gate or a norm stands behind attention, too. For analysis, in passes without a cache.
        """
        return self.again("full") - self.again("near")


Decision = tuple[Tensor, Tensor | None]


class FarReads(nn.Module, ABC):
    """A skipping rule at one attention sub-layer; a subclass decides which tokens make a far read.

    Args:
        window: number of most recent keys that every token attends to, itself included.
        n_sinks: number of first keys that every token attends to.

    Raises:
        ValueError: when `window` or `n_sinks` is too small.
    """

    CHILD = PATCH  # name of the patch under the attention module

    def __init__(self, *, window: int, n_sinks: int) -> None:
        super().__init__()
        for name, value, least in (("window", window, 1), ("n_sinks", n_sinks, 0)):
            check_size(name, value, least)
        self.window, self.n_sinks = window, n_sinks
        self.tally = Tally()
        self.handles: list[RemovableHandle] = []  # handles of its hooks, while it is installed
        self.register_load_state_dict_post_hook(_ignore_missing_patch)

    @abstractmethod
    def decide(self, seen: Seen) -> Decision | None:
        """Which tokens make a far read, and what is added to the layer's output for the others.

        Args:
            seen: what is known before a far read.

        Returns:
            A pair (reads, answer), or None: the original attention answers for all tokens.

            reads: bool (B, T), executed for those tokens alone; or bool (B, T, H), executed for the heads that have a
            reader; or floating in [0, 1] of either shape, a mixture computed for all tokens, which is differentiable.

            answer: (B, T, D), added to the layer's output where a token does not read; None: nothing is added.
            Tokens without far keys are left alone whatever is decided.
        """

    never_reads: bool = False  # no token can ever read, so keys beyond the window cannot be reached
    reads_all: bool = False  # every token reads, so the original attention answers and `decide` is not called

    @property
    def counts(self) -> Counts:
        """Work done since the layer was made or its counts were reset."""
        return self.tally.total()

    @property
    def attached(self) -> bool:
        """Whether the layer is installed at an attention module."""
        return bool(self.handles)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own tensors; none of them when the state of the patched model is asked for."""
        destination = kwargs.get("destination", args[0] if args else None)
        return super().state_dict(*args, **kwargs) if destination is None or not self.attached else destination


def check_size(name: str, value: object, least: int) -> None:
    """Raises `ValueError` unless the value of an argument is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value} must be a whole number, at least {least}")


def _ignore_missing_patch(_: nn.Module, keys: Any) -> None:
    """Lets a patched model load the state of the original, which holds no tensors of the patch."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{FarReads.CHILD}." not in key]
