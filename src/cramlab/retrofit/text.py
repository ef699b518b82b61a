"""Documents of a corpus as contexts of token ids, split into disjoint parts."""

from __future__ import annotations

import torch
from torch import Tensor

from cramlab.audit.text import Corpus
from cramlab.hf.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.retrofit.config import PARTS, RetrofitConfig


def contexts(pretrained: Pretrained, corpus: Corpus, context: int, n_documents: int, seed: int) -> list[Tensor]:
    """The first `context` tokens of documents that have them, in random order, (T,) each; at most `n_documents`."""
    order = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[Tensor] = []
    for i in order:
        # Few tokenizers make a token of more than 16 characters; the rest of a long document need not be looked at.
        tokens = pretrained.encode(corpus.documents[i].text[: 16 * context])[:context]
        if len(tokens) == context:
            found.append(torch.tensor(tokens))
        if len(found) == n_documents:
            break
    return found


def parts_of(pretrained: Pretrained, corpus: Corpus, config: RetrofitConfig) -> dict[str, list[Tensor]]:
    """The parts of `PARTS`; test and calibration are drawn first, so they stay the same when others change in size.

    Raises:
        ConsolidationError: when there are too few documents as long as a context.
    """
    longest = pretrained.context
    if config.context > longest:
        raise ConsolidationError(f"retrofit.context = {config.context} is longer than the model's own, {longest}")
    found = contexts(pretrained, corpus, config.context, config.n_documents, config.seed)
    if len(found) < config.n_documents:
        wanted = ", ".join(f"{getattr(config, f'{part}_documents')} {part}" for part in PARTS)
        raise ConsolidationError(
            f"the text has {len(found)} documents of at least {config.context} tokens, but {config.n_documents} are "
            f"needed ({wanted}); give more text, or lower retrofit.context or the numbers of documents"
        )
    parts, rest = {}, iter(found)
    for part in PARTS:
        parts[part] = [next(rest) for _ in range(getattr(config, f"{part}_documents"))]
    return parts
