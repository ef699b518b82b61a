"""Evaluates a model on a split, with the routing that decoding uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cramlab import records
from cramlab.batch import Batch
from cramlab.metrics import AttentionUse, Scores, attention_use, count
from cramlab.mixer import Routing
from cramlab.tasks.task import Split, Task
from cramlab.training.folder import CONFIG, RECORD, own_record
from cramlab.training.load import load_run
from cramlab.training.run import RunConfig

_EVAL_BATCH_TOKENS = 8192
_SLICES = ("recurring", "novel", "rebound")  # SRCD's, which every record has


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of one pass over a split.

    Attributes:
        scores: retrieval and dynamics.
        use: use of attention.
        oracle_attention_frac: smallest share of tokens that must attend on these sequences.
    """

    scores: Scores
    use: AttentionUse
    oracle_attention_frac: float

    def metrics(self) -> dict[str, float | int | None]:
        """The metrics by their names in the record; None where a slice is empty."""
        n = self.scores.n_queries
        own = [name for name in n if name not in ("all", *_SLICES)]

        def acc(name: str) -> float | None:
            return self.scores.retrieval_acc(name) if n.get(name) else None

        return {
            "retrieval_acc": acc("all"),
            "retrieval_acc_recurring": acc("recurring"),
            "retrieval_acc_novel": acc("novel"),
            "retrieval_acc_rebound": acc("rebound"),
            **{f"retrieval_acc_{name}": acc(name) for name in own},
            "dynamics_mse": self.scores.dynamics_mse if self.scores.n_levels else None,
            **self.use.fracs(),
            "n_queries": n["all"],
            **{f"n_queries_{name}": n.get(name, 0) for name in (*_SLICES, *own)},
            "n_tokens": self.use.n_tokens,
            "oracle_attention_frac": self.oracle_attention_frac,
        }


def batches(task: Task, *, seed: int, split: Split, n_sequences: int, batch_size: int) -> Iterator[Batch]:
    """The first `n_sequences` of a split."""
    data = task.dataset(seed=seed, split=split, batch_size=batch_size)
    for start in range(0, n_sequences, batch_size):
        last = min(batch_size, n_sequences - start)
        yield (
            data.batch(start)
            if last == batch_size
            else task.dataset(seed=seed, split=split, batch_size=last).batch(start)
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterator[Batch],
    *,
    read_all: bool = False,
) -> Evaluation:
    """Runs the model over batches without training it.

    Args:
        model: a `SequenceModel`, wrapped or not; its training mode is restored.
        data: batches.
        read_all: let every token read, as in the encoding phase.

    Returns:
        Sums over all batches.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(0)
    scores, use, n_oracle = Scores(), AttentionUse(), 0
    for batch in data:
        batch = batch.to(device)
        routing = Routing(read_all=read_all, oracle_reads=batch.oracle_reads, generator=generator)
        output = model(batch, routing=routing, only_asked=True)
        scores = scores + count(output.predictions, batch)
        use = use + attention_use(output.traces, batch.valid)
        n_oracle += int((batch.oracle_reads & batch.valid).sum())
    model.train(was_training)
    return Evaluation(scores=scores, use=use, oracle_attention_frac=n_oracle / max(use.n_tokens, 1))


def evaluate_checkpoint(folder: Path) -> tuple[str, dict[str, Any]]:
    """Evaluates a run's checkpoint on the test split.

    Args:
        folder: the run's folder, with `config.json` and `checkpoint.pt`.

    Returns:
        The run's name and the metrics of the record.

    Raises:
        ConfigError: when the config has wrong types, or names a mixer or field that this version does not know.
        DamagedFileError: when a file of the folder is damaged or belongs to another run; or when the run is not
            finished, because the test split must not influence training.
    """
    if not (folder / RECORD).exists():
        raise records.RecordError(f"{folder} does not hold a finished run; continue it with --resume first")
    config, model = load_run(folder)
    if own_record(folder, records.read_json(folder / CONFIG))["status"] != "finished":
        raise records.RecordError(f"{folder} holds a run that failed; continue it with --resume first")
    torch.set_num_threads(config.training.n_threads)
    return config.name, evaluate(model, split_batches(config, "test")).metrics()


def split_batches(config: RunConfig, split: Split, seq_len: int | None = None) -> Iterator[Batch]:
    """The sequences that a run validates or tests on, at a length in tokens; None: the length of the last stage."""
    task = config.task_with(config.training.stages[-1].seq_len if seq_len is None else seq_len)
    n_tokens = config.training.n_test_tokens if split == "test" else config.training.n_validation_tokens
    n_sequences = max(1, n_tokens // task.seq_len)
    batch_size = max(1, min(n_sequences, _EVAL_BATCH_TOKENS // task.seq_len))
    return batches(task, seed=config.seed, split=split, n_sequences=n_sequences, batch_size=batch_size)
