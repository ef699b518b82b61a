"""Thresholds for what has been learned: candidates from validation documents, tested on calibration documents.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cramlab.auditing.resume import TensorRows
from cramlab.consolidation.guarantee import Guarantee, Tested, fixed_sequence
from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.measure import mean_loss, measured
from cramlab.consolidation.patch.far_reads import Seen
from cramlab.consolidation.rules.learned import at_threshold
from cramlab.consolidation.setting import Setting, StageName
from cramlab.errors import ConsolidationError

# The tests start this many candidates below the boldest one that would pass if all documents were like those of
# validation, and go up from there.
_STEPS_BELOW = 2


class GuaranteeError(ConsolidationError):
    """The loss increase cannot be guaranteed; the message says which one can."""


@dataclass(frozen=True)
class Calibrated:
    """The outcome of a calibration.

    Attributes:
        skipped_frac: share of far reads that the threshold was made for.
        threshold: threshold of all gates.
        tested: every tested candidate, with its share of far reads.
    """

    skipped_frac: float
    threshold: float
    tested: list[tuple[float, Tested]]


class Calibration:
    """Chooses and tests thresholds for gates that have been learned.

    Args:
        setting: model, sites, config, documents and stages.
        learned: gates and adapters.
        name: name of the candidate, which its stages are named after.
    """

    def __init__(self, setting: Setting, learned: Learned, name: str) -> None:
        self.setting, self.config = setting, setting.config
        self.learned, self.name = learned, name
        self._original: dict[str, Tensor] = {}

    def thresholds(self) -> list[float]:
        """For each share to skip: the quantile of the gates' scores over all layers, averaged over documents."""
        fracs = torch.tensor([frac for frac in self.config.skipped_fracs if frac < 1])
        table = self._table("validation", max(1, len(fracs)))

        def quantiles(document: int, tokens: Tensor) -> None:
            scores: list[Tensor] = []

            def look(i: int, seen: Seen) -> None:
                layer = self.learned.layers[self.setting.sites[i].layer]
                scores.append(layer.scores(seen.features[seen.far]).to(tokens.device))

            self.setting.observe(tokens[None], look)
            ordered = torch.cat(scores).sort().values
            index = (fracs * len(ordered)).long().clamp(max=len(ordered) - 1)
            table.rows[document, : len(fracs)] = ordered[index].double()

        self.setting.each(StageName.thresholds(self.name), "validation", table, quantiles)
        means = table.rows.mean(dim=0)[: len(fracs)].tolist()
        return [*means, float("inf")] if self.config.skipped_fracs[-1] == 1 else means

    def increases(self, part: str, skipped_frac: float, threshold: float) -> Tensor:
        """Loss increase, share of reads skipped and share of pairs scored of each document, (documents, 3).

        Args:
            part: name of the part.
            skipped_frac: share that the threshold was made for; names the stage.
            threshold: threshold of all gates.
        """
        if part not in self._original:
            losses = self._table(part, 1)

            def original(document: int, tokens: Tensor) -> None:
                losses.rows[document] = mean_loss(self.setting.model, tokens)

            self.setting.each(StageName.original(part), part, losses, original)
            self._original[part] = losses.rows[:, 0]
        layers = at_threshold(self.learned.layers, threshold)
        table = self._table(part, 3)

        def fill(document: int, tokens: Tensor) -> None:
            row = measured(self.setting.model, tokens, layers)
            table.rows[document] = torch.tensor(row, dtype=torch.float64)

        self.setting.each(StageName.increases(self.name, part, skipped_frac), part, table, fill)
        out = table.rows.clone()
        out[:, 0] -= self._original[part]
        return out

    def _table(self, part: str, n_columns: int) -> TensorRows:
        return TensorRows(len(self.setting.parts[part]), n_columns)

    def calibrate(self, guarantee: Guarantee) -> Calibrated:
        """The boldest threshold that the calibration documents allow; see `guarantee.fixed_sequence`.

        Raises:
            GuaranteeError: when no threshold passes.
        """
        fracs, thresholds = self.config.skipped_fracs, self.thresholds()
        tested = fixed_sequence(
            range(self._first(guarantee, thresholds), len(fracs)),
            lambda i: self.increases("calibration", fracs[i], thresholds[i])[:, 0].tolist(),
            guarantee,
        )
        passed = [t.candidate for t in tested if t.p_value <= guarantee.delta]
        if not passed:
            first, n_documents = tested[0], len(self.setting.parts["calibration"])
            smallest = self._smallest(guarantee, thresholds)
            raise GuaranteeError(
                f"--max-loss-increase {guarantee.increase:g} nats per token cannot be guaranteed with confidence "
                f"{1 - guarantee.delta:g}: skipping {fracs[first.candidate]:.0%} of the far reads costs "
                f"{first.mean:.3g} on the {n_documents} calibration documents. The smallest increase that they can "
                f"guarantee is {smallest:.3g}: ask for that (with --resume nothing is learned again), or give more text"
            )
        return Calibrated(fracs[passed[-1]], thresholds[passed[-1]], [(fracs[t.candidate], t) for t in tested])

    def _first(self, guarantee: Guarantee, thresholds: Sequence[float]) -> int:
        """The candidate that is tested first: a few below the boldest that validation documents forecast to pass."""
        fracs = self.config.skipped_fracs
        low, high = -1, len(fracs)
        while high - low > 1:
            middle = (low + high) // 2
            observed = self.increases("validation", fracs[middle], thresholds[middle])[:, 0].numpy()
            forecast = np.resize(observed, len(self.setting.parts["calibration"]))  # repeated; for the order alone
            passes = guarantee.p_value(forecast) <= guarantee.delta
            low, high = (middle, high) if passes else (low, middle)
        return max(0, low - _STEPS_BELOW)

    def _smallest(self, guarantee: Guarantee, thresholds: Sequence[float]) -> float:
        """The smallest increase for which `calibrate` passes: a larger one begins with another threshold."""
        fracs, wider = self.config.skipped_fracs, guarantee
        while True:
            first = self._first(wider, thresholds)
            increases = self.increases("calibration", fracs[first], thresholds[first])[:, 0].tolist()
            if wider.p_value(increases) <= wider.delta:
                return wider.increase
            wider = wider.relaxed(increases)

    def test(self, calibrated: Calibrated) -> Tensor:
        """The chosen threshold on the test documents, (documents, 3); see `increases`."""
        return self.increases("test", calibrated.skipped_frac, calibrated.threshold)
