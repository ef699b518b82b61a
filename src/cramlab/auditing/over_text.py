"""Audits a loaded model on named text, with controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cramlab.auditing.checks import checked_sites
from cramlab.auditing.config import AuditConfig
from cramlab.auditing.controls import planted_control, summary
from cramlab.auditing.figures import peak_memory_bytes
from cramlab.auditing.result import AuditResult
from cramlab.auditing.resume import Identity, Progress
from cramlab.auditing.run import audit, digests
from cramlab.config import changed_since
from cramlab.hf.loading import Pretrained, with_random_weights
from cramlab.records import RecordError
from cramlab.text import Corpus

_FEW = 24  # fewer documents are cut into pieces
_LEAST_CONTEXT = 16  # tokens
_LOOKED_AT = 4096  # documents whose lengths are looked at, at most


def tokenised(pretrained: Pretrained, corpus: Corpus, config: AuditConfig) -> list[Tensor]:
    """Returns the documents as token ids (T,), cut to the length that the audit uses, or all pieces of this length."""
    return [tokens for _, tokens in _named(pretrained, corpus, config)]


def _named(pretrained: Pretrained, corpus: Corpus, config: AuditConfig) -> list[tuple[str, Tensor]]:
    """Returns the token ids (T,) of documents or pieces, with the names of the documents."""
    longest = config.context * config.contexts_per_document
    most = config.fit_tokens + config.validation_tokens + config.test_tokens + 8 * longest
    kept = most if config.unit == "piece" else longest
    named = []
    for document in corpus.documents:
        # 16 characters per token leave enough text, as tokens are seldom longer.
        tokens = torch.tensor(pretrained.encode(document.text[: 16 * kept])[:kept], dtype=torch.int64)
        named += [(document.name, piece) for piece in tokens.split(longest)]
    return named


def fitted(pretrained: Pretrained, corpus: Corpus, config: AuditConfig, free: Collection[str]) -> AuditConfig:
    """Returns the config with a shorter context where most documents are short, and pieces where documents are few.

    Args:
        pretrained: model and tokenizer.
        corpus: the text.
        config: config whose values are kept where the text allows.
        free: names of the fields that may be changed.
    """
    config = sized(config, pretrained) if "context" in free else config
    order = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(config.seed)).tolist()
    looked_at = [corpus.documents[i].text[: 16 * config.context] for i in order[:_LOOKED_AT]]
    lengths = [len(pretrained.encode(text)) for text in looked_at]

    def suffices(context: int) -> bool:
        return sum(length >= context for length in lengths) >= max(_FEW, len(lengths) / 3)

    context = config.context
    while "context" in free and context > _LEAST_CONTEXT and not suffices(context):
        context //= 2
    if suffices(context):
        return dataclasses.replace(config, context=context)
    return dataclasses.replace(config, unit="piece") if "unit" in free and len(lengths) < _FEW else config


def said(corpus: Corpus, config: AuditConfig) -> list[str]:
    """Returns what is said before the work: what the parts are made of, and what that does to the intervals."""
    n = len(corpus.documents)
    documents = "one document" if n == 1 else f"{n:,} documents"
    lines = [f"text: {corpus.name} has {documents}; contexts have {config.context} tokens, shorter ends are left out"]
    if config.unit == "piece":
        lines.append(
            f"narrow intervals: they count blocks of {config.contexts_per_document} contexts of {documents}, which "
            "depend on each other, as if they did not; the parts are successive, with unused blocks between them"
        )
    return lines


def described(corpus: Corpus, other: Corpus | None) -> dict[str, Any]:
    """Returns the description of an audit's text that its record holds."""
    return corpus.described() | {"other": None if other is None else other.described()}


def sized(config: AuditConfig, pretrained: Pretrained) -> AuditConfig:
    """Returns the config with its context shortened to the model's longest."""
    return dataclasses.replace(config, context=min(config.context, pretrained.context))


