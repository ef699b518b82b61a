"""A run as one JSON document (see `records`), and the figures of its rows."""

from __future__ import annotations

from typing import Any

import torch

from cramlab.batch import Batch
from cramlab.config import config_hash, to_dict
from cramlab.metrics import consolidation_ratio, right_answers
from cramlab.model import ModelOutput
from cramlab.ranks import Ranks
from cramlab.training.evaluate import Evaluation
from cramlab.training.progress import Clock, Progress
from cramlab.training.run import RunConfig


def run_record(
    config: RunConfig,
    progress: Progress,
    clock: Clock,
    *,
    test: Evaluation | None = None,
    failure: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run.

    Args:
        config: the run.
        progress: how far it has come.
        clock: its seconds of work.
        test: its evaluation on the test split; None: there was none.
        failure: why it failed; None: it is finished.
    """
    metrics = None if test is None else test.metrics()
    return {
        **progress.header,
        "experiment": config.experiment,
        "size": config.size,
        "mixer": config.mixer,
        "variant": config.variant,
        "seed": config.seed,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "status": "failed" if failure else "finished",
        "failure": failure,
        "series": progress.series,
        "samples": [],
        "practice": None,
        "metrics": {"validation": progress.validation, "test": metrics},
        "oracle": {
            "attention_frac": config.task.expected_attention_frac if test is None else test.oracle_attention_frac,
            "dynamics_mse": config.task.dynamics_floor,
        },
        "consolidation_ratio": None
        if metrics is None or not progress.encoding_attention_frac
        else consolidation_ratio(float(metrics["attention_frac"] or 0), progress.encoding_attention_frac),
        "n_steps": progress.step,
        "encoding_ended_step": progress.encoding_ended_step,
        "cooldown_from_step": progress.cooldown_from_step,
        "n_train_tokens": progress.n_tokens,
        "train_reads_frac": progress.n_reads / max(progress.n_tokens, 1),
        "n_parameters": None,
        "elapsed_s": clock.seconds(),
    }


def answer_accuracy(output: ModelOutput, batch: Batch, ranks: Ranks) -> float:
    """Share of the retrieval tokens of all ranks' rows of a batch whose answer is right."""
    hit = right_answers(output.predictions, batch)
    n_hits, n_asked = ranks.sum(torch.stack([hit.sum(), batch.retrieval_mask.sum()])).tolist()
    return n_hits / max(n_asked, 1)


def read_quality(output: ModelOutput, batch: Batch, ranks: Ranks) -> float | None:
    """Mean q (Eq. 6) of the recurring queries that were read, over all layers that have it; None if there are none.

    The queries are those of all ranks' rows of a batch.
    """
    asked = (batch.pattern >= 0) & batch.valid
    known = [trace.quality.detach()[asked] for trace in output.traces if trace.quality is not None]
    read = torch.cat(known) if known else torch.empty(0)
    read = torch.cat(ranks.gathered_any(read[torch.isfinite(read)].cpu()))
    return float(read.mean()) if len(read) else None
