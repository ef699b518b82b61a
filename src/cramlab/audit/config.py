"""What one audit is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
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

    context: int = 512
    contexts_per_document: int = 4
    fit_tokens: int = 100_000
    validation_tokens: int = 20_000
    test_tokens: int = 40_000
    causal_tokens: int = 4_096
    batch_tokens: int = 1_024
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    replaced_fracs: tuple[float, ...] = (0.25, 0.5, 0.75)
    ngram: int = 3
    n_bootstrap: int = 1_000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        least_of = {"context": 4, "causal_tokens": 0, "seed": 0} | dict.fromkeys(
            ("contexts_per_document", "fit_tokens", "validation_tokens", "test_tokens", "batch_tokens", "ngram",
             "n_bootstrap"), 1,
        )  # fmt: skip
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"audit.{name} = {getattr(self, name)} must be at least {least}")
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"audit.strengths = {self.strengths} must be positive numbers, at least one")
        if any(not 0 < frac < 1 for frac in self.replaced_fracs):
            raise ValueError(f"audit.replaced_fracs = {self.replaced_fracs} must lie between 0 and 1")
        if not 0 < self.confidence < 1:
            raise ValueError(f"audit.confidence = {self.confidence} must lie between 0 and 1, as in 0.95")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"audit.layers = {self.layers} must be layer numbers from 0, or None for all")
