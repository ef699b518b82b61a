"""What sits beside an attention sub-layer of a patched model: it says which tokens read the far past, and counts.

A rule is a subclass of `FarReads` with one method, `decide`. How a rule is executed stands in `calls`, how it gets
into a model in `install`.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cramlab.hf.weights import PATCH


@dataclass
class Counts:
    """What a layer has done since it was last reset; pairs are of one head.

    Attributes:
        tokens: number of tokens seen.
        far_tokens: number of tokens with something to read beyond window and first tokens.
        far_reads: number of tokens that read; broken where some heads read and others do not (baselines).
        window_pairs: pairs scored by the windows, as executed.
        far_pairs: pairs scored by the readers, as executed.
        causal_pairs: pairs that full causal attention would have scored, each key once for every later token.
        unreachable: keys and values that have left the window of a layer that never reads, so that no later token can
            ask for them; they were written for the window.
    """

    tokens: int = 0
    far_tokens: int = 0
    far_reads: float = 0
    window_pairs: int = 0
    far_pairs: float = 0
    causal_pairs: int = 0
    unreachable: int = 0

    @property
    def skipped_frac(self) -> float:
        """Share of the far reads that were left out."""
        return 1 - self.far_reads / self.far_tokens if self.far_tokens else 0.0

    def __add__(self, other: Counts) -> Counts:
        """The sum, field by field."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Tally:
    """Counts that many threads add to. A copy, or what is loaded from a file, starts from zero."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def add(self, counts: Counts) -> None:
        """Adds what one call has done."""
        with self._lock:
            self._counts = self._counts + counts

    def total(self) -> Counts:
        """The counts so far."""
        return self._counts

    def reset(self) -> None:
        """Starts from zero."""
        with self._lock:
            self._counts = Counts()

    def __reduce__(self) -> tuple[type[Tally], tuple[()]]:
        """A fresh one, for copies and files."""
        return Tally, ()


@dataclass
class Seen:
    """What a rule may look at: one layer on one batch.

    Attributes:
        hidden: what attention sees, (B, T, D).
        near: heads of the window, (B, T, H, Dh).
        masses: logs of the sums of exponentiated scores, of the window and of the first keys, (B, T, 2 H).
        far: tokens that have something far to read, bool (B, T).
        start: place of the first token.
    """

    hidden: Tensor
    near: Tensor
    masses: Tensor
    far: Tensor
    start: int
    original: Callable[[], Tensor] = field(repr=False)

    @functools.cached_property
    def features(self) -> Tensor:
        """Hidden state, window's heads and masses side by side, (B, T, F); no read was needed for them."""
        return torch.cat([self.hidden, self.near.flatten(2), self.masses], dim=-1)

    @functools.cached_property
    def full(self) -> Tensor:
        """Heads of the full read for every token, (B, T, H, Dh). Asking for them saves nothing: for analysis."""
        return self.original()


Decision = tuple[Tensor, Tensor | None]


class FarReads(nn.Module, ABC):
    """Beside one attention sub-layer: hooks, window, far read and counting; a subclass decides who reads.

    Args:
        window: keys that every token sees, itself included.
        n_sinks: first keys that every token sees.

    Raises:
        ValueError: when window or n_sinks is too small.
    """

    CHILD = PATCH  # what it is called under the attention module

    def __init__(self, *, window: int, n_sinks: int) -> None:
        super().__init__()
        for name, value, least in (("window", window, 1), ("n_sinks", n_sinks, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"consolidated.{name} = {value} must be a whole number, at least {least}")
        self.window, self.n_sinks = window, n_sinks
        self.tally = Tally()
        self.handles: list[RemovableHandle] = []  # of its hooks, while it is in place at a model
        self.register_load_state_dict_post_hook(_forgive)

    @abstractmethod
    def decide(self, seen: Seen) -> Decision | None:
        """Which tokens read the far past, and what the others answer instead.

        Args:
            seen: what is known before a read.

        Returns:
            Reads and answers. Reads: bool (B, T), executed for those tokens alone; or bool (B, T, H), executed for the
            heads that have a reader; or floating, of either shape and from 0 to 1, a mixture computed for all tokens,
            which has a gradient. Answers, (B, T, D): added to the layer's answer, in full where a token does not read;
            None: nothing is added. Tokens that have nothing far are left alone whatever is decided. None in place of
            both: the original.
        """

    never_reads: bool = False  # no token can ever read, so keys out of the window are out of reach
    reads_all: bool = False  # every token reads, so the original answers and nothing is asked

    @property
    def counts(self) -> Counts:
        """What it has done since it was made or last reset."""
        return self.tally.total()

    @property
    def attached(self) -> bool:
        """Whether it is in place at an attention module."""
        return bool(self.handles)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Its own tensors; nothing where the state of the model it sits at is asked for, as that is the original's."""
        destination = kwargs.get("destination", args[0] if args else None)
        return super().state_dict(*args, **kwargs) if destination is None or not self.attached else destination


@dataclass
class Installation:
    """What `install` has changed, kept at the model without its head.

    Attributes:
        implementation: attention function of the original.
        handles: hooks of that model.
        layer: one of the patches.
        n_heads: query heads of its attention.
        cache_layer: index of the cache layer that its attention writes to.
        write: writes the consolidation into the folder that the model is saved to; None: nobody knows its record.
    """

    implementation: str
    handles: list[RemovableHandle]
    layer: FarReads
    n_heads: int
    cache_layer: int
    write: Callable[[nn.Module, Path], None] | None = None

    ATTRIBUTE: ClassVar[str] = "cramlab_installation"


def _forgive(_: nn.Module, keys: Any) -> None:
    """The state of the original lacks the patch; that is no fault of it."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{FarReads.CHILD}." not in key]
