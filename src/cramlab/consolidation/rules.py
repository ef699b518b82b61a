"""Rules for far reads beside the learned one: what consolidation is compared with.

Source: ours, but for static heads: after DuoAttention (Xiao et al. 2024), which learns the split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.observe import added_by_far
from cramlab.consolidation.patch import Decision, FarReads, Seen
from cramlab.hf.attention_sites import AttentionSite

_LEAST_NATS = 1e-30


class WindowOnly(FarReads):
    """Every token sees the window and the first keys only, and nothing answers instead."""

    never_reads = True

    def decide(self, seen: Seen) -> Decision:
        """No token reads."""
        return torch.zeros_like(seen.far), None


class Everything(FarReads):
    """Every token reads: the original's answer, by the path of the readers."""

    def decide(self, seen: Seen) -> Decision:
        """All tokens read."""
        return torch.ones_like(seen.far), None


class ByChance(FarReads):
    """A learned adapter, but who reads is drawn by chance: for a place always alike, whatever came in one call.

    Args:
        learned: whose adapter answers.
        skipped_frac: chance that a token does not read.
        seed: of the draws.
    """

    def __init__(self, learned: ConsolidatedAttention, *, skipped_frac: float, seed: int) -> None:
        super().__init__(window=learned.window, n_sinks=learned.n_sinks)
        self.learned, self.skipped_frac, self.seed = learned, skipped_frac, seed

    def decide(self, seen: Seen) -> Decision:
        """Draws for all places up to the last, and keeps those of this call."""
        n_batch, n_tokens = seen.far.shape
        generator = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(seen.start + n_tokens, n_batch, generator=generator)[seen.start :].T
        return chance.to(seen.far.device) >= self.skipped_frac, self.learned.adapt(seen.features)


class StaticHeads(FarReads):
    """Some heads see window and first keys for every token, the others everything.

    Args:
        windowed: the former, bool (H,).
        window: as for `FarReads`.
        n_sinks: likewise.
    """

    def __init__(self, windowed: Tensor, *, window: int, n_sinks: int) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        self.windowed = windowed
        self.reads_all = not bool(windowed.any())
        self.never_reads = bool(windowed.all())

    def decide(self, seen: Seen) -> Decision:
        """The same heads read for every token."""
        return seen.far[..., None] & ~self.windowed.to(seen.far.device), None


class Oracle(FarReads):
    """Reads where skipping would cost more than a threshold by its true error: what no gate can know.

    It computes every read to decide, so it shows a loss, never a saving.

    Args:
        site: that it sits at.
        learned: whose adapter answers.
        sensitivity: nats per squared error.
        threshold: log nats.
    """

    def __init__(
        self, site: AttentionSite, learned: ConsolidatedAttention, *, sensitivity: float, threshold: float
    ) -> None:
        super().__init__(window=learned.window, n_sinks=learned.n_sinks)
        self.site, self.learned, self.sensitivity, self.threshold = site, learned, sensitivity, threshold

    def log_nats(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Log of the nats that a skip would cost, (B, T), and the adapter's answer, (B, T, D)."""
        adapted = self.learned.adapt(seen.features)
        error = (added_by_far(self.site, seen.full, seen.near) - adapted).square().sum(-1)
        return (error * self.sensitivity).clamp(min=_LEAST_NATS).log(), adapted

    def decide(self, seen: Seen) -> Decision:
        """Reads where the cost is above the threshold; as a mixture, since the full read is there already."""
        nats, adapted = self.log_nats(seen)
        return (nats > self.threshold).to(adapted.dtype), adapted
