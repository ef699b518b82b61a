"""From a loaded model and text to a calibrated folder: what `cramlab consolidate` runs.

Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cramlab import records
from cramlab.auditing.resume import Progress, Stages, identity
from cramlab.auditing.text import Corpus
from cramlab.config import to_dict
from cramlab.consolidation.closed_form import Learned, Learner
from cramlab.consolidation.config import GROUPS, RetrofitConfig
from cramlab.consolidation.documents import held_out_of, parts_of, used_documents
from cramlab.consolidation.earlier import learned_before
from cramlab.consolidation.finished import made_of
from cramlab.consolidation.folder import save
from cramlab.consolidation.gradients import distilled, rounded
from cramlab.consolidation.guarantee import Promise, Tested, fixed_sequence
from cramlab.consolidation.install import consolidatable_sites, patched
from cramlab.consolidation.measure import Rows, at_threshold, measured, original_loss
from cramlab.consolidation.observe import observed
from cramlab.consolidation.patch import Seen
from cramlab.errors import ConsolidationError
from cramlab.files import only_process_in
from cramlab.hf.attention_sites import AttentionSite
from cramlab.hf.loading import Pretrained

# The test starts this many shares below the boldest that it would pass if all documents were like those of validation,
# and works its way up.
_STEPS_BELOW = 2
CLOSED_FORM = "closed form"
_KEPT = ("gradients", "further_text", "used_documents", "learned_on")  # by another calibration


class PromiseError(ConsolidationError):
    """The promised loss cannot be guaranteed; the message says what can."""


@dataclass(frozen=True)
class Calibrated:
    """The outcome.

    Attributes:
        skipped_frac: the share of far reads that the threshold was made for.
        threshold: of the gates.
        tested: every candidate that was tested, with its share.
    """

    skipped_frac: float
    threshold: float
    tested: list[tuple[float, Tested]]


@torch.no_grad()
def consolidate(
    pretrained: Pretrained,
    corpus: Corpus,
    config: RetrofitConfig,
    *,
    max_loss_increase: float,
    out: Path,
    further: Corpus | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Learns, calibrates and saves; work cut off goes on from the last saved document.

    Args:
        pretrained: a causal language model; it is left as it was.
        corpus: text of the kind that the model will be used on.
        config: sizes and choices.
        max_loss_increase: promised for the expected loss of a document, nats per token.
        out: folder of the result.
        further: other text, of which gradients may be taken; nothing is measured on it.
        progress: called as `(stage, tokens done, tokens in all, seconds)` after every document.

    Returns:
        The record, as saved.

    Raises:
        ConsolidationError: when model, text and config do not fit.
        PromiseError: when the promise cannot be kept, with the best that can be.
        UnknownFamilyError: when nothing says where this model's attention sits.
    """
    promise = _promise(max_loss_increase, config)
    model = pretrained.model
    sites = consolidatable_sites(model)
    parts = parts_of(pretrained, corpus, config, further)
    named = identity(model, [parts[group] for group in GROUPS], config)
    with only_process_in(out) as still_held:
        stages = Stages(out / "state", named, progress, still_held=still_held)
        candidates = learn(model, sites, config, parts, stages)
        chosen, found = chosen_by_validation(model, sites, config, parts, stages, candidates)
        learning = {
            "gradients": gradients(candidates, chosen, found),
            "further_text": None if further is None else further.described(),
            "used_documents": used_documents(pretrained, corpus, config, further),
            "made_of": made_of(model, parts),
            "copies": parts.copies,
        }
        run = Calibration(model, sites, config, parts, stages, candidates[chosen], chosen)
        return _promised(run, promise, pretrained, corpus, learning, out)


