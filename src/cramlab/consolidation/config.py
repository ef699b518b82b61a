"""What one consolidation is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cramlab.config import ConfigError, Count, CountOrZero, Positive, Seed, Size, checked


@checked("retrofit")
class RetrofitConfig:
    """Everything that a consolidation depends on, besides model, text and code.

    Each document gives one context, from its start; the parts are disjoint sets of documents.

    Attributes:
        context: tokens a document.
        window: keys that every token sees, itself included.
        n_sinks: first keys that every token sees.
        fit_documents: for the adapters.
        sensitivity_documents: for what a layer's error costs in nats.
        layers_per_document: layers that go without far reads, one at a time, on each of these.
        gate_documents: for the gates.
        validation_documents: for ridge strengths, ranks and the first look at the thresholds.
        calibration_documents: for the guarantee; looked at once a calibration.
        test_documents: for the figures; likewise.
        tokens_per_document: tokens of a document that enter the statistics, drawn at random.
        strengths: ridge strengths to choose from, see `audit.regression.RidgePath`.
        max_rank: of an adapter's linear part.
        adapter_bytes: of the linear parts of all adapters together, at most, at two bytes a number.
        units: numbers behind a GELU in each layer, for adapter and gate; they are learned by gradients only.
        local_steps: gradient steps on each layer's own error; 0: none.
        end_steps: gradient steps on the model's answer; 0: none.
        end_loss: "kl": divergence from the original's next-token distribution; "nats": loss on the text itself.
        batch_contexts: contexts a gradient step.
        learning_contexts: contexts that gradients are taken from, at most; a document gives as many as it is long.
        learning_rate: of Adam, at its highest, for maps of standardised features; see `Distiller` for maps up.
        learning_fracs: shares of far reads skipped while learning, each context one of them, ascending.
        temperature: of the chance with which reads are drawn while learning, in units of the gates' scores; it falls to
            a fifth of this.
        skipped_fracs: shares of far reads to skip that thresholds are made for, ascending.
        delta: the guarantee may fail in this share of all calibrations.
        bound_factor: increases of a document above so many times the promised one are counted as that much; at most
            100, as the documents that a promise needs grow with it.
        seed: of the split and of all sampling.
    """

    context: Size = 1024
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
    learning_rate: Positive = 1e-3
    learning_fracs: tuple[float, ...] = (0.6, 0.75, 0.9, 0.95)
    temperature: Positive = 0.5
    skipped_fracs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.98, 1.0)
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    bound_factor: Annotated[float, Field(gt=1, le=100)] = 5.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.context <= self.window + self.n_sinks + 1:
            raise ConfigError(
                f"retrofit.context = {self.context} leaves nothing far beyond window {self.window} and {self.n_sinks} "
                "first tokens; lengthen it, or shorten the window"
            )
        if not self.strengths:
            raise ConfigError("retrofit.strengths = () holds none; give at least one")
        for name, most in (("skipped_fracs", 1.0), ("learning_fracs", 0.999)):
            fracs = getattr(self, name)
            if not fracs or list(fracs) != sorted(set(fracs)) or not 0 < fracs[0] <= fracs[-1] <= most:
                raise ConfigError(f"retrofit.{name} = {fracs} must be shares above 0, at most {most:g}, ascending")


PARTS = ("test", "calibration", "validation", "gate", "sensitivity", "fit")
GROUPS = (*PARTS, "learning", "further")  # the last two as contexts, for gradients
HELD_OUT = PARTS[:3]  # no weight is learned from these
# Fields that another calibration of what was learned may change; the second draw its documents.
RECALIBRATED = ("skipped_fracs", "delta", "bound_factor")
REDRAWN = ("context", "seed", "test_documents", "calibration_documents", "validation_documents")
