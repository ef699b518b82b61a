"""Replaces the output of attention during a forward pass, and measures the loss that follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from cramlab.auditing.capture import hooked, input_hooks
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import MAIN, SiteFit
from cramlab.auditing.redundancy import measure
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.structure import hidden_states

Answerer = Callable[[Tensor, Tensor], Tensor]
KINDS = ("probe", "mean", "zero")


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One replacement of attention's output.

    Attributes:
        kind: what replaces it: the main "probe", the "mean" output, or "zero" (the sub-layer is removed).
        sites: indices of the sites.
        share: share of the tokens of every context that is replaced in each of these sites.
        choice: which tokens: "all", "random" ones, or those that the probe predicts "best". The latter is an oracle,
            as it compares the probe with attention's actual output: no gate can select better by the error.
    """

    kind: Literal["probe", "mean", "zero"]
    sites: tuple[int, ...]
    share: float = 1.0
    choice: Literal["all", "random", "best"] = "all"


def plan(fits: Sequence[SiteFit], config: AuditConfig) -> dict[str, list[Replacement]]:
    """Returns the replacements to try, by family; each list holds the kinds of `KINDS` in turn.

    "alone": each layer by itself. "cumulative": the 2, 4, 8, ... layers that are best predicted on validation, and all
    layers. "partial": a share of the tokens in all layers.
    """
    n_sites = len(fits)
    order = sorted(range(n_sites), key=lambda i: -fits[i].validation_r2)
    counts = sorted({min(2**k, n_sites) for k in range(1, n_sites.bit_length() + 1)} if n_sites > 1 else {1})
    everywhere = tuple(range(n_sites))
    return {
        "alone": [Replacement(kind=kind, sites=(i,)) for i in everywhere for kind in KINDS],
        "cumulative": [Replacement(kind=kind, sites=tuple(order[:n])) for n in counts for kind in KINDS],
        "partial": [
            Replacement(kind=kind, sites=everywhere, share=share, choice=choice)
            for share in config.replaced_fracs
            for choice in ("random", "best")
            for kind in KINDS
        ],
    }


@contextlib.contextmanager
def replacing(sites: Sequence[AttentionSite], answers: Mapping[int, Answerer]) -> Iterator[None]:
    """While open, `answers[i](hidden, answer)` replaces the output of site i; all are (B, T, D).

    `hidden` is the input of attention, `answer` its actual output.
    """

    def handles() -> Iterator[RemovableHandle]:
        for i, answerer in answers.items():
            hidden: list[Tensor] = []

            def take(_: Tensor, seen: Tensor, hidden: list[Tensor] = hidden) -> None:
                hidden[:] = [seen]

            def after(
                _: nn.Module, __: Any, output: Tensor, hidden: list[Tensor] = hidden, answerer: Answerer = answerer
            ) -> Tensor:
                return answerer(hidden.pop(), output)

            yield from input_hooks(sites[i], take)
            yield sites[i].out_proj.register_forward_hook(after)

    with hooked(handles):
        yield


def answerers(replacement: Replacement, fits: Sequence[SiteFit], seed: int) -> dict[int, Answerer]:
    """Returns the functions that replace outputs in one forward pass; random tokens depend on seed and site alone."""
    return {i: _answerer(replacement, fits[i], seed * 1_009 + i) for i in replacement.sites}


def _answerer(replacement: Replacement, fit: SiteFit, seed: int) -> Answerer:
    probe, mean = fit.probes[MAIN].layer, fit.probes["mean"].layer

    def answer(hidden: Tensor, truth: Tensor) -> Tensor:
        if replacement.kind == "probe":
            stand_in = probe(hidden.float()).to(truth.dtype)
        elif replacement.kind == "mean":
            stand_in = mean(torch.zeros_like(truth[..., 0], dtype=torch.long)).to(truth.dtype)
        else:
            stand_in = torch.zeros_like(truth)
        if replacement.choice == "all":
            return stand_in
        if replacement.choice == "random":
            scores = torch.rand(truth.shape[:2], generator=torch.Generator().manual_seed(seed)).to(truth.device)
        else:
            scores = measure(truth.float(), probe(hidden.float())).r
        return torch.where(_top(scores, replacement.share)[..., None], stand_in, truth)

    return answer


