"""Documents of a corpus as contexts of token ids, split into disjoint parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection

import torch
from torch import Tensor

from cramlab.audit.text import Corpus, Document
from cramlab.hf.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.retrofit.config import HELD_OUT, PARTS, RetrofitConfig


def order_of(corpus: Corpus, seed: int) -> list[int]:
    """The random order in which documents are taken."""
    return torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()


def drawn(
    pretrained: Pretrained, corpus: Corpus, context: int, n_documents: int, seed: int
) -> list[tuple[int, Tensor]]:
    """The first `context` tokens of documents that have them, in random order; at most `n_documents`.

    Returns:
        Index of the document and its tokens (T,), on the model's device.
    """
    device = next(pretrained.model.parameters()).device
    found: list[tuple[int, Tensor]] = []
    for i in order_of(corpus, seed):
        # Few tokenizers make a token of more than 16 characters; the rest of a long document need not be looked at.
        tokens = pretrained.encode(corpus.documents[i].text[: 16 * context])[:context]
        if len(tokens) == context:
            found.append((i, torch.tensor(tokens, device=device)))
        if len(found) == n_documents:
            break
    return found


def contexts(pretrained: Pretrained, corpus: Corpus, context: int, n_documents: int, seed: int) -> list[Tensor]:
    """See `drawn`; without the indices."""
    return [tokens for _, tokens in drawn(pretrained, corpus, context, n_documents, seed)]


def held_out_of(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig) -> dict[str, list[Tensor]]:
    """The parts of `HELD_OUT` alone, the same documents as in `parts_of`; raises likewise."""
    return {part: [t for _, t in taken] for part, taken in _drawn_parts(pretrained, corpus, config, HELD_OUT).items()}


def parts_of(
    pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, further: Corpus | None = None
) -> dict[str, list[Tensor]]:
    """The parts of `PARTS`, and what gradients are taken from: "learning" and, of other text, "further".

    Test and calibration are drawn first, so they stay the same when others change in size. Learning takes every context
    of all documents but those of `HELD_OUT` and copies of these.

    Raises:
        ConsolidationError: when there are too few documents as long as a context.
    """
    found = _drawn_parts(pretrained, corpus, config, PARTS)
    held_out = {corpus.documents[i].text for part in HELD_OUT for i, _ in found[part]}
    parts = {part: [tokens for _, tokens in taken] for part, taken in found.items()}
    parts["learning"] = _all_contexts(pretrained, corpus, config, held_out)
    parts["further"] = [] if further is None else _all_contexts(pretrained, further, config, held_out)
    return parts


def used_documents(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, further: Corpus | None) -> list[str]:
    """Digests of the documents that anything may have been learned from or chosen by: all but test and calibration."""
    found = _drawn_parts(pretrained, corpus, config, HELD_OUT)
    unseen = {corpus.documents[i].text for part in ("test", "calibration") for i, _ in found[part]}
    given = [*corpus.documents, *(() if further is None else further.documents)]
    return sorted({_digest(document) for document in given if document.text not in unseen})


def unused(corpus: Corpus, digests: Collection[str]) -> Corpus:
    """The documents of a text that are not among those of `used_documents`."""
    used = set(digests)
    return dataclasses.replace(corpus, documents=tuple(d for d in corpus.documents if _digest(d) not in used))


def _digest(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()[:12]


def _drawn_parts(
    pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, parts: tuple[str, ...]
) -> dict[str, list[tuple[int, Tensor]]]:
    """The first parts of `PARTS`, with the indices of their documents."""
    longest = pretrained.context
    if config.context > longest:
        raise ConsolidationError(f"retrofit.context = {config.context} is longer than the model's own, {longest}")
    sizes = {part: getattr(config, f"{part}_documents") for part in parts}
    n_wanted = sum(sizes.values())
    found = drawn(pretrained, corpus, config.context, n_wanted, config.seed)
    if len(found) < n_wanted:
        wanted = ", ".join(f"{n} {part}" for part, n in sizes.items())
        raise ConsolidationError(
            f"the text has {len(found)} documents of at least {config.context} tokens, but {n_wanted} are "
            f"needed ({wanted}); give more text, or lower retrofit.context or the numbers of documents"
        )
    rest = iter(found)
    return {part: [next(rest) for _ in range(n)] for part, n in sizes.items()}


def _all_contexts(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, without: set[str]) -> list[Tensor]:
    """Contexts of documents in random order, every document from its start to its end, (T,) each."""
    if not config.local_steps and not config.end_steps:
        return []
    device = next(pretrained.model.parameters()).device
    found: list[Tensor] = []
    for i in order_of(corpus, config.seed):
        if (text := corpus.documents[i].text) not in without:
            tokens = torch.tensor(pretrained.encode(text), device=device)
            found += [part for part in tokens.split(config.context) if len(part) == config.context]
        if len(found) >= config.learning_contexts:
            break
    return found[: config.learning_contexts]


def held_out_at(
    pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, context: int, n_documents: int
) -> list[Tensor]:
    """Documents at another length that nothing was learned from: test documents first, then those of the calibration.

    Args:
        pretrained: whose tokens to count.
        corpus: that the parts were drawn from.
        config: that they were drawn with.
        context: tokens of each; documents that are shorter are left out.
        n_documents: at most.
    """
    n_clean = config.test_documents + config.calibration_documents
    device = next(pretrained.model.parameters()).device
    found: list[Tensor] = []
    for i, _ in drawn(pretrained, corpus, config.context, n_clean, config.seed):
        tokens = pretrained.encode(corpus.documents[i].text[: 16 * context])[:context]
        if len(tokens) == context and len(found) < n_documents:
            found.append(torch.tensor(tokens, device=device))
    return found


def running_contexts(pretrained: Pretrained, corpus: Corpus, context: int, n_contexts: int, seed: int) -> list[Tensor]:
    """Documents in random order, one after another, cut into contexts (T,): for text whose documents are short."""
    device = next(pretrained.model.parameters()).device
    stream: list[int] = []
    for i in order_of(corpus, seed):
        if len(stream) >= n_contexts * context:
            break
        stream += pretrained.encode(corpus.documents[i].text + "\n\n")
    whole = torch.tensor(stream, device=device).split(context)
    return [part for part in whole if len(part) == context][:n_contexts]
