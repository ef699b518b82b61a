"""Documents of a corpus as contexts of token ids, split into disjoint parts; documents held out of learning."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from cramlab.auditing.checks import check_tokens
from cramlab.auditing.copies import Originals
from cramlab.consolidation.config import HELD_OUT, PARTS, ConsolidationConfig
from cramlab.consolidation.pieces import blocks
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.text import Corpus, Document


def order_of(corpus: Corpus, seed: int) -> list[int]:
    """Indices of the documents in the random order in which they are taken."""
    return torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()


def distinct(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, originals: Originals | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The first `context` tokens of documents that are long enough, in random order, without copies.

    Args:
        pretrained: model and tokenizer.
        corpus: documents to draw from.
        config: number of tokens taken of each, least number of tokens, and seed of the order.
        originals: records what is drawn, and counts the copies that are left out; see `auditing.copies`.

    Yields:
        Index of the document and its tokens (T,), on the model's device.
    """
    device = next(pretrained.model.parameters()).device
    originals = originals or Originals()
    for i in order_of(corpus, config.seed):
        tokens = first_tokens(pretrained, corpus.documents[i], config.context)
        if len(tokens) >= config.least_tokens and originals.take(tokens):
            yield i, tokens.to(device)


def first_tokens(pretrained: Pretrained, document: Document, context: int) -> Tensor:
    """The first tokens of a document, (T,) with T at most `context`."""
    # Tokens rarely have more than 16 characters, so the rest of a long document is not encoded.
    return torch.tensor(pretrained.encode(document.text[: 16 * context])[:context], dtype=torch.int64)


class Parts(dict[str, list[Tensor]]):
    """The contexts of each part, (T,) each, by name of the part.

    Attributes:
        copies: number of documents left out as exact or near copies, by reason: "held_out" and "fitted" while those
            parts were drawn, "learning" and "further" because a context of the document copies one that is held out.
    """

    def __init__(self, parts: dict[str, list[Tensor]], copies: dict[str, int]) -> None:
        super().__init__(parts)
        self.copies = copies


def held_out_of(pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig) -> Parts:
    """The parts of `HELD_OUT` alone, with the same documents as in `parts_of`, and the same errors."""
    found, copies = _drawn_parts(pretrained, corpus, config, HELD_OUT)
    parts = Parts({part: [tokens for _, tokens in taken] for part, taken in found.items()}, copies)
    parts.update(_at_other_lengths(pretrained, corpus, config, found))
    return parts


def at_length(part: str, length: int) -> str:
    """Name of a held-out part whose documents are cut to one of `calibrated_lengths`."""
    return f"{part}-{length}"


def _at_other_lengths(
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    found: Mapping[str, Sequence[tuple[int, Tensor]]],
) -> dict[str, list[Tensor]]:
    """The held-out documents at `calibrated_lengths`, without those that are shorter, by `at_length`.

    Raises:
        ConsolidationError: when a part has no document of such a length.
    """
    device = next(pretrained.model.parameters()).device
    cut: dict[str, list[Tensor]] = {}
    for length in config.calibrated_lengths:
        for part in HELD_OUT:
            starts = [first_tokens(pretrained, corpus.documents[i], length).to(device) for i, _ in found[part]]
            cut[at_length(part, length)] = long = [tokens for tokens in starts if len(tokens) == length]
            if not long:
                raise ConsolidationError(
                    f"consolidation.calibrated_lengths: none of the {len(starts)} {part} documents has {length} "
                    "tokens; leave this length out, or give more text"
                )
    return cut


def test_documents(pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig) -> list[tuple[str, Tensor]]:
    """Names of the documents of the test part, each with its context (T,), as in `parts_of`."""
    found, _ = _drawn_parts(pretrained, corpus, config, PARTS[:1])
    return [(corpus.documents[i].name, tokens) for i, tokens in found["test"]]


def parts_of(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, further: Corpus | None = None
) -> Parts:
    """The parts of `PARTS`, and the contexts for gradient steps: "learning" and, from other text, "further".

    Test and calibration documents are drawn first, so they stay the same when others change in size. No context of
    these parts is a copy of another. Learning takes all contexts of all documents except those of `HELD_OUT` and those
    that hold a copy of one of these. Where the unit is a piece, learning takes all pieces of the blocks that are not
    held out, see `pieces.blocks`.

    Raises:
        ConsolidationError: when too few documents are as long as a context.
        AuditError: when the tokenizer makes tokens that the model does not know.
    """
    found, copies = _drawn_parts(pretrained, corpus, config, PARTS)
    parts = Parts({part: [tokens for _, tokens in taken] for part, taken in found.items()}, copies)
    learning = found.pop("learning", None)
    held_out, texts = Originals(), {corpus.documents[i].text for part in HELD_OUT for i, _ in found[part]}
    for part in HELD_OUT:
        for tokens in parts[part]:
            held_out.take(tokens)
    for name, source in (("learning", corpus), ("further", further)):
        parts[name], parts.copies[name] = [], 0
        if not (config.local_steps or config.end_steps) or source is None:
            continue
        if name == "learning" and learning is not None:
            parts[name] = [tokens for _, tokens in learning[: config.learning_contexts]]
        else:
            parts[name], parts.copies[name] = _all_contexts(pretrained, source, config, texts, held_out)
        longest = max(map(len, parts[name]), default=0)
        if parts[name] and longest < config.longest_learned and config.learning_lengths:
            raise ConsolidationError(
                f"consolidation.learning_lengths = {config.learning_lengths}: the longest context of the "
                f"{name} text has {longest} tokens; use shorter ones, or give longer text"
            )
    parts.update(_at_other_lengths(pretrained, corpus, config, found))
    return parts


