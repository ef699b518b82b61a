"""Text for training language models: documents split, tokenised, and drawn in windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cramlab.files import write_text

HELD_OUT = "held-out.jsonl"
Part = Literal["test", "validation"]


@dataclass(frozen=True)
class PreparedText:
    """Documents as tokens, for any number of runs.

    Attributes:
        tokenizer: byte-level BPE, trained on the training documents; None: runs that save no models need none.
        train: tokens of the training documents, concatenated, int (N,).
        held_out: tokens of the documents that are never trained on, concatenated, int (M,).
    """

    tokenizer: PreTrainedTokenizerFast | None
    train: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens; it identifies the text and the tokenizer."""
        sha = hashlib.sha256(f"{len(self.train)} {len(self.held_out)} ".encode())
        for tokens in (self.train, self.held_out):
            sha.update(tokens.long().numpy().data)
        return sha.hexdigest()


def prepare(
    documents: Sequence[tuple[str, str]], out: Path, vocab_size: int, held_out_frac: float = 0.1
) -> PreparedText:
    """Splits documents at random, trains the tokenizer and writes the held-out ones to `out/held-out.jsonl`.

    Args:
        documents: names and texts.
        out: folder of the runs.
        vocab_size: number of tokens of the tokenizer.
        held_out_frac: share of the documents that is held out, 0 to 1.

    Raises:
        FileExistsError: when other documents were held out there.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    n_train = round((1 - held_out_frac) * len(documents))
    train, held_out = [documents[i] for i in order[:n_train]], [documents[i] for i in order[n_train:]]
    lines, path = "".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in held_out), out / HELD_OUT
    if path.exists() and path.read_bytes() != lines.encode():
        raise FileExistsError(f"{path} holds the held-out text of other runs; give another folder, or remove them")
    write_text(path, lines)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text for _, text in train], vocab_size=vocab_size, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, clean_up_tokenization_spaces=False)
    return PreparedText(tokenizer, _stream(tokenizer, train), _stream(tokenizer, held_out))


def _stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[tuple[str, str]]) -> Tensor:
    encoded = tokenizer([text for _, text in documents], verbose=False)["input_ids"]
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in encoded])


def random_windows(stream: Tensor, context: int, n: int, seed: int) -> Tensor:
    """Random windows of a stream of tokens, int64 (n, context)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - context, (n,), generator=generator)
    return torch.stack([stream[s : s + context] for s in starts.tolist()]).long()


def held_out_windows(text: PreparedText, part: Part, context: int, n: int) -> Tensor:
    """At most `n` windows of held-out text, int64 (N, context): the first ones for the test, the next for validation.

    Raises:
        ValueError: when the text is too short for a single one.
    """
    windows = text.held_out[: len(text.held_out) // context * context].view(-1, context).long()
    found = windows[:n] if part == "test" else windows[n : 2 * n]
    if not len(found):
        n_wanted = 1 + (0 if part == "test" else n)
        raise ValueError(
            f'{len(text.held_out)} tokens of held-out text are too few for part = "{part}": '
            f"{n_wanted} windows of context = {context} are needed; give more text, or a lower batch_size"
        )
    return found
