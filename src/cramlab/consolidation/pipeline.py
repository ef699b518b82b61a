"""From a loaded model and text to a calibrated folder: what `cramlab consolidate` runs.

Source: ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cramlab import records
from cramlab.auditing.resume import Progress, Stages, identity
from cramlab.config import to_dict
from cramlab.consolidation.calibration import Calibrated, Calibration, GuaranteeError
from cramlab.consolidation.candidates import learn
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.documents import Parts, at_length, held_out_of, parts_of, used_documents
from cramlab.consolidation.earlier import learned_before
from cramlab.consolidation.estimate import estimate
from cramlab.consolidation.finished import made_of
from cramlab.consolidation.folder import save
from cramlab.consolidation.guarantee import Guarantee, Tested
from cramlab.consolidation.patch.install import consolidatable_sites
from cramlab.consolidation.plan import weaker
from cramlab.consolidation.rules.learned import at_threshold
from cramlab.consolidation.setting import SAVED, Setting
from cramlab.files import only_process_in
from cramlab.hf.loading import Pretrained
from cramlab.text import Corpus

_KEPT = ("gradients", "further_text", "used_documents", "learned_on")  # fields that another calibration copies


@torch.no_grad()
def consolidate(
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    *,
    max_loss_increase: float,
    out: Path,
    further: Corpus | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Learns, calibrates and saves; interrupted work continues from the last saved document.

    Args:
        pretrained: a causal language model; it is left as it was.
        corpus: text of the kind that the model will be used on.
        config: sizes and choices.
        max_loss_increase: guaranteed bound on the expected loss increase of a document, nats per token.
        out: folder of the result.
        further: other text for gradient steps; nothing is measured on it.
        progress: called as `(stage, tokens done, tokens in all, seconds)` after every document.
        log: called with a line on how long the work takes, before it begins.

    Returns:
        The record, as saved.

    Raises:
        ConsolidationError: when model, text and config do not fit.
        GuaranteeError: when the increase cannot be guaranteed; the message names the smallest that can.
        UnknownFamilyError: when the attention of the model cannot be found.
    """
    guarantee = _guarantee(max_loss_increase, config)
    model = pretrained.model
    sites = consolidatable_sites(model)
    parts = parts_of(pretrained, corpus, config, further)
    _enough_at_lengths(guarantee, config, parts)
    if log is not None:
        log(estimate(model, config, parts))
    named = identity(model, list(parts.values()), config)
    with only_process_in(out) as still_held:
        stages = Stages(out / "state", named, progress, still_held=still_held)
        setting = Setting(model, sites, config, parts, stages)
        candidates = learn(setting)
        learning = {
            "gradients": candidates.described(),
            "further_text": None if further is None else further.described(),
            "used_documents": used_documents(pretrained, corpus, config, further),
            "made_of": made_of(model, parts),
            "copies": parts.copies,
        }
        run = Calibration(setting, candidates.learned[candidates.chosen], candidates.chosen)
        return _guaranteed(run, guarantee, pretrained, corpus, learning, out)