def used_documents(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, further: Corpus | None
) -> list[str]:
    """Digests of all documents that something may be learned from or chosen by: all but test and calibration."""
    unseen: set[str] = set()
    if config.unit == "document":  # a document of which pieces are learned from is known in whole
        found, _ = _drawn_parts(pretrained, corpus, config, HELD_OUT)
        unseen = {corpus.documents[i].text for part in ("test", "calibration") for i, _ in found[part]}
    given = [*corpus.documents, *(() if further is None else further.documents)]
    return sorted({_digest(document) for document in given if document.text not in unseen})


def unused(corpus: Corpus, digests: Collection[str]) -> Corpus:
    """The documents of a text whose digests are not among those of `used_documents`."""
    used = set(digests)
    return dataclasses.replace(corpus, documents=tuple(d for d in corpus.documents if _digest(d) not in used))


def _digest(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()[:12]


def _drawn_parts(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, parts: tuple[str, ...]
) -> tuple[dict[str, list[tuple[int, Tensor]]], dict[str, int]]:
    """The first parts of `PARTS`, with the indices of their documents, and the number of copies left out by reason."""
    longest = pretrained.context
    lengths = {"context": config.context, "learning_lengths": config.learning_lengths}
    for name, value in (lengths | {"calibrated_lengths": config.calibrated_lengths}).items():
        if max(value if isinstance(value, tuple) else (value,), default=0) > longest:
            raise ConsolidationError(
                f"consolidation.{name} = {value} is longer than the model's context; use at most {longest}"
            )
    if config.unit == "piece":
        found, n_copies = blocks(pretrained, corpus, config, order_of(corpus, config.seed), parts)
        check_tokens(pretrained.model, [tokens for taken in found.values() for _, tokens in taken])
        return found, {"held_out" if set(parts) <= set(HELD_OUT) else "fitted": n_copies}
    sizes = {part: getattr(config, f"{part}_documents") for part in parts}
    originals, copies = Originals(), dict[str, int]()
    documents = distinct(pretrained, corpus, config, originals)
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
            f"the text has {n_found} documents of at least {config.least_tokens} tokens{left_out}, but {n_wanted} are "
            f"needed ({wanted}); give more text, or lower consolidation.context or the numbers of documents"
        )
    check_tokens(pretrained.model, [tokens for taken in found.values() for _, tokens in taken])
    return found, copies


def _all_contexts(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, texts: set[str], held_out: Originals
) -> tuple[list[Tensor], int]:
    """All contexts of documents in random order, (T,) each, every document from its start to its end.

    Args:
        pretrained: model and tokenizer.
        corpus: documents.
        config: length and number of the contexts.
        texts: texts of the documents that are held out.
        held_out: contexts of these. A document is left out when it holds a copy of one at any place: of the windows
            that start every half context, one shares three quarters with the copy, and so 0.6 of all shingles. Where
            documents may be shorter than a context, so are windows.

    Returns:
        The contexts, and the number of documents left out as copies.
    """
    device, length = next(pretrained.model.parameters()).device, config.longest_learned
    found: list[Tensor] = []
    n_copies = 0
    for i in order_of(corpus, config.seed):
        if len(found) >= config.learning_contexts:
            break
        if (text := corpus.documents[i].text) in texts:
            continue
        tokens = torch.tensor(pretrained.encode(text), dtype=torch.int64)
        if len(tokens) < config.least_tokens:
            continue
        if held_out.knows(*_windows(tokens, config)):
            n_copies += 1
            continue
        found += [part for part in tokens.to(device).split(length) if len(part) >= config.least_tokens]
    found = found[: config.learning_contexts]
    check_tokens(pretrained.model, found)
    return found, n_copies


def _windows(tokens: Tensor, config: ConsolidationConfig) -> Iterator[Tensor]:
    """The windows of a document (T,) in which copies are looked for: of a context, and of its halves if need be."""
    length = config.context
    while length > config.least_tokens and length > len(tokens):
        length = max(config.least_tokens, length // 2)
    while True:
        yield from tokens.unfold(0, length, max(1, length // 2))
        if length == config.least_tokens:
            return
        length = max(config.least_tokens, length // 2)


def held_out_at(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, context: int, n_documents: int
) -> list[Tensor]:
    """Held-out documents cut to another length, (T,) each: test documents first, then calibration documents.

    Args:
        pretrained: model and tokenizer.
        corpus: documents that the parts were drawn from.
        config: config that they were drawn with.
        context: number of tokens of each; shorter documents are left out.
        n_documents: number of documents, at most.

    Raises:
        ConsolidationError: when the parts were drawn from pieces of documents.
    """
    if config.unit == "piece":
        raise ConsolidationError("the parts are pieces of documents (consolidation.unit), so no document is held out")
    n_clean = config.test_documents + config.calibration_documents
    device = next(pretrained.model.parameters()).device
    found: list[Tensor] = []
    for i, _ in islice(distinct(pretrained, corpus, config), n_clean):
        tokens = first_tokens(pretrained, corpus.documents[i], context)
        if len(tokens) == context and len(found) < n_documents:
            found.append(tokens.to(device))
    return found


def running_contexts(pretrained: Pretrained, corpus: Corpus, context: int, n_contexts: int, seed: int) -> list[Tensor]:
    """Documents in random order, concatenated and cut into contexts (T,); for text whose documents are short."""
    device = next(pretrained.model.parameters()).device
    stream: list[int] = []
    for i in order_of(corpus, seed):
        if len(stream) >= n_contexts * context:
            break
        stream += pretrained.encode(corpus.documents[i].text + "\n\n")
    whole = torch.tensor(stream, device=device).split(context)
    return [part for part in whole if len(part) == context][:n_contexts]
