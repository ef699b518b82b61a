"""Tokens cut into contexts and split by document."""

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
        document: index among the documents given.
        tokens: int64 (C, T).
    """

    document: int
    tokens: Tensor

    def batches(self, batch_tokens: int) -> Sequence[Tensor]:
        """The contexts, as many at once as `batch_tokens` allows, at least one; (B, T) each."""
        return self.tokens.split(max(1, batch_tokens // self.tokens.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents for fitting, for choosing ridge strengths and for the figures; disjoint, in random order.

    Attributes:
        fit: see above.
        validation: see above.
        test: see above.
        n_copies: documents that were left out as copies of others, see `auditing.copies`.
    """

    fit: tuple[Contexts, ...]
    validation: tuple[Contexts, ...]
    test: tuple[Contexts, ...]
    n_copies: int = 0


def count_tokens(part: Sequence[Contexts]) -> int:
    """Tokens in a part."""
    return sum(contexts.tokens.numel() for contexts in part)


def cut(documents: Sequence[Tensor], config: AuditConfig) -> list[Contexts]:
    """Whole contexts of every document that has one, at most `contexts_per_document` each.

    Raises:
        AuditError: when no document is as long as a context.
    """
    found = []
    for i, tokens in enumerate(documents):
        n = min(len(tokens) // config.context, config.contexts_per_document)
        if n:
            found.append(Contexts(document=i, tokens=tokens[: n * config.context].long().view(n, config.context)))
    if not found:
        longest = max((len(tokens) for tokens in documents), default=0)
        raise AuditError(
            f"the text is shorter than a context: its longest document has {longest} tokens, audit.context is "
            f"{config.context}; give longer documents or a shorter context"
        )
    return found


def split(
    documents: Sequence[Tensor], config: AuditConfig, n_features: int, apart_from: Sequence[Contexts] = ()
) -> Split:
    """Splits documents at random into test, validation and fit, in that order, each up to its number of tokens.

    When there are fewer documents than asked for, each part keeps its share of what there is. Of documents that are
    copies of each other, the first in the random order is used alone.

    Args:
        documents: token ids, one 1-D tensor a document.
        config: sizes of the parts, and the seed.
        n_features: of the probes.
        apart_from: documents of which copies are left out as well.

    Raises:
        AuditError: when a part would be empty, or fitting would have fewer tokens than features.
    """
    contexts = cut(documents, config)
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    wanted = {"test": config.test_tokens, "validation": config.validation_tokens, "fit": config.fit_tokens}
    originals = Originals()
    for one in apart_from:
        originals.take(*one.tokens)
    kept: list[Contexts] = []
    n_kept = 0
    # A part ends with the document that fills it.
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
    left_out = f" ({originals.n_copies} more are copies of them)" if originals.n_copies else ""
    for name, part in parts.items():
        if not part:
            raise AuditError(
                f"{len(kept)} documents{left_out} are too few to split into fit, validation and test ({name} got "
                "none); give at least three documents as long as a context, better a hundred"
            )
    if (n_fit := count_tokens(parts["fit"])) < n_features:
        raise AuditError(
            f"fewer tokens than features: {n_fit} tokens to fit {n_features} features (hidden width and bias) from "
            f"{len(kept)} documents{left_out}; give more text, or raise audit.fit_tokens or "
            "audit.contexts_per_document"
        )
    return Split(**{name: tuple(part) for name, part in parts.items()}, n_copies=originals.n_copies)
