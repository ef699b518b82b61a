"""Settings of an audit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cramlab.config import ConfigError, Count, CountOrZero, Positive, Seed, Size, checked

_OpenShare = Annotated[float, Field(gt=0, lt=1)]


@checked("audit")
class AuditConfig:
    """Settings that an audit's figures depend on, besides model, text and code.

    Attributes:
        context: tokens per context. Documents are cut into whole contexts; the remainder is not used.
        contexts_per_document: largest number of contexts per document, taken from its start.
        unit: what parts and intervals count: "document", or "piece": a block of `contexts_per_document` contexts of a
            longer document, for text with few documents. Such blocks depend on each other, so intervals are too narrow.
        fit_tokens: largest number of tokens that the probes are fitted on.
        validation_tokens: largest number of tokens, of other documents, on which ridge strengths are selected.
        test_tokens: largest number of tokens, of yet other documents, on which all figures are measured.
        causal_tokens: number of test tokens on which the loss under replacements is measured; 0: not measured.
        batch_tokens: tokens per forward pass, rounded down to whole contexts; at least one context.
        layers: layers to audit; None: all.
        strengths: ridge strengths to select from, see `RidgePath`.
        replaced_fracs: shares of tokens at which attention's output is replaced, at random or the best predicted.
        ngram: length of n-grams; a token is "repeated" when the n-gram ending in it occurred before in its context.
        n_bootstrap: number of resamples of the documents for every interval.
        confidence: confidence level of the intervals.
        seed: seed of the split, the shuffled control, the random tokens and the bootstrap.
    """

    context: Annotated[int, Field(ge=4, le=2**20)] = 512
    contexts_per_document: Count = 4
    unit: Literal["document", "piece"] = "document"
    fit_tokens: Count = 100_000
    validation_tokens: Count = 20_000
    test_tokens: Count = 40_000
    causal_tokens: CountOrZero = 4_096
    batch_tokens: Count = 1_024
    layers: tuple[Annotated[int, Field(ge=0, le=2**20)], ...] | None = None
    strengths: tuple[Positive, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    replaced_fracs: tuple[_OpenShare, ...] = (0.25, 0.5, 0.75)
    ngram: Size = 3
    n_bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000
    confidence: _OpenShare = 0.95
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Raises ConfigError when a list of values is empty or holds a value twice."""
        for name in ("strengths", "replaced_fracs", "layers"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigError(f"audit.{name} = {values} must hold at least one value, and no value twice")
