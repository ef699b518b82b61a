"""A corpus folder: documents as token ids in files that are mapped into memory, with digests that reading compares.

It holds `train.bin`, `validation.bin` and `test.bin` (uint16 token ids, documents concatenated, each behind a
begin-of-document token), `*.starts.npy` (index of the first token of each document, int64), `tokenizer.json`, and
`corpus.json`, which is written last and describes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

from cramlab.config import ConfigError
from cramlab.files import DamagedFileError, only_process_in, refuse_full_disk, write_json

ABOUT = "corpus.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
PARTS = ("train", "validation", "test")
BEGIN = "<|endoftext|>"  # begins each document; token 0

HELD_OUT_FRAC = 0.02
HELD_OUT_CHARACTERS = 4_500_000  # about a million tokens
MOST_HELD_OUT_FRAC = 0.1
TOKENIZER_CHARACTERS = 40_000_000
_BATCH = 256  # documents encoded at a time

Named = tuple[str, str]
Log = Callable[[str], None]


@dataclass(frozen=True)
class CorpusFiles:
    """A corpus folder whose files have been compared with their digests.

    Attributes:
        folder: the folder.
        about: content of `corpus.json`.
    """

    folder: Path
    about: dict[str, Any]

    def tokens(self, part: str) -> Tensor:
        """Returns the tokens of a part, uint16 (N,), mapped into memory: the file is read where it is used."""
        n_tokens: int = self.about["parts"][part]["tokens"]
        return torch.from_file(str(self.folder / f"{part}.bin"), shared=False, size=n_tokens, dtype=torch.uint16)

    def starts(self, part: str) -> NDArray[np.int64]:
        """Returns the index of the first token of each document of a part, int64 (n_documents,)."""
        return np.load(self.folder / f"{part}.starts.npy", mmap_mode="r")


def split_by_document(documents: Sequence[Named], seed: int) -> dict[str, list[Named]]:
    """Splits whole documents at random into `PARTS`.

    Test, then validation, take documents until they hold `HELD_OUT_FRAC` of all characters or `HELD_OUT_CHARACTERS`,
    whichever is more, but no more than `MOST_HELD_OUT_FRAC`. At least one document is left for each part.

    Raises:
        ConfigError: when there are fewer than three documents.
    """
    if len(documents) < len(PARTS):
        raise ConfigError(f"{len(documents)} documents cannot be split into {', '.join(PARTS)}; give at least 3")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    n_all = sum(len(text) for _, text in documents)
    n_wanted = min(max(HELD_OUT_FRAC * n_all, HELD_OUT_CHARACTERS), MOST_HELD_OUT_FRAC * n_all)
    parts: dict[str, list[Named]] = {}
    for n_later, part in ((2, "test"), (1, "validation")):
        parts[part], n_taken = [], 0
        while len(order) > n_later and n_taken < n_wanted:
            parts[part].append(documents[order.pop(0)])
            n_taken += len(parts[part][-1][1])
    return {"train": [documents[i] for i in order], "validation": parts["validation"], "test": parts["test"]}


def write_corpus(
    folder: Path,
    documents: Sequence[Named],
    *,
    vocab_size: int,
    seed: int = 0,
    max_train_tokens: int | None = None,
    about: Mapping[str, Any] | None = None,
    log: Log | None = None,
) -> CorpusFiles:
    """Splits documents, trains a byte-level BPE tokenizer on training documents, and writes a corpus folder.

    The folder appears under its name when it is complete.

    Args:
        folder: the new folder.
        documents: names and texts; leave out copies, as documents of different parts should be independent.
        vocab_size: number of tokens, the 256 bytes and the begin-of-document token included, 257 to 65,536.
        seed: seed of the split and of the order of the documents.
        max_train_tokens: training documents are left out once their tokens exceed this number; None: all are kept.
        about: what `corpus.json` says beyond the files, such as the sources.
        log: called with a line after each stage.

    Raises:
        ConfigError: when the vocabulary is too large for the format or the text, or the documents are too few.
        FileExistsError: when the folder exists, or another process is writing it.
    """
    if not 257 <= vocab_size <= 2**16:
        raise ConfigError(f"vocab_size = {vocab_size} does not fit 256 bytes, a mark and uint16; give 257 to 65536")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; open it, or remove it first")
    say = log or (lambda _line: None)
    parts = split_by_document(documents, seed)
    partial = folder.with_name(f".{folder.name}.partial")
    with only_process_in(partial), _removed_on_error(partial):
        tokenizer, n_characters = _trained(parts["train"], vocab_size)
        say(f"trained a tokenizer of {vocab_size:,} tokens on {n_characters:,} characters")
        tokenizer.save(str(partial / TOKENIZER))
        described = {}
        for part in PARTS:
            most = max_train_tokens if part == "train" else None
            described[part] = _write_part(partial, part, parts[part], tokenizer, most)
            say(f"{part}: {described[part]['tokens']:,} tokens of {described[part]['documents']:,} documents")
        held = {
            "kind": "corpus",
            "format": FORMAT,
            **(about or {}),
            "seed": seed,
            "vocab_size": vocab_size,
            "begin_token": tokenizer.token_to_id(BEGIN),
            "max_train_tokens": max_train_tokens,
            "tokenizer_characters": n_characters,
            "tokenizers": tokenizers.__version__,
            "tokenizer_sha256": _digest(partial / TOKENIZER),
            "parts": described,
        }
        write_json(partial / ABOUT, held)
        partial.replace(folder)
    return check_files(folder)


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        refuse_full_disk(error, partial)
        raise


def _trained(documents: Sequence[Named], vocab_size: int) -> tuple[Tokenizer, int]:
    """Trains the tokenizer on the first documents, of `TOKENIZER_CHARACTERS` at most, and counts their characters."""
    texts, n_characters = list[str](), 0
    for _, text in documents:
        if texts and n_characters + len(text) > TOKENIZER_CHARACTERS:
            break
        texts.append(text)
        n_characters += len(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[BEGIN], show_progress=False)
    tokenizer: Tokenizer = bpe._tokenizer
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"vocab_size = {vocab_size} is too large for this text, which makes {tokenizer.get_vocab_size()} tokens; "
            "give fewer, or more text"
        )
    tokenizer.encode_special_tokens = True  # a document that spells the mark does not begin another one
    return tokenizer, n_characters


def _write_part(
    folder: Path, part: str, documents: Sequence[Named], tokenizer: Tokenizer, most: int | None
) -> dict[str, Any]:
    """Writes tokens and starts of a part, and returns what `corpus.json` says about it."""
    starts, n_tokens, n_characters = list[int](), 0, 0
    begin = cast("int", tokenizer.token_to_id(BEGIN))
    with (folder / f"{part}.bin").open("wb") as file:
        for (_, text), ids in zip(documents, _encoded(documents, tokenizer), strict=True):
            if most is not None and n_tokens + 1 + len(ids) > most:
                break
            starts.append(n_tokens)
            _write_ids(file, [begin, *ids])
            n_tokens += 1 + len(ids)
            n_characters += len(text)
    if not starts:
        raise ConfigError(f"max_train_tokens = {most} is less than the first document; give more")
    np.save(folder / f"{part}.starts.npy", np.array(starts, dtype=np.int64))
    return {
        "documents": len(starts),
        "characters": n_characters,
        "tokens": n_tokens,
        "sha256": _digest(folder / f"{part}.bin"),
        "starts_sha256": _digest(folder / f"{part}.starts.npy"),
    }


def _encoded(documents: Sequence[Named], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for first in range(0, len(documents), _BATCH):
        batch = [text for _, text in documents[first : first + _BATCH]]
        yield from (encoding.ids for encoding in tokenizer.encode_batch(batch))


def _write_ids(file: BinaryIO, ids: Sequence[int]) -> None:
    file.write(np.array(ids, dtype="<u2").tobytes())


def check_files(folder: Path) -> CorpusFiles:
    """Compares every file of a corpus folder with `corpus.json`.

    Raises:
        DamagedFileError: when the folder is not a corpus, or a file is missing, cut or altered; names the file.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{folder} is not a corpus, as it holds no {ABOUT}; build it again") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged ({error}); build the corpus again") from error
    if not isinstance(about, dict) or about.get("kind") != "corpus" or about.get("format") != FORMAT:
        raise DamagedFileError(f"{path} does not describe a corpus of format {FORMAT}; build the corpus again")
    try:
        expected = {TOKENIZER: about["tokenizer_sha256"]}
        for part in PARTS:
            described = about["parts"][part]
            expected |= {f"{part}.bin": described["sha256"], f"{part}.starts.npy": described["starts_sha256"]}
            _refuse_cut(folder / f"{part}.bin", 2 * described["tokens"])
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} does not describe all files ({error}); build the corpus again") from error
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            raise DamagedFileError(f"{folder / name} is missing; put a copy in its place, or build the corpus again")
        if _digest(folder / name) != sha256:
            raise DamagedFileError(f"{folder / name} was altered; put a copy in its place, or build the corpus again")
    return CorpusFiles(folder, about)


def _refuse_cut(path: Path, n_bytes: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # reported with the other files
        if (found := path.stat().st_size) != n_bytes:
            raise DamagedFileError(
                f"{path} has {found:,} bytes instead of {n_bytes:,}; put a copy in its place, or build the corpus again"
            )


def digest_of(about: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the digests of tokens and tokenizer: it identifies the corpus."""
    parts = [about["parts"][part]["sha256"] for part in PARTS]
    return hashlib.sha256(" ".join([*parts, about["tokenizer_sha256"]]).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
