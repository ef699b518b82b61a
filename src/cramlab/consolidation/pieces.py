"""Parts for text with few documents, such as one book: blocks of successive contexts, far apart.

Pieces of one document are no independent draws, so a guarantee that counts them is weaker than one that counts
documents: it holds for this text as far as its pieces are exchangeable, and says nothing about other documents.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cramlab.auditing.copies import Originals
from cramlab.consolidation.config import HELD_OUT, PARTS, ConsolidationConfig
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.text import Corpus

_APART = 50  # between two blocks lies this part of all pieces, at least one piece
Piece = tuple[int, Tensor]


def pieces_of(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, order: Sequence[int], originals: Originals
) -> Iterator[Piece]:
    """All contexts of documents from their starts to their ends, without copies; twice as many as are needed at most.

    Args:
        pretrained: model and tokenizer.
        corpus: documents.
        config: length of a context, and the least number of tokens of the last one of a document.
        order: indices of the documents, in the order in which they are cut.
        originals: records what is drawn, and counts the copies that are left out.

    Yields:
        Index of the document and the tokens of the piece, (T,).
    """
    device = next(pretrained.model.parameters()).device
    n_steps = (config.local_steps + config.end_steps) * config.batch_contexts
    most = 2 * (sum(getattr(config, f"{part}_documents") for part in PARTS) + min(config.learning_contexts, n_steps))
    for i in order:
        # Tokens rarely have more than 16 characters.
        text = corpus.documents[i].text[: 16 * config.context * most]
        for piece in torch.tensor(pretrained.encode(text), dtype=torch.int64).split(config.context):
            if most and len(piece) >= config.least_tokens and originals.take(piece):
                most -= 1
                yield i, piece.to(device)
        if not most:
            return


def n_usable(n_pieces: int, n_parts: int = len(PARTS)) -> int:
    """Number of pieces that parts can have: all but those that lie between blocks."""
    return max(0, n_pieces - (n_parts - 1) * _apart(n_pieces))


def blocks(
    pretrained: Pretrained, corpus: Corpus, config: ConsolidationConfig, order: Sequence[int], parts: Sequence[str]
) -> tuple[dict[str, list[Piece]], int]:
    """The pieces of each part, evenly spread over the part's block.

    The pieces of the text are cut into one block for each part of `PARTS`, as long as the parts' sizes demand. Between
    blocks some pieces are not used.

    Args:
        pretrained: model and tokenizer.
        corpus: documents.
        config: length of a context, and sizes of the parts.
        order: indices of the documents.
        parts: names of the parts that are wanted.

    Returns:
        The pieces by name of the part; where a part is wanted that weights are learned from, all pieces of such blocks
        as "learning"; and the number of copies that were left out.

    Raises:
        ConsolidationError: when there are too few pieces.
    """
    originals = Originals()
    pieces = list(pieces_of(pretrained, corpus, config, order, originals))
    sizes = {part: getattr(config, f"{part}_documents") for part in PARTS}
    usable, wanted = n_usable(len(pieces)), sum(sizes.values())
    if usable < wanted:
        left_out = f" and {originals.n_copies} copies of these" if originals.n_copies else ""
        raise ConsolidationError(
            f"the text has {usable} pieces of {config.context} tokens{left_out}, without those between parts, but "
            f"{wanted} are needed ({', '.join(f'{n} {part}' for part, n in sizes.items())}); give more text, or lower "
            "consolidation.context or the numbers of documents"
        )
    found: dict[str, list[Piece]] = {}
    start, done = 0, 0
    for n_before, (part, size) in enumerate(sizes.items()):
        done += size
        end = usable * done // wanted + _apart(len(pieces)) * n_before
        block = pieces[start:end]
        found[part] = [block[i * len(block) // size] for i in range(size)]
        if part not in HELD_OUT:
            found.setdefault("learning", []).extend(block)
        start = end + _apart(len(pieces))
    learned = [] if set(parts) <= set(HELD_OUT) else ["learning"]
    return {part: found[part] for part in (*parts, *learned)}, originals.n_copies


def _apart(n_pieces: int) -> int:
    return max(1, n_pieces // _APART)
