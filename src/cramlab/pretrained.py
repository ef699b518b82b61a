"""Functions for pretrained models: load, audit, consolidate, load with a consolidation, and guard it in use.

The commands `cramlab audit` and `cramlab consolidate` call the functions here. Importing this module does not import
transformers; the first call does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from cramlab.auditing import AuditConfig, AuditResult, audit_text
from cramlab.auditing.over_text import fitted, said
from cramlab.auditing.over_text import unlike as unlike_audit
from cramlab.auditing.result import FILE as AUDIT
from cramlab.auditing.resume import Progress, clear
from cramlab.config import replaced
from cramlab.errors import ConsolidationError, LoadError
from cramlab.files import finished, only_process_in, refuse_changed, write_text
from cramlab.hf.loading import Pretrained, device_named, with_tokenizer
from cramlab.hf.loading import load as load_named
from cramlab.report.audit_page import render_audit
from cramlab.report.consolidation_page import PAGE, render_consolidation
from cramlab.text.corpus import Chat, Corpus
from cramlab.text.sources import Text, corpus_of

if TYPE_CHECKING:
    from cramlab.consolidation.folder import SkipCounts
    from cramlab.consolidation.guard import Alarm, Guard

Model: TypeAlias = str | Path | nn.Module | Pretrained


def load_pretrained(
    model: Model, tokenizer: Any = None, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Pretrained:
    """Loads a pretrained model with its tokenizer, in float32 and evaluation mode.

    Args:
        model: "smollm2" or "glassllm" (packaged), a folder, a GGUF file, a model name of the Hugging Face hub, or a
            loaded model of transformers together with its `tokenizer`.
        tokenizer: tokenizer of a loaded model; a name or folder brings its own.
        allow_pickle: also load weights stored as pickles, which can run code.
        trust_remote_code: also run code that comes with the model.

    Raises:
        LoadError: when the model cannot be loaded, or a loaded model comes without a tokenizer or in training mode.
    """
    if isinstance(model, Pretrained):
        return model
    if not isinstance(model, nn.Module):
        return load_named(str(model), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    if tokenizer is None:
        raise LoadError(f"{name} is a loaded model without a tokenizer; use load_pretrained(model, tokenizer)")
    if model.training:
        raise LoadError(f"{name} is in training mode, in which dropout is active; call model.eval() first")
    return with_tokenizer(Path(name).name, model, tokenizer, "", name)


def audit(
    model: Model,
    text: Text,
    out: str | Path | None = None,
    *,
    other_text: Text | None = None,
    text_field: str | None = None,
    chat: Chat = "template",
    controls: bool = True,
    config: AuditConfig | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    **settings: Any,
) -> AuditResult:
    """Audits a pretrained model: which of its attention is predictable, and which is removable.

    Example: `cramlab.audit("glassllm", "stdlib", "runs/glass", context=64, progress=print)`.

    Args:
        model: see `load_pretrained`.
        text: text to audit on: what `read_corpus` takes ("stdlib", a file, a folder, a pattern, a data set), a list of
            paths, or a list of the texts themselves. For token ids call `cramlab.auditing.audit`.
        out: folder for `audit.json`, `audit.html` and the state of unfinished work; None: nothing is written.
        other_text: text of another domain, for probes trained there.
        text_field: field of records that holds the text, or the messages of a conversation; None: it is guessed.
        chat: "template" writes conversations as the tokenizer's chat template does, "plain" joins their messages.
        controls: whether to audit the planted model and the same model with random weights as well.
        config: sizes and choices; None: the defaults, changed where the text or the model's context demands it, apart
            from `settings`.
        resume: whether to continue unfinished work in `out` and keep a finished audit.
        device: device of the computation, which needs float64; None: the model's own.
        allow_pickle: see `load_pretrained`.
        progress: called with (stage, tokens done, tokens in all, seconds) after every document.
        log: called with lines on what was chosen, before the work begins.
        **settings: fields of `AuditConfig`, which replace those of `config`.

    Raises:
        UsageError: when a setting, the text or the model cannot be used; the message says why.
        FileExistsError: when `out` holds another audit, or this one and `resume` is false.
    """
    free = {field.name for field in fields(AuditConfig)} - set(settings) if config is None else set[str]()
    config = replaced(config or AuditConfig(), settings)
    path = None if out is None else Path(out) / AUDIT
    done = path is not None and finished(path, resume=resume)
    placed = None if device is None else device_named(str(device), torch.float64)
    corpora = [None if given is None else corpus_of(given, text_field) for given in (text, other_text)]
    pretrained = _on(placed, load_pretrained(model, allow_pickle=allow_pickle))
    corpus, other = _written(corpora, pretrained, chat, log)
    assert corpus is not None
    config = fitted(pretrained, corpus, config, free)
    if log is not None:
        for line in said(corpus, config):
            log(line)
    if path is None:
        return audit_text(pretrained, corpus, config, other=other, controls=controls, progress=progress)
    if done:
        result = AuditResult.read(path)
        refuse_changed(path, unlike_audit(result, pretrained, corpus, config, other=other, controls=controls))
    else:
        result = audit_text(
            pretrained, corpus, config, other=other, controls=controls, out=path.parent, progress=progress
        )
    with only_process_in(path.parent):
        if not done:
            result.write(path)
        clear(path.parent)
        write_text(path.with_suffix(".html"), render_audit(result.data))
    return result


def consolidate(
    model: Model,
    text: Text,
    out: str | Path,
    *,
    max_loss_increase: float = 0.02,
    further_text: Text | None = None,
    text_field: str | None = None,
    chat: Chat = "template",
    start: str | Path | None = None,
    config: Any = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Lets a pretrained model skip attention to far tokens, within a certified increase of its loss.

    Example: `cramlab.consolidate("glassllm", "stdlib", "runs/glass", max_loss_increase=0.05, context=128, window=16)`.

    Args:
        model: a causal language model, see `load_pretrained`; its weights are not changed.
        text: text of the kind that the model will be used on, see `audit`.
        out: folder of the result, a few MB: the record, the weights, what they do in use, and `report.html`.
        max_loss_increase: upper bound on the expected increase of a document's loss, nats per token.
        further_text: other text to take gradients from; nothing is measured on it.
        text_field: see `audit`.
        chat: see `audit`.
        start: folder of another consolidation, whose adapters and gates are kept: nothing is learned, and only the
            threshold is calibrated for this bound and text.
        config: a `consolidation.config` object with sizes and choices; None: the defaults, or those of `start`, changed
            where the text or the model's context demands it (`consolidation.plan`), apart from `settings`.
        resume: whether to continue unfinished work in `out` and keep a finished consolidation.
        device: device of the computation; None: the model's own.
        allow_pickle: see `load_pretrained`.
        progress: called with (stage, tokens done, tokens in all, seconds) after every document.
        log: called with lines on what was chosen, what the guarantee rests on and how long the work takes, before it
            begins.
        **settings: fields of the config, which replace those of `config`.

    Returns:
        The record, as written to `consolidation.json`; `load_consolidated(model, out)` puts it into use.

    Raises:
        UsageError: when a setting, the text or the model cannot be used, or the bound cannot be certified.
        FileExistsError: when `out` holds another consolidation, or this one and `resume` is false.
    """
    _need_transformers()
    from cramlab.consolidation.config import HELD_OUT, PARTS, REDRAWN, ConsolidationConfig
    from cramlab.consolidation.earlier import config_before, learned_before
    from cramlab.consolidation.finished import unlike
    from cramlab.consolidation.folder import RECORD, load_record
    from cramlab.consolidation.in_use import load_in_use, measure_in_use
    from cramlab.consolidation.pipeline import consolidate, recalibrate
    from cramlab.consolidation.plan import planned

    if start is not None and further_text is not None:
        raise ConsolidationError(
            "with --from (start) nothing is learned, so --further-text (further_text) has no use; leave it out"
        )
    start = None if start is None else Path(start)
    chosen = set[str]() if config is not None else {field.name for field in fields(ConsolidationConfig)} - set(settings)
    if config is None:
        config = ConsolidationConfig() if start is None else config_before(load_record(start), start)
    config = replaced(config, settings)
    path = Path(out) / RECORD
    done = finished(path, resume=resume)
    placed = None if device is None else device_named(str(device))
    corpora = [None if given is None else corpus_of(given, text_field) for given in (text, further_text)]
    pretrained = _on(placed, load_pretrained(model, allow_pickle=allow_pickle))
    corpus, further = _written(corpora, pretrained, chat, log)
    assert corpus is not None
    if chosen:
        learned_from = corpus, PARTS
        if start is not None:  # only what a calibration may change, and only documents that nothing was learned from
            chosen &= set(REDRAWN) - {"context", "seed"}
            learned_from = learned_before(pretrained.model, start, corpus, config)[2], HELD_OUT
        plan = planned(
            pretrained, learned_from[0], config, free=chosen, increase=max_loss_increase, parts=learned_from[1]
        )
        config = plan.config
        if log is not None:
            for line in plan.said:
                log(line)
    asked: dict[str, Any] = {"max_loss_increase": max_loss_increase}
    if done:
        refuse_changed(path, unlike(path.parent, pretrained, corpus, config, further=further, start=start, **asked))
        record = load_record(path.parent)
    else:
        asked |= {"out": path.parent, "progress": progress, "log": log}
        if start is None:
            record = consolidate(pretrained, corpus, config, further=further, **asked)
        else:
            record = recalibrate(pretrained, corpus, config, start=start, **asked)
    with only_process_in(path.parent):  # also removes what a killed process was writing
        clear(path.parent)
        if (in_use := load_in_use(path.parent, record)) is None:
            in_use = measure_in_use(pretrained, path.parent, _examples(pretrained, corpus, config, start), progress)
        write_text(path.with_name(PAGE), render_consolidation(record, in_use))
    return record


