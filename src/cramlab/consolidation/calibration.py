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
from cramlab.consolidation.documents import at_length
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
        at_lengths: the same at each of `calibrated_lengths`.
        ladder: every share up to the chosen one, with its threshold.
    """

    skipped_frac: float
    threshold: float
    tested: list[tuple[float, Tested]]
    at_lengths: dict[int, list[tuple[float, Tested]]]
    ladder: list[tuple[float, float]]


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
                scores.append(layer.scores(seen.features[seen.far], seen.n_keys[seen.far]).to(tokens.device))

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
        """The boldest threshold that the calibration documents allow at every length; see `guarantee.fixed_sequence`.

        Every length has a sequence that begins with the same candidate, and what all of them passed is chosen. A
        candidate that is wrong at some length is chosen only if that length's sequence passed it, so all lengths
        together need no correction.

        Raises:
            GuaranteeError: when no threshold passes.
        """
        fracs, thresholds = self.config.skipped_fracs, self.thresholds()
        first, last = self._first(guarantee, thresholds), len(fracs) - 1
        tested: dict[int, list[Tested]] = {}
        for length, part in self._parts("calibration").items():
            tested[length] = fixed_sequence(
                range(first, last + 1),
                lambda i, part=part: self.increases(part, fracs[i], thresholds[i])[:, 0].tolist(),
                guarantee,
            )
            last = max((t.candidate for t in tested[length] if t.p_value <= guarantee.delta), default=-1)
            if last < 0:
                raise self._refusal(guarantee, thresholds, tested[length][0], part)
        rows = {length: [(fracs[t.candidate], t) for t in found] for length, found in tested.items()}
        ladder = list(zip(fracs, thresholds, strict=True))[: last + 1]
        return Calibrated(fracs[last], thresholds[last], rows.pop(self.config.context), rows, ladder)

    def _parts(self, part: str) -> dict[int, str]:
        """Names of a held-out part at every length, the context first."""
        others = {length: at_length(part, length) for length in self.config.calibrated_lengths}
        return {self.config.context: part} | others

    def _refusal(
        self, guarantee: Guarantee, thresholds: Sequence[float], failed: Tested, part: str
    ) -> GuaranteeError:  # fmt: skip
        frac, documents = self.config.skipped_fracs[failed.candidate], self.setting.parts[part]
        of = f" of {len(documents[0])} tokens" if self.config.calibrated_lengths else ""
        return GuaranteeError(
            f"--max-loss-increase {guarantee.increase:g} nats per token cannot be guaranteed with confidence "
            f"{1 - guarantee.delta:g}: skipping {frac:.0%} of the far reads costs "
            f"{failed.mean:.3g} on the {len(documents)} calibration documents{of}. The smallest increase that they can "
            f"guarantee is {self._smallest(guarantee, thresholds):.3g}: ask for that (with --resume nothing is learned "
            "again), or give more text"
        )

    def _first(self, guarantee: Guarantee, thresholds: Sequence[float]) -> int:
        """The candidate that is tested first: a few below the boldest that validation documents forecast to pass."""
        fracs, calibration = self.config.skipped_fracs, self._parts("calibration")

        def passes(candidate: int, length: int, part: str) -> bool:
            observed = self.increases(part, fracs[candidate], thresholds[candidate])[:, 0].numpy()
            forecast = np.resize(
                observed, len(self.setting.parts[calibration[length]])
            )  # repeated; for the order alone
            return guarantee.p_value(forecast) <= guarantee.delta

        low, high = -1, len(fracs)
        while high - low > 1:
            middle = (low + high) // 2
            all_pass = all(passes(middle, *of) for of in self._parts("validation").items())
            low, high = (middle, high) if all_pass else (low, middle)
        return max(0, low - _STEPS_BELOW)

    def _smallest(self, guarantee: Guarantee, thresholds: Sequence[float]) -> float:
        """The smallest increase for which `calibrate` passes: a larger one begins with another threshold."""
        fracs, wider = self.config.skipped_fracs, guarantee
        while True:
            first = self._first(wider, thresholds)
            for part in self._parts("calibration").values():
                increases = self.increases(part, fracs[first], thresholds[first])[:, 0].tolist()
                if wider.p_value(increases) > wider.delta:
                    wider = wider.relaxed(increases)
                    break
            else:
                return wider.increase

    def test(self, calibrated: Calibrated) -> dict[int, Tensor]:
        """The chosen threshold on the test documents, (documents, 3) by length; see `increases`."""
        return {
            length: self.increases(part, calibrated.skipped_frac, calibrated.threshold)
            for length, part in self._parts("test").items()
        }
