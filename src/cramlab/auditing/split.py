"""Cuts documents into contexts and splits them into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.copies import Originals
from cramlab.errors import AuditError


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """The contexts of one document.

    Attributes:
        document: index of the document.
        tokens: token ids, int64 (C, T).
    """

    document: int
    tokens: Tensor

    def batches(self, batch_tokens: int) -> Sequence[Tensor]:
        """Returns batches (B, T) of at most `batch_tokens` tokens, at least one context each."""
        return self.tokens.split(max(1, batch_tokens // self.tokens.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Disjoint parts of the documents, in random order.

    Attributes:
        fit: documents for fitting probes.
        validation: documents for selecting ridge strengths.
        test: documents for measuring all figures.
        n_copies: number of documents that were left out as copies of others, see `auditing.copies`.
    """

    fit: tuple[Contexts, ...]
    validation: tuple[Contexts, ...]
    test: tuple[Contexts, ...]
    n_copies: int = 0


def count_tokens(part: Sequence[Contexts]) -> int:
    """Returns the number of tokens in a part."""
    return sum(contexts.tokens.numel() for contexts in part)


def cut(documents: Sequence[Tensor], config: AuditConfig) -> list[Contexts]:
    """Cuts every document into whole contexts, at most `contexts_per_document`; shorter documents are dropped.

    Raises:
        AuditError: when every document is shorter than a context.
    """
    cut_documents = []
    for i, tokens in enumerate(documents):
        n = min(len(tokens) // config.context, config.contexts_per_document)
        if n:
            cut_documents.append(
                Contexts(document=i, tokens=tokens[: n * config.context].long().view(n, config.context))
            )
    if not cut_documents:
        longest = max((len(tokens) for tokens in documents), default=0)
        raise AuditError(
            f"every document is shorter than a context: the longest has {longest} tokens, audit.context is "
            f"{config.context}; give longer documents or a shorter context"
        )
    return cut_documents


def split(
    documents: Sequence[Tensor], config: AuditConfig, n_features: int, apart_from: Sequence[Contexts] = ()
) -> Split:
    """Splits documents at random into test, validation and fit, filling the parts in this order.

    When the text has fewer tokens than requested, all parts shrink by the same factor. Of documents that are copies of
    each other, only the first in the random order is used. Where the unit is a piece, the order is that of the text,
    and a piece between two parts is left out.

    Args:
        documents: token ids, one 1-D tensor per document.
        config: sizes of the parts, and the seed.
        n_features: number of features of the probes.
        apart_from: documents whose copies are left out as well.

    Raises:
        AuditError: when a part would be empty, or the part for fitting has fewer tokens than features.
    """
    contexts = cut(documents, config)
    in_pieces = config.unit == "piece"
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    order = sorted(order) if in_pieces else order
    wanted = {"test": config.test_tokens, "validation": config.validation_tokens, "fit": config.fit_tokens}
    originals = Originals()
    for one in apart_from:
        originals.take(*one.tokens)
    kept: list[Contexts] = []
    n_kept = 0
    # A part ends with the document that fills it, so each may exceed its number of tokens by one document.
    enough = sum(wanted.values()) + len(wanted) * config.context * config.contexts_per_document
    for i in order:
        if n_kept >= enough:
            break
        if originals.take(*contexts[i].tokens):
            kept.append(contexts[i])
            n_kept += contexts[i].tokens.numel()
    shrink = min(1.0, n_kept / sum(wanted.values()))
    parts: dict[str, list[Contexts]] = {name: [] for name in wanted}
    remaining = iter(kept)
    for name, n_tokens in wanted.items():
        while count_tokens(parts[name]) < shrink * n_tokens and (one := next(remaining, None)) is not None:
            parts[name].append(one)
        if in_pieces:
            next(remaining, None)
    left_out = f" ({originals.n_copies} further ones are copies)" if originals.n_copies else ""
    for name, part in parts.items():
        if not part:
            raise AuditError(
                f"{len(kept)} documents{left_out} are too few to split into fit, validation and test ({name} is "
                "empty); give at least three documents as long as a context, 100 recommended"
            )
    if (n_fit := count_tokens(parts["fit"])) < n_features:
        raise AuditError(
            f"{len(kept)} documents{left_out} give {n_fit} tokens for fitting, fewer tokens than features "
            f"({n_features}, hidden width and bias); give more text, or raise audit.fit_tokens or "
            "audit.contexts_per_document"
        )
    return Split(**{name: tuple(part) for name, part in parts.items()}, n_copies=originals.n_copies)
