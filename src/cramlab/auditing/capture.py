"""What goes into attention and what comes out, seen by plain forward hooks that are removed whatever happens."""

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
    """One site on one batch, a row a token.

    Attributes:
        stream: the residual stream before the norm, (N, D).
        hidden: what attention sees, (N, D).
        heads: the heads' outputs side by side, before the output projection, (N, H Dh).
        answer: after it, (N, D).
    """

    stream: Tensor
    hidden: Tensor
    heads: Tensor
    answer: Tensor


@contextlib.contextmanager
def hooked(handles: Callable[[], Iterator[RemovableHandle]]) -> Iterator[None]:
    """Registers hooks and removes every one of them at the end, also after an error, also one of registering."""
    registered: list[RemovableHandle] = []
    try:
        for handle in handles():
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()


def input_hooks(site: AttentionSite, take: Callable[[Tensor, Tensor], None]) -> Iterator[RemovableHandle]:
    """Calls `take(stream, hidden)`, (B, T, D) each, whenever the site's attention is about to be asked."""
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
    """While open, every forward pass calls `look(i, seen)` for each site i; the model's outputs are untouched.

    Raises:
        AuditError: from the forward pass, when something seen is not finite (names the layer), or attention has
            answered for some tokens only.
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
                        f"layer {sites[i].layer}: attention answered for some of the tokens only, so it is not known "
                        "what the others would have been told; let every token read (hf.loading.reading_all)"
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
    names = ("residual stream before", "normalised input of", "heads' outputs of", "answer of")
    for name, values in zip(names, rows, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise AuditError(
                f"layer {layer}: the {name} attention holds NaN or infinity; check the weights, or load the model in "
                "float32"
            )
