"""The audit of a loaded model on named text, with its controls: what `cramlab audit` runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cramlab.audit.checks import checked_sites
from cramlab.audit.config import AuditConfig
from cramlab.audit.controls import planted_control, summary
from cramlab.audit.result import AuditResult, peak_memory_bytes
from cramlab.audit.resume import Progress
from cramlab.audit.run import audit
from cramlab.audit.text import Corpus
from cramlab.hf.loading import Pretrained, with_random_weights


def tokenised(pretrained: Pretrained, corpus: Corpus, config: AuditConfig) -> list[Tensor]:
    """The documents as token ids, no longer than the audit looks at."""
    longest = config.context * config.contexts_per_document
    # No tokenizer makes more than one token of a byte, few make one of more than 16 characters.
    return [torch.tensor(pretrained.encode(d.text[: 16 * longest])[:longest]) for d in corpus.documents]


def described(corpus: Corpus, other: Corpus | None) -> dict[str, Any]:
    """The text of an audit, as its record names it."""
    return corpus.described() | {"other": None if other is None else other.described()}


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
    """`audit` on the documents of a corpus; the result names model, text and documents.

    Args:
        pretrained: the model with its tokenizer.
        corpus: what to audit it on.
        config: sizes and choices; a context longer than the model's is shortened to it.
        other: text of another domain.
        controls: also audit the planted model, and this model with random weights on a quarter of the text.
        out: folder for the state of an unfinished audit.
        progress: see `audit`.
    """
    config = dataclasses.replace(config, context=min(config.context, pretrained.context))
    checked_sites(pretrained.model, config)  # before the tokenizer is put to work
    documents = tokenised(pretrained, corpus, config)
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
            example["document_name"] = corpus.documents[example["document"]].name
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
    """The same shape with nothing learned; redundancy only."""
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
