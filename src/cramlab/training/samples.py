"""A few test sequences token by token, with the memory that was used and the forecast; the report draws them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cramlab.mixer import Path, Routing
from cramlab.tasks.srcd import FLOW, QUERY, WRITE, SRCDConfig

_KINDS = {FLOW: "f", WRITE: "w", QUERY: "q"}
_PATHS = {Path.WORKING: "w", Path.EPISODIC: "e", Path.SEMANTIC: "s"}


@torch.no_grad()
def record_samples(
    model: nn.Module,
    task: SRCDConfig,
    *,
    seed: int,
    n_sequences: int = 3,
    n_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Returns the last `n_tokens` tokens of the first test sequences, as the record keeps them.

    Returns:
        One dict per sequence. Strings have one character per token: `kind` f(low), w(rite) or q(uery); `history`
        r(ecurring), n(ovel), b (rebound) or `.`; `path` in the last layer, w(orking), e(pisodic) or s(emantic);
        `correct` 1, 0 or `.`. The lists `level` and `forecast` hold the next level and its prediction.
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
            for t in batch.slices[name][b].nonzero().flatten().tolist():
                history[t] = mark
        samples.append(
            {
                "first_token": tokens.start,
                "kind": "".join(_KINDS[int(batch.discrete[b, t, 0])] for t in tokens),
                "history": "".join(history[t] for t in tokens),
                "path": "".join(_PATHS[Path(int(path[b, t]))] for t in tokens),
                "correct": "".join(str(int(hit[b, t])) if batch.retrieval_mask[b, t] else "." for t in tokens),
                "level": [round(float(batch.dynamics_target[b, t]), 4) for t in tokens],
                "forecast": [round(float(forecast[b, t]), 4) for t in tokens],
            }
        )
    return samples
