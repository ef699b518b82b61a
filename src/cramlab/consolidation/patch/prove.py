"""Proof of a patch on the spot: on a few tokens, every patched layer is compared with the original.

A layer gets the same input as in the original's pass, whatever the layers below it made of it, so that no rounding is
carried upwards (a mixture of experts could send a token elsewhere). Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.consolidation.patch.attach import attach, closed, remove
from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.look import first
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.structure import base_model, some_tokens

N_TOKENS = 14
_N_PADDING, _WINDOW, _N_SINKS = 3, 3, 1
_PIECES = (N_TOKENS - 3, 1, 1, 1)  # tokens of each call with a cache


class _Some(FarReads):
    """Reads for all tokens in the first sequence of two, and for some positions in the last; half the input answers.

    Args:
        layer: index of the block, on which the positions depend.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(window=_WINDOW, n_sinks=_N_SINKS)
        self.layer, self.n_padding = layer, 0

    def decide(self, seen: Seen) -> Decision:
        """The same decision for a token in every pass."""
        n_batch, n_tokens = seen.far.shape
        positions = torch.arange(seen.start, seen.start + n_tokens, device=seen.far.device) - self.n_padding
        reads = ((5 * positions + self.layer) % 3 == 0).expand(n_batch, -1)
        if n_batch == 2:
            reads = torch.stack([torch.ones_like(reads[0]), reads[1]])
        return reads, seen.hidden / 2


class _Passes:
    """Passes of a model in which attention gets given inputs.

    Args:
        model: the model.
        sites: sites whose input is given and whose output is kept.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.model, self.sites, self.base = model, sites, base_model(model)
        self.given: list[Tensor] | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, inputs of attention are replaced by `given`, unless it is None; inputs and outputs are kept."""
        handles = []
        for i, site in enumerate(self.sites):

            def enter(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if self.given is not None:
                    hidden = self.given[i]
                    args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
                self.inputs.append(hidden)
                return args, kwargs

            def leave(_: nn.Module, __: Any, output: Any) -> None:
                self.outputs.append(first(output).clone())

            handles += [
                site.attention.register_forward_pre_hook(enter, with_kwargs=True),
                site.attention.register_forward_hook(leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def positions(self, positions: Tensor) -> dict[str, Any]:
        """The argument for positions (1, T), as `generate` gives it; none for a model that takes no positions."""
        takes = "position_ids" in inspect.signature(type(self.base).forward).parameters
        return {"position_ids": positions} if takes else {}

    def run(self, given: list[Tensor] | None, tokens: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
        """Outputs of each site, and what the model without its head returned."""
        self.given, self.inputs, self.outputs = given, [], []
        returned = self.base(input_ids=tokens, **options)
        return self.outputs, returned


@torch.no_grad()
def prove(model: nn.Module, sites: Sequence[AttentionSite]) -> None:
    """Compares a patch at each site with the original, on a few tokens.

    Closed, it must be equal bit for bit. With all reads made it must equal the original, with a cache the pass without
    one, and behind padding on the left the pass without it: each number up to the square root of the dtype's machine
    epsilon (0.0003 in float32, 0.09 in bfloat16) times the root mean square of the layer's output. Tokens without far
    keys are computed over window and first keys, so these are compared as well.

    Raises:
        ConsolidationError: when one of these fails; the message names it, the layer and the difference.
    """
    passes = _Passes(model, sites)
    tokens = some_tokens(model, N_TOKENS)
    layers = {site.layer: _Some(site.layer) for site in sites}
    with passes.hooked():
        original, _ = passes.run(None, tokens, use_cache=False)
        inputs = passes.inputs
        attach(model, layers, {site.layer: site for site in sites})
        try:
            _try(model, passes, inputs, original, tokens, layers)
        finally:
            remove(model)


def _try(
    model: nn.Module, passes: _Passes, inputs: list[Tensor], original: list[Tensor], tokens: Tensor,
    layers: dict[int, _Some],
) -> None:  # fmt: skip
    def compare(what: str, got: Callable[[], list[Tensor]], wanted: list[Tensor], *, exactly: bool = False) -> None:
        _compare(model, list(layers), what, got, wanted, exactly=exactly)

    def shut() -> list[Tensor]:
        with closed(model):
            return passes.run(inputs, tokens, use_cache=False)[0]

    compare("a closed patch", shut, original, exactly=True)
    both: list[Tensor] = []

    def opened() -> list[Tensor]:
        both.extend(passes.run([x.repeat(2, 1, 1) for x in inputs], tokens.repeat(2, 1), use_cache=False)[0])
        return [y[:1] for y in both]

    compare("a patch whose reads are all made", opened, original)
    some = [y[1:] for y in both]

    def cached() -> list[Tensor]:
        cache, begun, parts = None, 0, []
        for piece in tokens.split(list(_PIECES), dim=1):
            own = [x[:, begun : begun + piece.shape[1]] for x in inputs]
            positions = torch.arange(begun, begun + piece.shape[1], device=tokens.device)[None]
            options = passes.positions(positions) | {"use_cache": True, "past_key_values": cache}
            outputs, returned = passes.run(own, piece, **options)
            cache, begun = returned.past_key_values, begun + piece.shape[1]
            parts.append(outputs)
        return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]

    compare("a patch with a cache", cached, some)

    def padded() -> list[Tensor]:
        for layer in layers.values():
            layer.n_padding = _N_PADDING
        ids = F.pad(tokens, (_N_PADDING, 0))
        mask = torch.ones_like(ids)
        mask[:, :_N_PADDING] = 0
        options = passes.positions((mask.cumsum(1) - 1).clamp(min=0)) | {"attention_mask": mask, "use_cache": False}
        outputs, _ = passes.run([F.pad(x, (0, 0, _N_PADDING, 0)) for x in inputs], ids, **options)
        return [y[:, _N_PADDING:] for y in outputs]

    compare("a patch behind padding", padded, some)


def _compare(
    model: nn.Module, layers: Sequence[int], what: str, got: Callable[[], list[Tensor]], wanted: list[Tensor], *,
    exactly: bool,
) -> None:  # fmt: skip
    """Refuses the first layer whose output is not the wanted one."""
    kind = type(model).__name__
    try:
        outputs = got()
    except ConsolidationError:
        raise
    except Exception as error:
        raise ConsolidationError(f"{kind} cannot be patched: {what} ends in {type(error).__name__}: {error}") from error
    for layer, own, other in zip(layers, outputs, wanted, strict=True):
        limit = 0.0 if exactly else torch.finfo(other.dtype).eps ** 0.5
        size = float(other.double().square().mean().sqrt())
        error = float((own.double() - other.double()).abs().max())
        if not error <= limit * size:
            raise ConsolidationError(
                f"{kind} cannot be patched: in layer {layer} the output of {what} differs by {error:.1e}; {limit:.1e} "
                f"times the root mean square of the output, {size:.1e}, is allowed"
            )
