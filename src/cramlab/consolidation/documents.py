"""Documents of a corpus as contexts of token ids, split into disjoint parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator
from itertools import islice

import torch
from torch import Tensor

from cramlab.auditing.checks import check_tokens
from cramlab.auditing.copies import Originals
from cramlab.auditing.text import Corpus, Document
from cramlab.consolidation.config import HELD_OUT, PARTS, RetrofitConfig
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained


def order_of(corpus: Corpus, seed: int) -> list[int]:
    """The random order in which documents are taken."""
    return torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()


def distinct(
    pretrained: Pretrained, corpus: Corpus, context: int, seed: int, originals: Originals | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The first `context` tokens of documents that have them, in random order, without copies.

    Args:
        pretrained: whose tokens to count.
        corpus: to draw from.
        context: tokens of each.
        seed: of the order.
        originals: takes what is drawn, and counts the copies that are passed over; see `auditing.copies`.

    Yields:
        Index of the document and its tokens (T,), on the model's device.
    """
    device = next(pretrained.model.parameters()).device
    originals = originals or Originals()
    for i in order_of(corpus, seed):
        # Few tokenizers make a token of more than 16 characters; the rest of a long document need not be looked at.
        tokens = torch.tensor(pretrained.encode(corpus.documents[i].text[: 16 * context])[:context])
        if len(tokens) == context and originals.take(tokens):
            yield i, tokens.to(device)


def contexts(pretrained: Pretrained, corpus: Corpus, context: int, n_documents: int, seed: int) -> list[Tensor]:
    """The first of `distinct`, at most so many, without the indices."""
    return [tokens for _, tokens in islice(distinct(pretrained, corpus, context, seed), n_documents)]


class Parts(dict[str, list[Tensor]]):
    """The contexts of each part, (T,) each, by its name.

    Attributes:
        copies: documents that were left out as copies, exact or near: "held_out" and "fitted" while these were drawn,
            "learning" and "further" where a context of theirs is a copy of one that is held out.
    """

    def __init__(self, parts: dict[str, list[Tensor]], copies: dict[str, int]) -> None:
        super().__init__(parts)
        self.copies = copies


def held_out_of(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig) -> Parts:
    """The parts of `HELD_OUT` alone, the same documents as in `parts_of`; raises likewise."""
    found, copies = _drawn_parts(pretrained, corpus, config, HELD_OUT)
    return Parts({part: [tokens for _, tokens in taken] for part, taken in found.items()}, copies)


def parts_of(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, further: Corpus | None = None) -> Parts:
    """The parts of `PARTS`, and what gradients are taken from: "learning" and, of other text, "further".

    Test and calibration are drawn first, so they stay the same when others change in size. No context of these parts is
    a copy of another. Learning takes every context of all documents but those of `HELD_OUT`, and those that hold a copy
    of one of these.

    Raises:
        ConsolidationError: when there are too few documents as long as a context.
        AuditError: when the tokenizer makes tokens that the model does not know.
    """
    found, copies = _drawn_parts(pretrained, corpus, config, PARTS)
    parts = Parts({part: [tokens for _, tokens in taken] for part, taken in found.items()}, copies)
    held_out, texts = Originals(), {corpus.documents[i].text for part in HELD_OUT for i, _ in found[part]}
    for part in HELD_OUT:
        for tokens in parts[part]:
            held_out.take(tokens)
    for name, source in (("learning", corpus), ("further", further)):
        parts[name], parts.copies[name] = [], 0
        if source is not None and (config.local_steps or config.end_steps):
            parts[name], parts.copies[name] = _all_contexts(pretrained, source, config, texts, held_out)
    return parts


def used_documents(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, further: Corpus | None) -> list[str]:
    """Digests of the documents that anything may have been learned from or chosen by: all but test and calibration."""
    found, _ = _drawn_parts(pretrained, corpus, config, HELD_OUT)
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
) -> tuple[dict[str, list[tuple[int, Tensor]]], dict[str, int]]:
    """The first parts of `PARTS`, with the indices of their documents; and the copies that were passed over."""
    longest = pretrained.context
    if config.context > longest:
        raise ConsolidationError(f"retrofit.context = {config.context} is longer than the model's own, {longest}")
    sizes = {part: getattr(config, f"{part}_documents") for part in parts}
    originals, copies = Originals(), dict[str, int]()
    documents = distinct(pretrained, corpus, config.context, config.seed, originals)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part, n_documents in sizes.items():
        found[part] = list(islice(documents, n_documents))
        kind = "held_out" if part in HELD_OUT else "fitted"
        copies[kind] = originals.n_copies - (copies["held_out"] if kind == "fitted" else 0)
    n_found, n_wanted = sum(map(len, found.values())), sum(sizes.values())
    if n_found < n_wanted:
        wanted = ", ".join(f"{n} {part}" for part, n in sizes.items())
        left_out = f" and {originals.n_copies} copies of these" if originals.n_copies else ""
        raise ConsolidationError(
            f"the text has {n_found} documents of at least {config.context} tokens{left_out}, but {n_wanted} are "
            f"needed ({wanted}); give more text, or lower retrofit.context or the numbers of documents"
        )
    check_tokens(pretrained.model, [tokens for taken in found.values() for _, tokens in taken])
    return found, copies


def _all_contexts(
    pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig, texts: set[str], held_out: Originals
) -> tuple[list[Tensor], int]:
    """Contexts of documents in random order, every document from its start to its end, (T,) each.

    Args:
        pretrained: whose tokens to take.
        corpus: the text.
        config: with the length and the number of contexts.
        texts: of documents that are held out.
        held_out: the contexts of these. A document is left out when it holds a copy of one, wherever that begins: of
            windows that start every half context, one shares three quarters with it, and so 0.6 of all shingles.

    Returns:
        The contexts, and the number of documents that were left out as copies.
    """
    device, length = next(pretrained.model.parameters()).device, config.context
    found: list[Tensor] = []
    n_copies = 0
    for i in order_of(corpus, config.seed):
        if len(found) >= config.learning_contexts:
            break
        if (text := corpus.documents[i].text) in texts:
            continue
        tokens = torch.tensor(pretrained.encode(text), dtype=torch.int64)
        if len(tokens) < length:
            continue
        if held_out.knows(*tokens.unfold(0, length, max(1, length // 2))):
            n_copies += 1
            continue
        found += [part for part in tokens.to(device).split(length) if len(part) == length]
    found = found[: config.learning_contexts]
    check_tokens(pretrained.model, found)
    return found, n_copies


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
    for i, _ in islice(distinct(pretrained, corpus, config.context, config.seed), n_clean):
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
