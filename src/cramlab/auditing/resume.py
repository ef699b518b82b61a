"""Runs work document by document and saves its state periodically, so that interrupted work can be continued."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cramlab.config import config_hash
from cramlab.files import load_checkpoint, save_checkpoint
from cramlab.hf.weights import config_digest, weights_digest

Item = TypeVar("Item")
Progress = Callable[[str, int, int, float], None]


class Resumable(Protocol):
    """The sums or table that a stage fills."""

    def state(self) -> dict[str, Any]:
        """Returns tensors and plain data, from which `load` continues."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Restores a `state`."""
        ...


@dataclass(frozen=True)
class Identity:
    """Digests (SHA-256) of what the results depend on, besides the settings.

    Attributes:
        weights: digest of the model's weights, `hf.weights.weights_digest`.
        config: digest of the model's config, `hf.weights.config_digest`.
        tokens: digest of the token ids of all documents.
    """

    weights: str
    config: str
    tokens: str

    @classmethod
    def of(cls, model: nn.Module, documents: Sequence[Sequence[Tensor]]) -> Identity:
        """Computes the digests of a model and groups of documents.

        Raises:
            LoadError: when the values of a weight cannot be read.
        """
        return cls(weights_digest(model), config_digest(model), tokens_digest(documents))

    def with_settings(self, config: object) -> str:
        """Returns one SHA-256 of the digests and the settings."""
        parts = (self.weights, self.config, self.tokens, config_hash(config))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def identity(model: nn.Module, documents: Sequence[Sequence[Tensor]], config: object) -> str:
    """Returns a SHA-256 of model, documents and settings, on which all sums depend."""
    return Identity.of(model, documents).with_settings(config)


def tokens_digest(documents: Sequence[Sequence[Tensor]]) -> str:
    """Returns the SHA-256 of the token ids of groups of documents."""
    sha = hashlib.sha256()
    for group in documents:
        sha.update(b"group")
        for tokens in group:
            sha.update(f"document {len(tokens)} ".encode() + tokens.long().cpu().numpy().tobytes())
    return sha.hexdigest()


class Stages:
    """Runs stages over documents. With a folder, an interrupted stage continues after its last saved document."""

    # Sums of a large model are large files: saving takes at most this share of the time.
    saving_frac = 0.05

    def __init__(
        self,
        folder: Path | None,
        identity: str,
        progress: Progress | None,
        save_every_s: float = 30,
        still_held: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._identity, self._progress, self._save_every_s = folder, identity, progress, save_every_s
        self._still_held = still_held or (lambda: None)  # from `files.only_process_in`
        self.seconds: dict[str, float] = {}

    def run(
        self, stage: str, items: Sequence[Item], step: Callable[[Item], int], into: Resumable, n_tokens: int
    ) -> None:
        """Calls `step` on each item in turn.

        Args:
            stage: name of the stage and of its file.
            items: the documents.
            step: adds a document to `into` and returns its number of tokens.
            into: the sums, which are saved and restored.
            n_tokens: total number of tokens, for the progress.

        Raises:
            FileExistsError: when the folder holds unfinished work on another model, text or config.
        """
        done, tokens_done, before_s = self._load(stage, into)
        start = saved = time.perf_counter()
        pause_s = self._save_every_s
        for i, item in enumerate(items[done:], start=done + 1):
            tokens_done += step(item)
            now = time.perf_counter()
            if i == len(items) or now - saved >= pause_s:
                self._save(stage, i, tokens_done, before_s + now - start, into)
                saved = time.perf_counter()
                pause_s = max(self._save_every_s, (saved - now) / self.saving_frac)
            if self._progress is not None:
                self._progress(stage, tokens_done, n_tokens, now - start)
        self.seconds[stage] = before_s + time.perf_counter() - start

    def _load(self, stage: str, into: Resumable) -> tuple[int, int, float]:
        if self._folder is None or not (path := self._folder / f"{stage}.pt").exists():
            return 0, 0, 0.0
        saved = load_checkpoint(path)
        if saved.get("identity") != self._identity:
            raise FileExistsError(
                f"{self._folder} holds unfinished work on another model, text or config, or by an earlier version of "
                "cramlab; choose another --out, or remove it"
            )
        into.load(saved["state"])
        return saved["done"], saved["tokens_done"], saved["seconds"]

    def _save(self, stage: str, done: int, tokens_done: int, seconds: float, into: Resumable) -> None:
        if self._folder is not None:
            self._still_held()
            save_checkpoint(
                self._folder / f"{stage}.pt",
                {"identity": self._identity, "done": done, "tokens_done": tokens_done, "seconds": seconds,
                 "state": into.state()},
            )  # fmt: skip


def clear(out: Path) -> None:
    """Removes the saved sums in `out/state`, once the result has been written."""
    shutil.rmtree(out / "state", ignore_errors=True)


class TensorRows:
    """A table that a stage fills row by row; NaN where nothing has been measured yet."""

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.rows = torch.full((n_rows, n_columns), torch.nan, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """Returns the state that `load` restores."""
        return {"rows": self.rows}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the rows from a `state`."""
        self.rows.copy_(state["rows"])