def unlike(
    result: AuditResult,
    pretrained: Pretrained,
    corpus: Corpus,
    config: AuditConfig,
    *,
    other: Corpus | None = None,
    controls: bool = False,
) -> list[str]:
    """Returns names of what differs between a finished audit and a request: fields of the config, "text" and so on.

    Args:
        result: the finished audit.
        pretrained: as for `audit_text`.
        corpus: as for `audit_text`.
        config: as for `audit_text`.
        other: as for `audit_text`.
        controls: as for `audit_text`.

    Raises:
        RecordError: when the audit was written by a version that stored no digests, so it cannot be compared.
    """
    config, data = sized(config, pretrained), result.data
    documents = [tokenised(pretrained, one, config) for one in (corpus, other) if one is not None]
    model, text = digests(Identity.of(pretrained.model, [*documents, []][:2]))
    if missing := model.keys() - data["model"].keys() | text.keys() - data["text"].keys():
        raise RecordError(
            f"this audit of {data['model']['name']} was written by an earlier version of cramlab, which stored no "
            f"digests of model and tokens ({', '.join(sorted(missing))}), so it cannot be compared with this request. "
            "AuditResult.read still reads it; choose another --out"
        )
    # A record of an audit over training has no other text and does not name it.
    same_text = all(data["text"].get(name) == value for name, value in described(corpus, other).items())
    changed = {
        "model": any(data["model"][name] != value for name, value in model.items()),
        "text": not same_text,
        "tokenizer": same_text and any(data["text"][name] != value for name, value in text.items()),
        "controls": bool(data["controls"]) != controls,
    }
    return [*changed_since(data["config"], config), *(name for name, is_so in changed.items() if is_so)]


def audit_text(
    pretrained: Pretrained,
    corpus: Corpus,
    config: AuditConfig,
    *,
    other: Corpus | None = None,
    controls: bool = True,
    out: Path | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Audits a model on the documents of a corpus; the result names model, text and documents.

    Args:
        pretrained: model with its tokenizer.
        corpus: text to audit the model on.
        config: settings; a context longer than the model's is shortened.
        other: text of another domain, for the probe that is trained there; None: no such probe.
        controls: whether to also audit the planted model, and this model with random weights on a quarter of the text.
        out: folder for the state of an unfinished audit; None: it cannot be continued.
        progress: as for `audit`.
    """
    config = sized(config, pretrained)
    checked_sites(pretrained.model, config)  # before the text is tokenised, which takes long
    named = _named(pretrained, corpus, config)
    documents = [tokens for _, tokens in named]
    result = audit(
        pretrained.model,
        documents,
        config,
        other=None if other is None else tokenised(pretrained, other, config),
        decode=pretrained.decode,
        mask_token=pretrained.mask_token,
        out=out,
        progress=progress,
    )
    for examples in result.data["examples"].values():
        for example in examples:
            example["document_name"] = named[example["document"]][0]
    result = result.described(
        {"name": pretrained.name, "note": pretrained.note},
        described(corpus, other),
    )
    if controls:
        result = result.with_control("planted", planted_control(config.seed))
        result = result.with_control(
            "random_weights", summary(_random_weights(pretrained, documents, config, out, progress))
        )
    return AuditResult(result.data | {"peak_memory_bytes": peak_memory_bytes()})


def _random_weights(
    pretrained: Pretrained,
    documents: list[Tensor],
    config: AuditConfig,
    out: Path | None,
    progress: Progress | None,
) -> AuditResult:
    """Audits the same architecture with random weights, without the causal side."""
    smaller = dataclasses.replace(
        config,
        fit_tokens=config.fit_tokens // 4,
        validation_tokens=config.validation_tokens // 4,
        test_tokens=config.test_tokens // 4,
        causal_tokens=0,
    )
    fresh = with_random_weights(pretrained.model, config.seed)

    def named(stage: str, done: int, n_tokens: int, seconds: float) -> None:
        if progress is not None:
            progress(f"random weights, {stage}", done, n_tokens, seconds)

    return audit(
        fresh, documents, smaller, out=None if out is None else out / "state" / "random-weights", progress=named
    )
