"""The settings of a consolidation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cramlab.config import ConfigError, Count, CountOrZero, Positive, Seed, Size, checked


@checked("consolidation")
class ConsolidationConfig:
    """Everything that a consolidation depends on, besides model, text and code.

    Each document gives one context, from its start; the parts are disjoint sets of documents. With `unit` "piece" it
    gives all its contexts, and the parts are blocks of successive ones, see `pieces.blocks`.

    Attributes:
        context: length of a context, tokens.
        shortest: number of tokens that a document needs; one that is shorter than `context` is a context by itself.
            0: as many as `context`.
        unit: what the parts and the guarantee count: "document", or "piece": a context of a document that gives
            several, for text with few documents. Such pieces depend on each other, so their guarantee is weaker.
        window: number of most recent keys that every token attends to, itself included.
        n_sinks: number of first keys that every token attends to.
        fit_documents: number of documents for fitting adapters.
        sensitivity_documents: number of documents for estimating what a layer's error costs, in nats.
        layers_per_document: number of layers that go without far reads, one at a time, on each of these.
        gate_documents: number of documents for fitting gates.
        validation_documents: number of documents for choosing ridge strengths, ranks and candidate thresholds.
        calibration_documents: number of documents for the guarantee; used once per calibration.
        test_documents: number of documents for the reported figures; used once per calibration.
        tokens_per_document: number of tokens of a document that enter the statistics, drawn at random.
        strengths: ridge strengths to choose from, see `auditing.regression.RidgePath`.
        max_rank: largest rank of an adapter's linear part.
        adapter_bytes: size of the linear parts of all adapters together, at most, with two bytes a number.
        units: number of GELU units in each layer, shared by adapter and gate; they are learned by gradients only.
        local_steps: number of gradient steps on each layer's own error; 0: none.
        end_steps: number of gradient steps on the model's output; 0: none.
        end_loss: "kl": KL divergence from the original's next-token distribution; "nats": loss on the text itself.
        batch_contexts: number of contexts per gradient step.
        learning_contexts: number of contexts for gradient steps, at most; a document gives as many as it is long.
        learning_lengths: further lengths of contexts for gradient steps, tokens; each step draws one of them or
            `context`, with as many tokens in all. Thresholds then depend on the number of keys that a token sees.
        planted_frac: share of the contexts of gradient steps in which repeats are planted, see `learn.planting`.
        learning_rate: peak learning rate of Adam, for maps of standardised features; see `Distiller` for maps up.
        learning_fracs: shares of far reads skipped in gradient steps, one for each context in turn, ascending.
        temperature: initial temperature at which reads are drawn in gradient steps, in units of the gates' scores; it
            falls to a fifth.
        skipped_fracs: shares of far reads to skip for which candidate thresholds are made, ascending.
        calibrated_lengths: further lengths, tokens, at which the guarantee must hold as well.
        delta: probability that the guarantee fails, at most.
        bound_factor: cap of a document's loss increase, as a multiple of the guaranteed one; at most 100, as the number
            of documents that a guarantee needs grows with it.
        seed: seed of the split into parts and of all sampling.
    """

    RECORD_TYPE: ClassVar[str] = "RetrofitConfig"  # its first name, which records keep

    context: Size = 1024
    shortest: CountOrZero = 0
    unit: Literal["document", "piece"] = "document"
    window: Size = 64
    n_sinks: Annotated[int, Field(ge=0, le=2**20)] = 4
    fit_documents: Size = 64
    sensitivity_documents: Size = 12
    layers_per_document: Size = 8
    gate_documents: Size = 32
    validation_documents: Size = 12
    calibration_documents: Size = 64
    test_documents: Size = 24
    tokens_per_document: Count = 256
    strengths: tuple[Positive, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    max_rank: Annotated[int, Field(ge=0, le=2**20)] = 64
    adapter_bytes: CountOrZero = 4_000_000
    units: Annotated[int, Field(ge=0, le=2**20)] = 32
    local_steps: CountOrZero = 32
    end_steps: CountOrZero = 64
    end_loss: Literal["kl", "nats"] = "kl"
    batch_contexts: Size = 1
    learning_contexts: Count = 1024
    learning_lengths: tuple[Size, ...] = ()
    planted_frac: Annotated[float, Field(ge=0, le=1)] = 0.0
    learning_rate: Positive = 1e-3
    learning_fracs: tuple[float, ...] = (0.6, 0.75, 0.9, 0.95)
    temperature: Positive = 0.5
    skipped_fracs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.98, 1.0)
    calibrated_lengths: tuple[Size, ...] = ()
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    bound_factor: Annotated[float, Field(gt=1, le=100)] = 5.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.context <= self.window + self.n_sinks + 1:
            raise ConfigError(
                f"consolidation.context = {self.context} leaves nothing far beyond window {self.window} and "
                f"{self.n_sinks} first keys; use a longer context or a shorter window"
            )
        if self.shortest and not self.window + self.n_sinks + 1 < self.shortest <= self.context:
            raise ConfigError(
                f"consolidation.shortest = {self.shortest} must be above {self.window + self.n_sinks + 1} (window, "
                f"first keys and 1), so that something is far, and at most the context, {self.context}; or 0"
            )
        for name in ("learning_lengths", "calibrated_lengths"):
            lengths, least = getattr(self, name), self.window + self.n_sinks + 2
            if len({self.context, *lengths}) <= len(lengths) or min(lengths, default=least) < least:
                raise ConfigError(
                    f"consolidation.{name} = {lengths} must be different lengths, none of them that of a context "
                    f"({self.context}) and each at least {least}, so that something is far"
                )
        if self.calibrated_lengths and self.unit == "piece":
            raise ConfigError(
                f"consolidation.calibrated_lengths = {self.calibrated_lengths} needs documents; pieces of documents "
                "(consolidation.unit) have one length: use ()"
            )
        if not self.strengths:
            raise ConfigError("consolidation.strengths = () is empty; give at least one ridge strength")
        for name, most in (("skipped_fracs", 1.0), ("learning_fracs", 0.999)):
            fracs = getattr(self, name)
            if not fracs or list(fracs) != sorted(set(fracs)) or not 0 < fracs[0] <= fracs[-1] <= most:
                raise ConfigError(
                    f"consolidation.{name} = {fracs} must be shares above 0, at most {most:g}, in ascending order"
                )

    @property
    def least_tokens(self) -> int:
        """Number of tokens that a document needs, `context` where `shortest` is 0."""
        return self.shortest or self.context

    @property
    def longest_learned(self) -> int:
        """Length of the longest contexts for gradient steps, tokens."""
        return max((self.context, *self.learning_lengths))

    @property
    def n_offsets(self) -> int:
        """Number of offsets of a gate, see `ConsolidatedAttention.offset`: up to the longest context, or none."""
        return (self.longest_learned - 1).bit_length() + 1 if self.learning_lengths else 0


PARTS = ("test", "calibration", "validation", "gate", "sensitivity", "fit")
GROUPS = (*PARTS, "learning", "further")  # the last two are contexts for gradient steps
HELD_OUT = PARTS[:3]  # no weight is learned from these
# Fields that another calibration of the same weights may change; those of the second also change its documents.
RECALIBRATED = ("skipped_fracs", "delta", "bound_factor", "calibrated_lengths")
REDRAWN = ("context", "shortest", "unit", "seed", "test_documents", "calibration_documents", "validation_documents")
