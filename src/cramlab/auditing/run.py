"""Audits a model on token ids."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.auditing.capture import Seen
from cramlab.auditing.causal import measure_losses
from cramlab.auditing.checks import check_causal, check_context, check_tokens, checked_sites
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.figures import Measured, assemble
from cramlab.auditing.probes import SiteFit, Statistics, fit_site, frequent_types, make_inputs
from cramlab.auditing.redundancy import Tally
from cramlab.auditing.result import AuditResult
from cramlab.auditing.resume import Identity, Progress, Resumable, Stages
from cramlab.auditing.setting import Setting
from cramlab.auditing.split import Contexts, Split, count_tokens, split
from cramlab.errors import AuditError
from cramlab.files import only_process_in
from cramlab.hf.loading import reading_all

Decode = Callable[[list[int]], str]


@torch.inference_mode()
def audit(
    model: nn.Module,
    documents: Sequence[Tensor],
    config: AuditConfig | None = None,
    *,
    other: Sequence[Tensor] | None = None,
    decode: Decode | None = None,
    mask_token: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Measures how well linear probes predict every attention sub-layer, and the loss when they replace it.

    CRAM layers are audited while every token reads, as the result of each read must be known.

    Args:
        model: a Hugging Face model with attention, in evaluation mode; see `hf.structure`. Sums are gathered and
            probes fitted on its device; only totals per document move to the CPU.
        documents: token ids, one 1-D tensor per document.
        config: settings; None: the defaults.
        other: documents of another domain, for the probe that is trained there; None: no such probe.
        decode: maps token ids to text, to show the best and worst predicted tokens; None: the ids are shown.
        mask_token: id of the mask token of an encoder with a masked-token head; None: an encoder has no loss.
        out: folder for the state of an unfinished audit, from which the same call continues; None: nothing is saved.
        progress: called with (stage, tokens done, total tokens, seconds) after every document.

    Returns:
        The result; `result.data` is the JSON document.

    Raises:
        AuditError: when model, text and config do not go together; the message says why.
        UnknownFamilyError: when the attention of the model cannot be found.
    """
    config = config or AuditConfig()
    if model.training:
        raise AuditError("the model is in training mode, in which dropout is active; call model.eval() first")
    sites = checked_sites(model, config)
    check_context(model, config)
    check_tokens(model, [*documents, *(other or ())])
    parts = split(documents, config, n_features=sites[0].d_model + 1)
    other_parts = None if other is None else _split_other(other, config, sites[0].d_model + 1, parts.test)
    check_causal(model, parts.test[0].tokens[0])

    types = frequent_types([c.tokens for c in parts.fit], sites[0].d_model).to(sites[0].device)
    setting = Setting(model, sites, config, types)
    who = Identity.of(model, [documents, other or []])
    state = None if out is None else out / "state"
    with contextlib.nullcontext() if out is None else only_process_in(out) as still_held, reading_all(model):
        stages = Stages(state, who.with_settings(config), progress, still_held=still_held)
        result = _audit(setting, parts, other_parts, stages, decode, mask_token)
    return result.described(*digests(who))


def digests(who: Identity) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the digests that a result holds, those under "model" and those under "text"."""
    return {"sha256": who.weights, "config_sha256": who.config}, {"tokens_sha256": who.tokens}


def _audit(
    setting: Setting,
    parts: Split,
    other: Split | None,
    stages: Stages,
    decode: Decode | None,
    mask_token: int | None,
) -> AuditResult:
    """Runs the stages in order; arguments as for `audit`."""
    fits = _fit(setting, parts, other, stages)
    tally = Tally(setting.sites, list(fits[0].probes), len(parts.test), setting.config.context, setting.config.ngram)
    row_of = {contexts.document: row for row, contexts in enumerate(parts.test)}

    def test(contexts: Contexts) -> int:
        row = row_of[contexts.document]

        def look(i: int, seen: Seen, tokens: Tensor) -> None:
            tally.add(row, i, seen, make_inputs(seen, tokens, setting.types), fits[i], tokens)
            if i == len(setting.sites) - 1:
                tally.close_batch(contexts.document, tokens)

        return setting.pass_through(contexts, look)

    stages.run("test", parts.test, test, tally, count_tokens(parts.test))
    causal = measure_losses(setting, parts, fits, stages, mask_token)
    seconds = stages.seconds | {"total": sum(stages.seconds.values())}
    measured = Measured(parts=parts, other=other, fits=fits, tally=tally, causal=causal, seconds=seconds)
    return assemble(setting.model, setting.sites, setting.config, measured, decode)


class _Sums(Resumable):
    """Sums over several parts of the text, for all sites."""

    def __init__(self, setting: Setting, parts: Sequence[str], *, controls: bool) -> None:
        n_types, n_positions = len(setting.types) + 1, setting.config.context
        self.parts = {
            part: [Statistics(site, n_types, n_positions, controls=controls) for site in setting.sites]
            for part in parts
        }

    def state(self) -> dict[str, Any]:
        return {part: [s.state() for s in statistics] for part, statistics in self.parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        for part, statistics in self.parts.items():
            for held, saved in zip(statistics, state[part], strict=True):
                held.load(saved)


def _gather(setting: Setting, stage: str, parts: Split, stages: Stages, *, controls: bool) -> _Sums:
    """Gathers the sums of the parts for fitting and validation."""
    sums = _Sums(setting, ("fit", "validation"), controls=controls)

    def step(item: tuple[str, Contexts]) -> int:
        part, contexts = item
        generator = torch.Generator().manual_seed(setting.config.seed * 1_000_003 + contexts.document)

        def look(i: int, seen: Seen, tokens: Tensor) -> None:
            sums.parts[part][i].update(seen, make_inputs(seen, tokens, setting.types), generator)

        return setting.pass_through(contexts, look)

    items = [("fit", c) for c in parts.fit] + [("validation", c) for c in parts.validation]
    stages.run(stage, items, step, sums, count_tokens(parts.fit) + count_tokens(parts.validation))
    return sums


def _fit(setting: Setting, parts: Split, other: Split | None, stages: Stages) -> list[SiteFit]:
    """Fits all probes of all sites; the sums of a site are freed once it is fitted."""
    sums = _gather(setting, "fit", parts, stages, controls=True).parts
    elsewhere = None if other is None else _gather(setting, "other", other, stages, controls=False).parts
    start, fits = time.perf_counter(), []
    for site in setting.sites:
        pair = None if elsewhere is None else (elsewhere["fit"].pop(0), elsewhere["validation"].pop(0))
        fits.append(fit_site(site, sums["fit"].pop(0), sums["validation"].pop(0), setting.config, pair))
    stages.seconds["solve"] = time.perf_counter() - start
    return fits


def _split_other(
    documents: Sequence[Tensor], config: AuditConfig, n_features: int, tested: Sequence[Contexts]
) -> Split:
    """Splits the other domain: without a test part, and without copies of the documents that are tested."""
    parts = split(documents, config, n_features, apart_from=tested)
    return Split(fit=parts.fit + parts.test, validation=parts.validation, test=(), n_copies=parts.n_copies)
