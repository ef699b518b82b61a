"""What one audit is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cramlab.config import ConfigError, Count, CountOrZero, Positive, Seed, Size, checked

_OpenShare = Annotated[float, Field(gt=0, lt=1)]


@checked("audit")
class AuditConfig:
    """Everything that an audit's figures depend on, besides model, text and code.

    Attributes:
        context: tokens a context; documents are cut into whole contexts, what is left over is not used.
        contexts_per_document: at most, from the start of the document, so that none dominates.
        fit_tokens: tokens (at most) that the probes are fitted on.
        validation_tokens: tokens (at most) of other documents, on which ridge strengths are chosen.
        test_tokens: tokens (at most) of yet other documents; looked at once.
        causal_tokens: how many of the test tokens are run again with answers replaced; 0: no causal side.
        batch_tokens: tokens a forward pass, rounded down to whole contexts; at least one context.
        layers: the layers to audit; None: all.
        strengths: ridge strengths to choose from, see `RidgePath`.
        replaced_fracs: shares of tokens whose answer is replaced, random or best-predicted.
        ngram: a token is "repeated" when the n-gram that ends in it occurred before in its context.
        n_bootstrap: resamples of the documents behind every interval.
        confidence: of the intervals.
        seed: of the split, the shuffled control, the random tokens and the bootstrap.
    """

    context: Annotated[int, Field(ge=4, le=2**20)] = 512
    contexts_per_document: Count = 4
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
        """Each error names the field, the value and the fix."""
        for name in ("strengths", "replaced_fracs", "layers"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigError(f"audit.{name} = {values} must hold at least one value, and each of them once")