@torch.no_grad()
def recalibrate(
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    *,
    start: Path,
    max_loss_increase: float,
    out: Path,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Calibrates the gates and adapters of another folder for another guarantee or another text, without learning.

    Args:
        pretrained: the model that `start` was made for; it is left as it was.
        corpus: text to calibrate and test on; see `learned_before`.
        config: config of `start`; only fields of `RECALIBRATED` and `REDRAWN` may differ.
        start: folder of a consolidation.
        max_loss_increase: as for `consolidate`.
        out: folder of the result.
        progress: as for `consolidate`.
        log: as for `consolidate`.

    Returns:
        The record, as saved.

    Raises:
        ConsolidationError: when model, text, config and folder do not fit; see `learned_before`.
        GuaranteeError: when the increase cannot be guaranteed; the message names the smallest that can.
    """
    guarantee = _guarantee(max_loss_increase, config)
    model = pretrained.model
    before, learned, allowed = learned_before(model, start, corpus, config)
    parts = held_out_of(pretrained, allowed, config)
    _enough_at_lengths(guarantee, config, parts)
    if log is not None:
        log(estimate(model, config, parts))
    named = identity(model, list(parts.values()), config) + before["weights_sha256"]
    with only_process_in(out) as still_held:
        stages = Stages(out / "state", named, progress, still_held=still_held)
        learning = {"learned_on": before["text"]} | {name: before[name] for name in _KEPT if name in before}
        for name, now in (("made_of", made_of(model, parts)), ("copies", parts.copies)):
            learning[name] = before.get(name, {}) | now
        setting = Setting(model, consolidatable_sites(model), config, parts, stages)
        run = Calibration(setting, learned, SAVED)
        return _guaranteed(run, guarantee, pretrained, corpus, learning, out)


def _guarantee(max_loss_increase: float, config: ConsolidationConfig) -> Guarantee:
    """The guarantee that is asked for; refused when the config has too few documents for it."""
    bound = config.bound_factor * max_loss_increase
    guarantee = Guarantee(increase=max_loss_increase, bound=bound, delta=config.delta)
    if (fewest := guarantee.fewest_documents()) > config.calibration_documents:
        raise GuaranteeError(
            f"consolidation.calibration_documents = {config.calibration_documents} are too few to guarantee any "
            f"increase at confidence {1 - config.delta:g}; use at least {fewest} ({3 * fewest} recommended)"
        )
    return guarantee


def _enough_at_lengths(guarantee: Guarantee, config: ConsolidationConfig, parts: Parts) -> None:
    """Refuses lengths at which there are too few calibration documents."""
    for length in config.calibrated_lengths:
        n_documents, fewest = len(parts[at_length("calibration", length)]), guarantee.fewest_documents()
        if n_documents < fewest:
            raise GuaranteeError(
                f"consolidation.calibrated_lengths: {n_documents} of the {config.calibration_documents} calibration "
                f"documents have {length} tokens, but {fewest} are needed; raise consolidation.calibration_documents, "
                "leave this length out, or give more text"
            )


def _guaranteed(
    run: Calibration,
    guarantee: Guarantee,
    pretrained: Pretrained,
    corpus: Corpus,
    learning: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Calibrates, tests and saves; `learning` holds the fields of the record on how the layers were learned."""
    calibrated = run.calibrate(guarantee)
    test = run.test(calibrated)
    record = _record(run, guarantee, pretrained, corpus, calibrated, test) | learning
    return save(out, at_threshold(run.learned.layers, calibrated.threshold), run.setting.model, record)


def _record(
    run: Calibration,
    guarantee: Guarantee,
    pretrained: Pretrained,
    corpus: Corpus,
    calibrated: Calibrated,
    test: dict[int, Tensor],
) -> dict[str, Any]:
    learned = run.learned
    header = records.header(run.setting.device)
    packages = ("transformers", "gguf")
    lengths = [
        {"length": length, "documents": len(run.setting.parts[at_length("calibration", length)]),
         "tested": _tested(rows), "test": _test(test[length])}
        for length, rows in calibrated.at_lengths.items()
    ]  # fmt: skip
    return ({"lengths": lengths} if lengths else {}) | {
        "cramlab": header["versions"]["cramlab"],
        "revision": header["revision"],
        "versions": header["versions"] | {name: records.package_version(name) for name in packages},
        "hardware": header["hardware"],
        "name": pretrained.name,
        "note": pretrained.note,
        "text": corpus.described(),
        "config": to_dict(run.config),
        "promise": dataclasses.asdict(guarantee),
        "calibrated_on": _calibrated_on(run.setting, corpus),
        "skipped_frac": calibrated.skipped_frac,
        "tested": _tested(calibrated.tested),
        "ladder": [{"skipped_frac": frac, "threshold": None if math.isinf(threshold) else threshold}
                   for frac, threshold in calibrated.ladder],
        "test": _test(test[run.config.context]),
        "learned": {"sensitivity": learned.sensitivity, "explained": learned.explained,
                    "strengths": [list(pair) for pair in learned.strengths]},
        "seconds": run.setting.stages.seconds,
    }  # fmt: skip


def _tested(rows: list[tuple[float, Tested]]) -> list[dict[str, Any]]:
    return [{"skipped_frac": frac} | dataclasses.asdict(tested) for frac, tested in rows]


def _test(rows: Tensor) -> dict[str, Any]:
    """Figures of test documents, from `Calibration.increases`."""
    increase, skipped, pairs = rows.mean(dim=0).tolist()
    error = float(rows[:, 0].std() / len(rows) ** 0.5) if len(rows) > 1 else None
    return {"documents": len(rows), "increase": increase, "standard_error": error, "skipped_frac": skipped,
            "pairs_frac": pairs}  # fmt: skip


def _calibrated_on(setting: Setting, corpus: Corpus) -> dict[str, Any]:
    """What the guarantee counts, and the sentence that says so where it is weaker than one over documents."""
    contexts, config = setting.parts["calibration"], setting.config
    lengths = sorted(map(len, contexts))
    on = {"unit": config.unit, "contexts": len(contexts), "shortest": lengths[0], "longest": lengths[-1]}
    return on if config.unit == "document" else on | {"weaker": weaker(len(corpus.documents), config)}
