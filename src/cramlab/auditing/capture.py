"""Captures inputs and outputs of attention by forward hooks, which are always removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cramlab.errors import AuditError
from cramlab.hf.attention_sites import AttentionSite


@dataclass(frozen=True)
class Seen:
    """Inputs and outputs of one site on one batch, one row per token.

    Attributes:
        stream: residual stream before the norm, (N, D).
        hidden: input of attention, after the norm, (N, D).
        heads: concatenated outputs of the heads before the output projection, (N, H Dh).
        answer: output of the sub-layer, after the output projection, (N, D).
    """

    stream: Tensor
    hidden: Tensor
    heads: Tensor
    answer: Tensor


@contextlib.contextmanager
def hooked(handles: Callable[[], Iterator[RemovableHandle]]) -> Iterator[None]:
    """Registers hooks, and removes all of them at the end, also after an error while registering."""
    registered: list[RemovableHandle] = []
    try:
        for handle in handles():
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()


def input_hooks(site: AttentionSite, take: Callable[[Tensor, Tensor], None]) -> Iterator[RemovableHandle]:
    """Registers a hook that calls `take(stream, hidden)`, (B, T, D) each, before the site's attention runs."""
    if site.norm is not None:

        def after(_: nn.Module, args: Any, output: Any) -> None:
            take(args[0], output)

        yield site.norm.register_forward_hook(after)
        return

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        take(hidden, hidden)

    yield site.attention.register_forward_pre_hook(before, with_kwargs=True)


@contextlib.contextmanager
def watching(sites: Sequence[AttentionSite], look: Callable[[int, Seen], None]) -> Iterator[None]:
    """While open, every forward pass calls `look(i, seen)` for each site i. The model's outputs do not change.

    Raises:
        AuditError: from the forward pass, when a captured value is not finite (names the layer), or attention ran
            for some of the tokens only.
    """

    def handles() -> Iterator[RemovableHandle]:
        for i, site in enumerate(sites):
            inputs: list[Tensor] = []

            def take(stream: Tensor, hidden: Tensor, inputs: list[Tensor] = inputs) -> None:
                inputs[:] = [stream.detach(), hidden.detach()]

            def after(
                _: nn.Module, args: tuple[Any, ...], output: Tensor, i: int = i, inputs: list[Tensor] = inputs
            ) -> None:
                if not inputs or inputs[0].shape != output.shape:
                    raise AuditError(
                        f"layer {sites[i].layer}: attention ran for some of the tokens only, so its output for the "
                        "others is unknown; let every token read (hf.loading.reading_all)"
                    )
                rows = [t.detach().flatten(0, -2).float() for t in (*inputs, args[0], output)]
                inputs.clear()
                _refuse_not_finite(sites[i].layer, rows)
                look(i, Seen(*rows))

            yield from input_hooks(site, take)
            yield site.out_proj.register_forward_hook(after)

    with hooked(handles):
        yield


def _refuse_not_finite(layer: int, rows: Sequence[Tensor]) -> None:
    names = ("residual stream before", "normalised input of", "heads' outputs of", "output of")
    for name, values in zip(names, rows, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise AuditError(
                f"layer {layer}: the {name} attention holds NaN or infinity; check the weights, or load the model in "
                "float32"
            )