def _top(scores: Tensor, share: float) -> Tensor:
    """Returns a mask that is true at the highest `share` of each row of scores (B, T)."""
    n = round(share * scores.shape[1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(n, dim=1).indices, True)


class Remembered:
    """Caches the outputs of all blocks on one batch, for runs that differ in later layers only.

    While the cache is used, the forward methods of earlier blocks return cached outputs; they are restored afterwards.
    """

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self._sites = sites
        self._outputs: list[Any] = [None] * len(sites)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """While open, forward passes fill the cache."""

        def handles() -> Iterator[RemovableHandle]:
            for i, site in enumerate(self._sites):

                def after(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
                    self._outputs[i] = output

                yield site.block.register_forward_hook(after)

        with hooked(handles):
            yield

    @contextlib.contextmanager
    def up_to(self, n_sites: int) -> Iterator[None]:
        """While open, the blocks of the first `n_sites` sites return their cached outputs."""
        before: list[tuple[nn.Module, Any]] = []
        try:
            for site, output in zip(self._sites[:n_sites], self._outputs, strict=False):
                before.append((site.block, vars(site.block).get("forward")))
                site.block.forward = lambda *_, output=output, **__: output
            yield
        finally:
            for block, forward in before:
                del block.forward
                if forward is not None:
                    block.forward = forward


def memory_serves(model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor) -> bool:
    """Returns whether blocks pass on only their outputs, so that `Remembered` gives the same result; tried on (B, T).

    A counterexample is Gemma 3n, in which later layers use keys and values of earlier ones.
    """
    memory = Remembered(sites)
    with memory.remembering():
        before = hidden_states(model, tokens)
    for n_sites in range(1, len(sites)):
        try:
            with memory.up_to(n_sites):
                after = hidden_states(model, tokens)
        except Exception:  # any error of a block that needs what an earlier block computes
            return False
        if not torch.allclose(before, after, rtol=1e-5, atol=1e-6, equal_nan=True):
            return False
    return True


class NextToken:
    """Loss of a causal model: cross-entropy, in nats, of each token but the first."""

    kind = "next-token"

    def __call__(self, model: nn.Module, tokens: Tensor, _seed: int) -> Tensor:
        """Returns the summed loss of each context, (B,), nats."""
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        nats = [F.cross_entropy(row.float(), ids[1:], reduction="sum") for row, ids in zip(logits, tokens, strict=True)]
        return torch.stack(nats).double()

    def n_tokens(self, tokens: Tensor, _seed: int) -> Tensor:
        """Returns the number of tokens with a loss in each context, (B,)."""
        return torch.full((len(tokens),), tokens.shape[1] - 1, dtype=torch.float64)


class MaskedToken:
    """Loss of an encoder: cross-entropy, in nats, of 15% of the tokens, which are masked."""

    kind = "masked-token"

    def __init__(self, mask_token: int) -> None:
        self.mask_token = mask_token

    def _hidden(self, tokens: Tensor, seed: int) -> Tensor:
        scores = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
        return _top(scores.to(tokens.device), 0.15)

    def __call__(self, model: nn.Module, tokens: Tensor, seed: int) -> Tensor:
        """Returns the summed loss of each context, (B,), nats."""
        hidden = self._hidden(tokens, seed)
        logits = model(input_ids=tokens.masked_fill(hidden, self.mask_token)).logits.float()
        nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return (nats * hidden).sum(dim=1).double()

    def n_tokens(self, tokens: Tensor, seed: int) -> Tensor:
        """Returns the number of tokens with a loss in each context, (B,)."""
        return self._hidden(tokens, seed).sum(dim=1).double()


Loss = NextToken | MaskedToken


def losses(
    model: nn.Module,
    loss: Loss,
    sites: Sequence[AttentionSite],
    fits: Sequence[SiteFit],
    replacements: Sequence[Replacement],
    tokens: Tensor,
    seed: int,
    *,
    remember: bool = True,
) -> Tensor:
    """Returns the loss of each context of (B, T), unchanged and under every replacement, (B, 1 + replacements), nats.

    With `remember`, blocks before the first replaced one are not computed again; requires `memory_serves`.
    """
    memory = Remembered(sites)
    with memory.remembering():
        nats = [loss(model, tokens, seed)]
    for replacement in replacements:
        stand_ins = answerers(replacement, fits, seed)
        with memory.up_to(min(replacement.sites) if remember else 0), replacing(sites, stand_ins):
            nats.append(loss(model, tokens, seed))
    return torch.stack(nats, dim=1)
