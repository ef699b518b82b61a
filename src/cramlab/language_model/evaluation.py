"""Where a language model loses nats and where it reads: by repetition, position and frequency in the training data.

The paper claims that consolidated patterns are no longer read. On text, patterns are n-grams: `by_count_and_nats` has
the share of reads at equally hard tokens whose n-gram is rare or frequent in the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.language_model.ngrams import repeated, training_counts
from cramlab.language_model.scoring import Scored, score
from cramlab.language_model.text import Part, PreparedText, held_out_windows

N_POSITIONS = 8
ENCOUNTERS = (0, *(2**i for i in range(17)))  # least number of occurrences in each bin
COUNTS = (0, 1, 10, 100, 1_000, 10_000)  # likewise, of bins that hardness divides further
NATS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)  # least loss in each bin


def evaluate(
    model: nn.Module,
    text: PreparedText,
    *,
    context: int,
    n_windows: int,
    part: Part = "test",
    batch_size: int = 16,
    autocast: bool = False,
    hardness: Tensor | None = None,
) -> dict[str, Any]:
    """Scores a model on the first held-out windows of a part; the entries of the result are those of `sliced`.

    Args:
        model: a causal language model; `model(input_ids).logits` are (B, T, V).
        text: text whose tokenizer the model was trained with.
        context: tokens of a window, at least 3.
        n_windows: number of windows, at most.
        part: "test", or "validation" for choices.
        batch_size: windows in a call.
        autocast: see `score`.
        hardness: see `sliced`.

    Raises:
        ValueError: when the text is too short for a single window, or the context is shorter than 3.
    """
    if context < 3:
        raise ValueError(f"context = {context} holds no trigram; give at least 3")
    windows = held_out_windows(text, part, context, n_windows)
    scored = score(model, windows, batch_size=batch_size, autocast=autocast)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    counts = {name: training_counts(text.train, windows, n, device) for name, n in (("bigram", 2), ("trigram", 3))}
    asked = {"part": part, "context": context, "n_windows": len(windows)}
    return asked | sliced(scored, repeated(windows), counts, hardness)


def sliced(
    scored: Scored, is_repeated: Tensor, counts: dict[str, Tensor], hardness: Tensor | None = None
) -> dict[str, Any]:
    """Loss and share of reads in slices of the tokens.

    Args:
        scored: predictions.
        is_repeated: the token's trigram stood before in the window, bool (N, T - 1).
        counts: occurrences of the token's n-gram in the training data, by name of the n-gram, int64 (N, T - 1); -1:
            the window holds no such n-gram of the token.
        hardness: loss that `by_count_and_nats` takes as a token's hardness, in nats, (N, T - 1), such as that of a
            model that never reads; None: the model's own loss, which reads have lowered.

    Returns:
        Rows as `Scored.summary` makes them: `all`; `repeated` and `fresh`; `by_position`, with the tokens `first` to
        `last` of the window; `by_count`, for each n-gram, with occurrences `count_from` to `count_to` (None: no upper
        bound); `by_count_and_nats`, with `nats_from` and `nats_to` as well. `nats_by_window` has each window's mean.
    """
    every = torch.ones_like(is_repeated)
    hardness = scored.nats if hardness is None else hardness
    return {
        "all": scored.summary(every),
        "repeated": scored.summary(is_repeated),
        "fresh": scored.summary(~is_repeated),
        "by_position": _by_position(scored),
        "by_count": {
            name: [row | scored.summary(where) for row, where in _count_bins(n, ENCOUNTERS)]
            for name, n in counts.items()
        },
        "by_count_and_nats": {
            name: [
                row | hard | scored.summary(where & is_hard)
                for row, where in _count_bins(n, COUNTS)
                for hard, is_hard in _nats_bins(hardness)
            ]
            for name, n in counts.items()
        },
        "nats_by_window": scored.nats.double().mean(1).tolist(),
    }


def _by_position(scored: Scored) -> list[dict[str, Any]]:
    n_targets = scored.nats.shape[1]
    position = torch.arange(1, n_targets + 1).expand_as(scored.nats)
    edges = [round(i * n_targets / N_POSITIONS) for i in range(N_POSITIONS + 1)]
    bins = [(first + 1, last) for first, last in pairwise(edges) if last > first]
    return [
        {"first": first, "last": last} | scored.summary((position >= first) & (position <= last))
        for first, last in bins
    ]


def _count_bins(counts: Tensor, lows: Sequence[int]) -> list[tuple[dict[str, Any], Tensor]]:
    """Bounds of each bin, given the least number of occurrences in each, and the tokens in it."""
    return [
        ({"count_from": low, "count_to": None if high is None else high - 1}, where)
        for low, high, where in _bins(counts, lows)
    ]


def _nats_bins(nats: Tensor) -> list[tuple[dict[str, Any], Tensor]]:
    """Bounds of each bin of `NATS`, and the tokens in it."""
    return [({"nats_from": low, "nats_to": high}, where) for low, high, where in _bins(nats.clamp(min=0.0), NATS)]


def _bins(values: Tensor, lows: Sequence[float]) -> list[tuple[float, float | None, Tensor]]:
    """Each bin's least value, the next bin's, and the entries in it, bool as `values`."""
    highs = [*lows[1:], None]
    return [
        (low, high, (values >= low) & (values < (float("inf") if high is None else high)))
        for low, high in zip(lows, highs, strict=True)
    ]
