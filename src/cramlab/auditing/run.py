"""The audit, from a model and tokens to a result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.auditing.capture import Seen, watching
from cramlab.auditing.checks import check_causal, check_context, check_tokens, checked_sites
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import SiteFit, Statistics, fit_site, frequent_types, make_inputs
from cramlab.auditing.redundancy import Tally
from cramlab.auditing.replacement import Loss, MaskedToken, NextToken, Replacement, losses, memory_serves, plan
from cramlab.auditing.result import AuditResult, CausalSums, Measured, assemble
from cramlab.auditing.resume import Identity, Progress, Resumable, Stages, TensorRows
from cramlab.auditing.split import Contexts, Split, count_tokens, split
from cramlab.errors import AuditError
from cramlab.files import only_process_in
from cramlab.hf.attention_sites import AttentionSite, base_model, family_of
from cramlab.hf.loading import reading_all

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class _Setting:
    """What all stages share."""

    model: nn.Module
    sites: list[AttentionSite]
    config: AuditConfig
    types: Tensor

    @property
    def device(self) -> torch.device:
        return self.sites[0].device

    def pass_through(self, contexts: Contexts, look: Callable[[int, Seen, Tensor], None]) -> int:
        """Runs one document; `look(site, seen, tokens)` for each site and batch. Returns its tokens."""
        base = base_model(self.model)
        options = {"use_cache": False} if family_of(self.model).causal else {}
        for batch in contexts.batches(self.config.batch_tokens):
            tokens = batch.to(self.device)
            with watching(self.sites, lambda i, seen, tokens=tokens: look(i, seen, tokens)):
                base(input_ids=tokens, **options)
        return contexts.tokens.numel()


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
    """Asks of every attention sub-layer how well a linear probe predicts it and what its replacement costs.

    CRAM layers are audited while every token reads, as only then it is known what each read would have returned.
    Works without files; with `out`, sums are saved in `out/state` and an audit that was cut off goes on.

    Args:
        model: a Hugging Face model of a family that `hf.attention_sites` knows, in evaluation mode. Sums are gathered
            and probes fitted on its device; only totals by document come to the CPU.
        documents: token ids, one 1-D tensor a document.
        config: sizes and choices.
        other: documents of another domain, for the probe that is trained there.
        decode: from ids to text, to show the best and worst tokens.
        mask_token: of an encoder with a masked-token head; without one an encoder has no loss to measure.
        out: folder for the state of an unfinished audit.
        progress: called as `(stage, tokens done, tokens in all, seconds)` after every document.

    Returns:
        The result; `result.data` is the JSON document.

    Raises:
        AuditError: when model, text and config do not fit, see the message.
        UnknownFamilyError: when nothing says where this model's attention sits.
    """
    config = config or AuditConfig()
    if model.training:
        raise AuditError("the model is in training mode, so dropout would be audited; call model.eval() first")
    sites = checked_sites(model, config)
    check_context(model, config)
    check_tokens(model, [*documents, *(other or ())])
    parts = split(documents, config, n_features=sites[0].d_model + 1)
    other_parts = None if other is None else _split_other(other, config, sites[0].d_model + 1, parts.test)
    check_causal(model, parts.test[0].tokens[0])

    types = frequent_types([c.tokens for c in parts.fit], sites[0].d_model).to(sites[0].device)
    setting = _Setting(model, sites, config, types)
    who = Identity.of(model, [documents, other or []])
    state = None if out is None else out / "state"
    with contextlib.nullcontext() if out is None else only_process_in(out) as still_held, reading_all(model):
        stages = Stages(state, who.with_settings(config), progress, still_held=still_held)
        result = _audit(setting, parts, other_parts, stages, decode, mask_token)
    return result.described(*digests(who))


def digests(who: Identity) -> tuple[dict[str, str], dict[str, str]]:
    """What a result says of whose it is, under "model" and under "text"."""
    return {"sha256": who.weights, "config_sha256": who.config}, {"tokens_sha256": who.tokens}


def _audit(
    setting: _Setting,
    parts: Split,
    other: Split | None,
    stages: Stages,
    decode: Decode | None,
    mask_token: int | None,
) -> AuditResult:
    """The stages, in order. See `audit`."""
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
    causal = _causal(setting, parts, fits, stages, mask_token)
    seconds = stages.seconds | {"total": sum(stages.seconds.values())}
    measured = Measured(parts=parts, other=other, fits=fits, tally=tally, causal=causal, seconds=seconds)
    return assemble(setting.model, setting.sites, setting.config, measured, decode)


class _Sums(Resumable):
    """Statistics of several parts and all sites."""

    def __init__(self, setting: _Setting, parts: Sequence[str], *, controls: bool) -> None:
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


def _gather(setting: _Setting, stage: str, parts: Split, stages: Stages, *, controls: bool) -> _Sums:
    """The sums of the fitted and the validation part."""
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


def _fit(setting: _Setting, parts: Split, other: Split | None, stages: Stages) -> list[SiteFit]:
    """All probes of all sites; the sums are let go site by site."""
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
    """The other domain has nothing to test, and no copy of what is tested."""
    parts = split(documents, config, n_features, apart_from=tested)
    return Split(fit=parts.fit + parts.test, validation=parts.validation, test=(), n_copies=parts.n_copies)


def _causal_contexts(parts: Split, config: AuditConfig) -> tuple[Tensor, Tensor]:
    """Contexts up to `causal_tokens`: a random one of each test document, then each one's next, and so on.

    Returns:
        Row of the document among the tested, (C,), and tokens, (C, T).
    """
    generator = torch.Generator().manual_seed(config.seed)
    starts = [int(torch.randint(len(c.tokens), (1,), generator=generator)) for c in parts.test]
    chosen = [
        (row, c.tokens[(start + turn) % len(c.tokens)])
        for turn in range(config.contexts_per_document)
        for row, (c, start) in enumerate(zip(parts.test, starts, strict=True))
        if turn < len(c.tokens)
    ][: max(1, config.causal_tokens // config.context)]
    return torch.tensor([row for row, _ in chosen]), torch.stack([tokens for _, tokens in chosen])


def _causal(
    setting: _Setting, parts: Split, fits: list[SiteFit], stages: Stages, mask_token: int | None
) -> CausalSums | None:
    """Nats of every document under every replacement; None where there is no loss to look at."""
    config = setting.config
    loss = loss_of(setting.model, mask_token)
    if config.causal_tokens == 0 or loss is None:
        return None
    replacements = plan(fits, config)
    flat: list[Replacement] = [r for family in replacements.values() for r in family]
    documents, contexts = _causal_contexts(parts, config)
    table = TensorRows(len(contexts), 2 + len(flat))
    batches = list(enumerate(contexts.split(max(1, config.batch_tokens // config.context))))

    remember = memory_serves(setting.model, setting.sites, contexts[:1, :16].to(setting.device))

    def step(item: tuple[int, Tensor]) -> int:
        number, tokens = item
        first = number * len(batches[0][1])
        rows = table.rows[first : first + len(tokens)]
        seed = config.seed * 1_000_003 + number
        rows[:, 0] = loss.n_tokens(tokens, seed)
        rows[:, 1:] = losses(setting.model, loss, setting.sites, fits, flat, tokens.to(setting.device), seed,
                             remember=remember).cpu()  # fmt: skip
        return tokens.numel()

    stages.run("causal", batches, step, table, contexts.numel())
    sums = table.rows.new_zeros(int(documents.max()) + 1, table.rows.shape[1]).index_add_(0, documents, table.rows)
    return CausalSums(
        kind=loss.kind, replacements=replacements, n_contexts=len(contexts), n_tokens=sums[:, 0], nats=sums[:, 1:]
    )


def loss_of(model: nn.Module, mask_token: int | None) -> Loss | None:
    """The loss that a model's head is made for; None without a head."""
    if base_model(model) is model:
        return None
    if family_of(model).causal:
        return NextToken()
    return None if mask_token is None else MaskedToken(mask_token)
