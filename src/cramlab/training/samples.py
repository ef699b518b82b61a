"""A few test sequences token by token, with the memory that was used and the forecast; the report draws them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cramlab.batch import Batch
from cramlab.mixer import Path, Routing
from cramlab.tasks.srcd import FLOW, QUERY, WRITE, SRCDConfig
from cramlab.tasks.task import Task

_KINDS = {FLOW: "f", WRITE: "w", QUERY: "q"}
_PATHS = {Path.WORKING: "w", Path.EPISODIC: "e", Path.SEMANTIC: "s"}


@torch.no_grad()
def record_samples(
    model: nn.Module,
    task: Task,
    *,
    seed: int,
    n_sequences: int = 3,
    n_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Returns the last `n_tokens` tokens of the first test sequences, as the record keeps them.

    Returns:
        One dict per sequence. Strings have one character per token: `kind` f(low), w(rite) or q(uery), where
        tasks other than SRCD have no w; `history`
        r(ecurring), n(ovel), b (rebound) or `.`; `path` in the last layer, w(orking), e(pisodic) or s(emantic);
        `correct` 1, 0 or `.`. The lists `level` and `forecast` hold the next level and its prediction; they are
        empty for a task without levels.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch = task.dataset(seed=seed, split="test", batch_size=n_sequences).batch(0).to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    output = model(batch, routing=Routing(oracle_reads=batch.oracle_reads, generator=generator))
    model.train(was_training)
    hit = (output.predictions.logits.argmax(dim=-1) == batch.retrieval_target).cpu()
    path, forecast = output.traces[-1].path.cpu(), output.predictions.level.cpu()
    batch = batch.to("cpu")  # the code below reads single tokens
    samples = []
    for b in range(n_sequences):
        tokens = range(max(0, task.seq_len - n_tokens), task.seq_len)
        history = ["." for _ in range(task.seq_len)]
        for name, mark in (("recurring", "r"), ("novel", "n"), ("rebound", "b")):
            for t in batch.slices[name][b].nonzero().flatten().tolist() if name in batch.slices else ():
                history[t] = mark
        kinds = _kinds(task, batch, b)
        levels = tokens if bool(batch.dynamics_mask[b].any()) else range(0)
        samples.append(
            {
                "first_token": tokens.start,
                "kind": "".join(kinds[t] for t in tokens),
                "history": "".join(history[t] for t in tokens),
                "path": "".join(_PATHS[Path(int(path[b, t]))] for t in tokens),
                "correct": "".join(str(int(hit[b, t])) if batch.retrieval_mask[b, t] else "." for t in tokens),
                "level": [round(float(batch.dynamics_target[b, t]), 4) for t in levels],
                "forecast": [round(float(forecast[b, t]), 4) for t in levels],
            }
        )
    return samples


def _kinds(task: Task, batch: Batch, b: int) -> list[str]:
    """One letter per token of sequence `b`: SRCD's kind; for other tasks q where an answer is asked for, else f."""
    if isinstance(task, SRCDConfig):
        return [_KINDS[kind] for kind in batch.discrete[b, :, 0].tolist()]
    return ["q" if asked else "f" for asked in batch.retrieval_mask[b].tolist()]
