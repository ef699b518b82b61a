"""How long a consolidation takes, from the time of one forward pass.

Source: ours. The weights are those of the stages in results/consolidate/smollm2-two-cores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.measure import mean_loss

# Time of a stage for each token, in forward passes of the original.
_SUMS = 1.5  # features, targets and their moments
_PATCHED = 1.3
_LOCAL_STEP = 2.5
_END_STEP = 7.0
_VALIDATED, _CALIBRATED = 8, 4  # thresholds that are tried, about


def forward_passes(config: ConsolidationConfig, parts: Mapping[str, Sequence[Tensor]], *, learned: bool) -> float:
    """The work, as the number of tokens that the original would read in the same time.

    Args:
        config: sizes and choices.
        parts: contexts (T,) of each part, see `documents.parts_of`.
        learned: whether weights are learned; otherwise only thresholds are calibrated.
    """
    n_tokens = {part: sum(map(len, contexts)) for part, contexts in parts.items()}
    tried = n_tokens["validation"] * (2 + _PATCHED * _VALIDATED)
    tried += n_tokens["calibration"] * (1 + _PATCHED * _CALIBRATED) + n_tokens["test"] * (1 + _PATCHED)
    if not learned:
        return tried
    sums = _SUMS * (n_tokens["fit"] + n_tokens["gate"] + 2 * n_tokens["validation"])
    sums += n_tokens["sensitivity"] * (_SUMS + 1 + _PATCHED * config.layers_per_document)
    steps = _LOCAL_STEP * config.local_steps + _END_STEP * config.end_steps
    context = min(config.context, n_tokens["learning"] / max(1, len(parts["learning"])))
    return tried + sums + steps * config.batch_contexts * context


@torch.no_grad()
def seconds_per_token(model: nn.Module, contexts: Sequence[Tensor]) -> float:
    """Time of the original's forward pass: the faster of two, after one that warms up, on the longest context (T,)."""
    tokens = max(contexts, key=len)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mean_loss(model, tokens)  # a number on the host, so the device has finished
        times.append(time.perf_counter() - start)
    return min(times[1:]) / len(tokens)


def in_words(seconds: float) -> str:
    """A duration in words, with one or two digits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def estimate(model: nn.Module, config: ConsolidationConfig, parts: Mapping[str, Sequence[Tensor]]) -> str:
    """The sentence that is said before the work: how long all of it takes on this machine; "fit" is learned from."""
    per_token = seconds_per_token(model, parts["calibration"])
    seconds = per_token * forward_passes(config, parts, learned="fit" in parts)
    return f"time: about {in_words(seconds)} on this machine, at {1 / per_token:,.0f} tokens a second forward"
