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
from cramlab.language_model.corpus import BEGIN, TOKENIZER, CorpusFiles, check_files, digest_of

HELD_OUT = "held-out.jsonl"
Part = Literal["test", "validation"]


@dataclass(frozen=True)
class PreparedText:
    """Documents as tokens, for any number of runs.

    Attributes:
        tokenizer: byte-level BPE, trained on the training documents; None: runs that save no models need none.
        train: tokens of the training documents, concatenated, int (N,).
        held_out: tokens of the documents that are never trained on, concatenated, int (M,).
        validation: tokens of the documents that serve choices, int (V,), in which case `held_out` serves the test
            alone; None: `held_out` serves both, see `held_out_windows`.
        files: the corpus folder whose files are mapped into memory; None: the tokens were made in memory.
    """

    tokenizer: PreTrainedTokenizerFast | None
    train: Tensor
    held_out: Tensor
    validation: Tensor | None = None
    files: CorpusFiles | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens; it identifies the text and the tokenizer."""
        if self.files is not None:
            return digest_of(self.files.about)
        sha = hashlib.sha256(f"{len(self.train)} {len(self.held_out)} ".encode())
        for tokens in (self.train, self.held_out, *(() if self.validation is None else (self.validation,))):
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


def open_corpus(folder: Path) -> PreparedText:
    """Opens a corpus folder: its tokens, uint16, are mapped into memory and not copied.

    Raises:
        DamagedFileError: when the folder is not a corpus, or a file is missing, cut or altered; names the file.
    """
    files = check_files(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / TOKENIZER), bos_token=BEGIN, eos_token=BEGIN, clean_up_tokenization_spaces=False
    )
    return PreparedText(tokenizer, files.tokens("train"), files.tokens("test"), files.tokens("validation"), files)


def _stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[tuple[str, str]]) -> Tensor:
    encoded = tokenizer([text for _, text in documents], verbose=False)["input_ids"]
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in encoded])


def random_windows(stream: Tensor, context: int, n: int, seed: int, rows: range | None = None) -> Tensor:
    """Random windows of a stream of tokens, int64 (n, context); with `rows`, those of the `n` alone are read."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - context, (n,), generator=generator).tolist()
    chosen = starts if rows is None else [starts[row] for row in rows]
    return torch.stack([stream[s : s + context] for s in chosen]).long()


def held_out_windows(text: PreparedText, part: Part, context: int, n: int) -> Tensor:
    """At most `n` windows of held-out text, int64 (N, context): the first ones of the part.

    Text without a validation part of its own has the windows after the test's as such.

    Raises:
        ValueError: when the text is too short for a single one.
    """
    stream = text.held_out if part == "test" or text.validation is None else text.validation
    n_before = n if stream is text.held_out and part == "validation" else 0
    windows = stream[: len(stream) // context * context].view(-1, context)
    found = windows[n_before : n_before + n].long()
    if not len(found):
        n_wanted = 1 + n_before
        raise ValueError(
            f'{len(stream)} tokens of held-out text are too few for part = "{part}": '
            f"{n_wanted} windows of context = {context} are needed; give more text, or a lower batch_size"
        )
    return found