@torch.no_grad()
def recalibrate(
    pretrained: Pretrained,
    corpus: Corpus,
    config: RetrofitConfig,
    *,
    start: Path,
    max_loss_increase: float,
    out: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `consolidate`, with what another folder holds in place of learning: another promise, or another text.

    Args:
        pretrained: that `start` was made for; it is left as it was.
        corpus: text to calibrate and test on; see `learned_before`.
        config: of `start`; only fields of `RECALIBRATED` and `REDRAWN` may differ.
        start: folder of a consolidation.
        max_loss_increase: as for `consolidate`.
        out: folder of the result.
        progress: as for `consolidate`.

    Raises:
        ConsolidationError: also as `learned_before`.
        PromiseError: as for `consolidate`.
    """
    promise = _promise(max_loss_increase, config)
    model = pretrained.model
    before, learned, allowed = learned_before(model, start, corpus, config)
    parts = held_out_of(pretrained, allowed, config)
    named = identity(model, list(parts.values()), config) + before["weights_sha256"]
    with only_process_in(out) as still_held:
        stages = Stages(out / "state", named, progress, still_held=still_held)
        learning = {"learned_on": before["text"]} | {name: before[name] for name in _KEPT if name in before}
        for name, now in (("made_of", made_of(model, parts)), ("copies", parts.copies)):
            learning[name] = before.get(name, {}) | now
        run = Calibration(model, consolidatable_sites(model), config, parts, stages, learned, "saved")
        return _promised(run, promise, pretrained, corpus, learning, out)


def _promise(max_loss_increase: float, config: RetrofitConfig) -> Promise:
    promise = Promise(increase=max_loss_increase, bound=config.bound_factor * max_loss_increase, delta=config.delta)
    if (fewest := promise.fewest_documents()) > config.calibration_documents:
        raise PromiseError(
            f"{config.calibration_documents} calibration documents can promise nothing at confidence "
            f"{1 - config.delta:g}, not even if no document lost anything; give at least {fewest} "
            "(retrofit.calibration_documents), better three times as many"
        )
    return promise


def learn(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    config: RetrofitConfig,
    parts: dict[str, list[Tensor]],
    stages: Stages,
) -> dict[str, Learned]:
    """In closed form, then by gradients on each layer's error, then on the answer of the model: each by its name."""
    learned = Learner(model, sites, config, parts, stages).learn()
    rounded(learned.layers)
    candidates = {CLOSED_FORM: learned}
    for kind, n_steps in (("local", config.local_steps), ("end", config.end_steps)):
        if n_steps:
            learned = distilled(model, sites, config, parts, stages, learned, kind, n_steps)
            candidates[kind] = learned
    return candidates


def chosen_by_validation(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    config: RetrofitConfig,
    parts: dict[str, list[Tensor]],
    stages: Stages,
    candidates: dict[str, Learned],
) -> tuple[str, dict[str, float]]:
    """The candidate that loses least on validation documents, at a middle one of the shares learned for.

    A few gradient steps on little text may do harm; then what was there before is kept.

    Returns:
        Its name, and the increase of each that was looked at: the first and the last.
    """
    if len(candidates) == 1:
        return CLOSED_FORM, {}
    wanted = config.learning_fracs[(len(config.learning_fracs) - 1) // 2]
    at = min(range(len(config.skipped_fracs)), key=lambda i: abs(config.skipped_fracs[i] - wanted))
    found = {}
    for name in (CLOSED_FORM, list(candidates)[-1]):
        run = Calibration(model, sites, config, parts, stages, candidates[name], name)
        increases = run.increases("validation", f"{config.skipped_fracs[at]:g}", run.thresholds()[at])
        found[name] = float(increases[:, 0].mean())
    return min(found, key=lambda name: found[name]), found


def gradients(candidates: dict[str, Learned], chosen: str, found: dict[str, float]) -> dict[str, Any]:
    """What a record says of the gradient steps; losses are means over twentieths of the steps."""
    losses = {
        name: [float(part[:, 0].mean()) for part in learned.history.chunk(20)]
        for name, learned in candidates.items()
        if learned.history is not None
    }
    return {"chosen": chosen, "validation": found, "losses": losses}


class Calibration:
    """Thresholds, calibration and test of what has been learned."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        config: RetrofitConfig,
        parts: dict[str, list[Tensor]],
        stages: Stages,
        learned: Learned,
        name: str,
    ) -> None:
        self.model, self.sites, self.config, self.parts = model, sites, config, parts
        self.stages, self.learned, self.name = stages, learned, name.replace(" ", "-")
        self._original: dict[str, Tensor] = {}

    def thresholds(self) -> list[float]:
        """For each share to skip: the gates' scores over all layers at that quantile, averaged over documents."""
        fracs = torch.tensor([frac for frac in self.config.skipped_fracs if frac < 1])
        rows = Rows(len(self.parts["validation"]), max(1, len(fracs)))

        def quantiles(tokens: Tensor) -> Tensor:
            scores: list[Tensor] = []

            def look(i: int, seen: Seen) -> None:
                layer = self.learned.layers[self.sites[i].layer]
                scores.append(layer.scores(seen.features[seen.far]).to(tokens.device))

            with patched(self.model, observed(self.sites, self.config.window, self.config.n_sinks, look)):
                self.model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
            ordered = torch.cat(scores).sort().values
            return ordered[(fracs * len(ordered)).long().clamp(max=len(ordered) - 1)].double()

        self._each(
            f"{self.name}-thresholds",
            "validation",
            rows,
            lambda tokens, row: row[: len(fracs)].copy_(quantiles(tokens)),
        )
        found = rows.rows.mean(dim=0)[: len(fracs)].tolist()
        return [*found, float("inf")] if self.config.skipped_fracs[-1] == 1 else found

    def _each(self, stage: str, part: str, rows: Rows, fill: Callable[[Tensor, Tensor], Any]) -> None:
        documents = self.parts[part]

        def one(item: tuple[int, Tensor]) -> int:
            fill(item[1], rows.rows[item[0]])
            return len(item[1])

        self.stages.run(stage, list(enumerate(documents)), one, rows, sum(map(len, documents)))

    def increases(self, part: str, name: str, threshold: float) -> Tensor:
        """Increase, share skipped and share of pairs of each document, (documents, 3)."""
        if part not in self._original:
            rows = Rows(len(self.parts[part]), 1)
            self._each(f"{part}-original", part, rows, lambda t, row: row.fill_(original_loss(self.model, t)))
            self._original[part] = rows.rows[:, 0]
        layers = at_threshold(self.learned.layers, threshold)
        rows = Rows(len(self.parts[part]), 3)

        def fill(tokens: Tensor, row: Tensor) -> None:
            row.copy_(torch.tensor(measured(self.model, tokens, layers), dtype=torch.float64))

        self._each(f"{self.name}-{part}-{name}", part, rows, fill)
        found = rows.rows.clone()
        found[:, 0] -= self._original[part]
        return found

    def calibrate(self, promise: Promise) -> Calibrated:
        """The boldest threshold that the calibration documents allow; see `risk.fixed_sequence`."""
        fracs, thresholds = self.config.skipped_fracs, self.thresholds()
        low, high = -1, len(fracs)  # the boldest share that would pass, by bisection
        while high - low > 1:
            middle = (low + high) // 2
            found = self.increases("validation", f"{fracs[middle]:g}", thresholds[middle])[:, 0].numpy()
            forecast = np.resize(found, len(self.parts["calibration"]))  # as often as it takes, for the order alone
            passes = promise.p_value(forecast) <= promise.delta
            low, high = (middle, high) if passes else (low, middle)
        first = max(0, low - _STEPS_BELOW)
        tested = fixed_sequence(
            range(first, len(fracs)),
            lambda i: self.increases("calibration", f"{fracs[i]:g}", thresholds[i])[:, 0].tolist(),
            promise,
        )
        named = [(fracs[t.candidate], t) for t in tested]
        passed = [t.candidate for t in tested if t.p_value <= promise.delta]
        if not passed:
            best = tested[0]
            raise PromiseError(
                f"no threshold keeps the promised {promise.increase:g} nats per token with confidence "
                f"{1 - promise.delta:g}: skipping {fracs[best.candidate]:.0%} of the far reads costs {best.mean:.3g} "
                f"on the calibration documents, and {best.upper_bound:.3g} is the least that could be promised for it. "
                f"Raise --max-loss-increase, or give more than {len(self.parts['calibration'])} calibration documents"
            )
        return Calibrated(fracs[passed[-1]], thresholds[passed[-1]], named)

    def test(self, calibrated: Calibrated) -> Tensor:
        """The chosen threshold on the test documents, (documents, 3); see `increases`."""
        return self.increases("test", f"{calibrated.skipped_frac:g}", calibrated.threshold)


def _promised(
    run: Calibration, promise: Promise, pretrained: Pretrained, corpus: Corpus, learning: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Calibrates, tests and saves; `learning` is what the record says of how it was learned."""
    calibrated = run.calibrate(promise)
    test = run.test(calibrated)
    record = _record(run, promise, pretrained, corpus, calibrated, test) | learning
    save(out, at_threshold(run.learned.layers, calibrated.threshold), run.model, record)
    return record


def _record(
    run: Calibration,
    promise: Promise,
    pretrained: Pretrained,
    corpus: Corpus,
    calibrated: Calibrated,
    test: Tensor,
) -> dict[str, Any]:
    learned = run.learned
    header = records.header(next(pretrained.model.parameters()).device)
    packages = ("transformers", "gguf")
    increase, skipped, pairs = test.mean(dim=0).tolist()
    error = float(test[:, 0].std() / len(test) ** 0.5) if len(test) > 1 else None
    return {
        "cramlab": header["versions"]["cramlab"],
        "revision": header["revision"],
        "versions": header["versions"] | {name: records.package_version(name) for name in packages},
        "hardware": header["hardware"],
        "name": pretrained.name,
        "note": pretrained.note,
        "text": corpus.described(),
        "config": to_dict(run.config),
        "promise": dataclasses.asdict(promise),
        "skipped_frac": calibrated.skipped_frac,
        "tested": [{"skipped_frac": frac} | dataclasses.asdict(t) for frac, t in calibrated.tested],
        "test": {"documents": len(test), "increase": increase, "standard_error": error, "skipped_frac": skipped,
                 "pairs_frac": pairs},
        "learned": {"sensitivity": learned.sensitivity, "explained": learned.explained,
                    "strengths": [list(pair) for pair in learned.strengths]},
        "seconds": run.stages.seconds,
    }  # fmt: skip