def _examples(pretrained: Pretrained, corpus: Corpus, config: Any, start: Path | None) -> list[tuple[str, Tensor]]:
    """Names and tokens of the first test documents of a consolidation."""
    from cramlab.consolidation.documents import test_documents
    from cramlab.consolidation.earlier import learned_before
    from cramlab.consolidation.in_use import DOCUMENTS

    if start is not None:
        _, _, corpus = learned_before(pretrained.model, start, corpus, config)
    return test_documents(pretrained, corpus, config)[:DOCUMENTS]


def load_consolidated(
    model: Model, folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Loads a pretrained model with a consolidation in place; use it as you used the model before.

    Args:
        model: see `load_pretrained`; a loaded model needs no tokenizer and is patched in place.
        folder: folder that `consolidate` wrote, or name of a repository of the hub, from which no code is run.
        revision: branch, tag or commit of that repository.
        trust_remote_code: see `load_pretrained`.

    Raises:
        ConsolidationError: when the folder is not found, unfinished, damaged, or was made for another model.
    """
    _need_transformers()
    from cramlab.consolidation import folder as consolidation_folder
    from cramlab.consolidation.hub import folder_named

    found = folder_named(folder, revision=revision)
    if not isinstance(model, nn.Module):
        model = load_pretrained(model, trust_remote_code=trust_remote_code).model
    return consolidation_folder.load(model, found)


def skip_counts(model: nn.Module) -> SkipCounts:
    """Counts the far reads that a consolidated model made and skipped since it was loaded, layer by layer.

    Args:
        model: a model from `load_consolidated`; for a model without a consolidation, `live` is false.
    """
    _need_transformers()
    from cramlab.consolidation.folder import skip_counts

    return skip_counts(model)


def guard(
    model: nn.Module,
    alpha: float = 0.01,
    *,
    audit_frac: float = 0.002,
    reference: Sequence[Tensor] | None = None,
    on_alarm: Callable[[Alarm], None] | None = None,
    seed: int = 0,
) -> Guard:
    """Watches whether a consolidated model keeps its guarantee in use, and reads more when it does not.

    A small share of documents and tokens is audited: their skipped reads are made once more, and what skipping changed
    is held against what was promised. On an alarm the thresholds move to one that reads at least twice as much, at last
    to the original model. Audits are counted by `skip_counts`.

    Example: `guard = cramlab.guard(model, alpha=0.01)`, then use the model, then `print(guard.report())`.

    Args:
        model: a model from `load_consolidated`.
        alpha: probability of a false alarm over all time, at most, as long as the guarantee holds.
        audit_frac: probability that a document that is scored, or a token that is generated, is audited.
        reference: token ids, (T,), of documents that the model was neither learned nor calibrated on, of the same kind
            of text; without them, generated tokens are not audited.
        on_alarm: called with each `consolidation.guard.Alarm`.
        seed: seed of the choice of audits.

    Raises:
        ConsolidationError: when an argument is out of its range, or the model has no consolidation, or a guard already.
    """
    _need_transformers()
    from cramlab.consolidation.guard import Guard

    return Guard(model, alpha=alpha, audit_frac=audit_frac, reference=reference, on_alarm=on_alarm, seed=seed)


def _written(
    corpora: list[Corpus | None], pretrained: Pretrained, chat: Chat, log: Callable[[str], None] | None
) -> list[Corpus | None]:
    """The corpora with conversations as the model is given them; says what was chosen while they were read."""
    written = [None if corpus is None else corpus.written(pretrained.chat, chat) for corpus in corpora]
    if log is not None:
        for corpus in written:
            for note in () if corpus is None else corpus.notes:
                log(f"text: {note}")
    return written


def _on(device: torch.device | None, pretrained: Pretrained) -> Pretrained:
    """The model on a device; None: where it is."""
    if device is not None:
        pretrained.model.to(device)
    return pretrained


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise LoadError('consolidating needs transformers; pip install "cramlab[hf]"')
