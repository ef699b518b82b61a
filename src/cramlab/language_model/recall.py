"""In-context recall of a trained language model, on sequences that it was not trained on.

Three tests, from general to natural: a random sequence is copied; pairs of keys and values are looked up, as in MQAR
(Arora et al. 2024, arXiv 2312.04927), with one query; and a secret in held-out text is given back. Nothing but the
context can help, as tokens are drawn at random. An answer counts as right if each of its tokens has the largest logit,
given the tokens before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cramlab.language_model.scoring import Scored, score
from cramlab.language_model.text import Part, PreparedText, held_out_windows

SECRET = "\nSECRET_NAME ="
ANSWER_TOKENS = 4
_COUNTED = 2_000_000


def frequent_tokens(text: PreparedText, n: int = 1024, skip: int = 64) -> Tensor:
    """The `n` most frequent tokens, int64 (n,), without the `skip` most frequent ones: blanks and punctuation.

    Frequencies are those of the first two million training tokens. The mark that begins documents is left out.

    Raises:
        ValueError: when so many different tokens do not occur.
    """
    counts = torch.bincount(text.train[:_COUNTED].long())
    if text.files is not None:
        counts[text.files.about["begin_token"]] = 0
    if (n_found := int((counts > 0).sum())) < n + skip:
        raise ValueError(f"the text has {n_found} different tokens, and {n + skip} are needed; lower n or skip")
    return counts.argsort(descending=True, stable=True)[skip : skip + n]


def recall(
    model: nn.Module,
    text: PreparedText,
    *,
    context: int,
    part: Part = "test",
    n_sequences: int = 128,
    batch_size: int = 16,
    autocast: bool = False,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Results of `copying`, `lookup` and `needle` at several sizes, as far as they fit the context.

    Args:
        model: a causal language model; `model(input_ids).logits` are (B, T, V).
        text: text whose tokenizer the model was trained with.
        context: most tokens of a sequence.
        part: "test", or "validation" for choices.
        n_sequences: sequences of each test and size, at most.
        batch_size: sequences in a call.
        autocast: see `score`.
        seed: seed of all sequences.
    """
    tokens = frequent_tokens(text)
    how: dict[str, Any] = {"n_sequences": n_sequences, "batch_size": batch_size, "autocast": autocast, "seed": seed}
    return {
        "copying": [copying(model, tokens, n_tokens=n, **how) for n in (16, 64, 256, 512) if 2 * n <= context],
        "lookup": [lookup(model, tokens, n_pairs=n, **how) for n in (4, 16, 64, 256) if 2 * n + 2 <= context],
        "needle": [needle(model, text, tokens, context=n, part=part, **how) for n in (context // 2, context)],
    }


def copying(
    model: nn.Module,
    tokens: Tensor,
    *,
    n_tokens: int,
    n_sequences: int = 128,
    batch_size: int = 16,
    autocast: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A sequence of different random tokens stands twice; the second copy is predicted but for its first token.

    Args:
        model: a causal language model.
        tokens: tokens to draw from, int64.
        n_tokens: length of one copy, at least 2.
        n_sequences: number of sequences.
        batch_size: sequences in a call.
        autocast: see `score`.
        seed: seed of the sequences.

    Returns:
        `accuracy`, `nats` and `reads_frac` on the second copy, and `nats_first`, the loss on the first one.
    """
    once = _drawn(tokens, n_sequences, n_tokens, seed)
    scored = score(model, torch.cat([once, once], 1), batch_size=batch_size, autocast=autocast)
    second = torch.zeros_like(scored.right)
    second[:, n_tokens:] = True
    first = torch.zeros_like(scored.right)
    first[:, : n_tokens - 1] = True
    return {"n_tokens": n_tokens} | _answers(scored, second) | {"nats_first": scored.summary(first)["nats"]}


def lookup(
    model: nn.Module,
    tokens: Tensor,
    *,
    n_pairs: int,
    n_sequences: int = 128,
    batch_size: int = 16,
    autocast: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Keys, each with its value behind it, and one of the keys again; its value is predicted.

    All keys and values of a sequence differ, and every pair is equally likely to be asked for.

    Args:
        model: a causal language model.
        tokens: tokens to draw from, int64.
        n_pairs: pairs of a key and a value.
        n_sequences: number of sequences.
        batch_size: sequences in a call.
        autocast: see `score`.
        seed: seed of the sequences.

    Returns:
        `accuracy`, `nats` and `reads_frac` at the query, and `chance`, the accuracy of a random value of the sequence.
    """
    pairs = _drawn(tokens, n_sequences, 2 * n_pairs, seed).view(n_sequences, n_pairs, 2)
    asked = torch.randint(n_pairs, (n_sequences,), generator=torch.Generator().manual_seed(seed + 1))
    query = pairs[torch.arange(n_sequences), asked]
    scored = score(model, torch.cat([pairs.flatten(1), query], 1), batch_size=batch_size, autocast=autocast)
    last = torch.zeros_like(scored.right)
    last[:, -1] = True
    return {"n_pairs": n_pairs, "chance": 1 / n_pairs} | _answers(scored, last)


def needle(
    model: nn.Module,
    text: PreparedText,
    tokens: Tensor,
    *,
    context: int,
    part: Part = "test",
    secret: str = SECRET,
    n_sequences: int = 128,
    batch_size: int = 16,
    autocast: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A line with random tokens stands in the first quarter of held-out text, which ends with the line's beginning.

    Args:
        model: a causal language model.
        text: text with its tokenizer.
        tokens: tokens to draw the answers from, int64.
        context: tokens of a sequence, the answer at its end included.
        part: part of the held-out text.
        secret: beginning of the line.
        n_sequences: number of sequences, at most.
        batch_size: sequences in a call.
        autocast: see `score`.
        seed: seed of answers and places.

    Returns:
        `accuracy`, share of the answers whose tokens are all right; `accuracy_by_token`; `nats` and `reads_frac`.

    Raises:
        ValueError: when the text has no tokenizer or the context is too short for two such lines.
    """
    if text.tokenizer is None:
        raise ValueError("a secret is written with the text's tokenizer, and this text has none; open it with one")
    begin = torch.tensor(text.tokenizer(secret, add_special_tokens=False)["input_ids"])
    n_text = context - 2 * (len(begin) + ANSWER_TOKENS)
    if n_text < 4:
        raise ValueError(f"context = {context} is too short for the secret twice; give at least {context - n_text + 4}")
    windows = held_out_windows(text, part, context, n_sequences)[:, :n_text]
    answers = _drawn(tokens, len(windows), ANSWER_TOKENS, seed)
    places = torch.randint(n_text // 4, (len(windows),), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    rows = [
        torch.cat([window[:place], begin, answer, window[place:], begin, answer])
        for window, answer, place in zip(windows, answers, places, strict=True)
    ]
    scored = score(model, torch.stack(rows), batch_size=batch_size, autocast=autocast)
    asked = torch.zeros_like(scored.right)
    asked[:, -ANSWER_TOKENS:] = True
    found = _answers(scored, asked)
    exact = float(scored.right[:, -ANSWER_TOKENS:].all(1).double().mean())
    return {"context": context} | found | {"accuracy": exact, "accuracy_by_token": found["accuracy"]}


def _drawn(tokens: Tensor, n_sequences: int, n: int, seed: int) -> Tensor:
    """Different tokens drawn at random for each sequence, int64 (n_sequences, n)."""
    if n > len(tokens):
        raise ValueError(f"{n} different tokens are needed, and {len(tokens)} are given; give more, or ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([tokens[torch.randperm(len(tokens), generator=generator)[:n]] for _ in range(n_sequences)])


def _answers(scored: Scored, asked: Tensor) -> dict[str, Any]:
    """Accuracy, loss and share of reads at the tokens that are asked for, bool (N, T - 1)."""
    found = scored.summary(asked)
    return {
        "n_sequences": len(asked),
        "accuracy": float(scored.right[asked].double().mean()),
        "nats": found["nats"],
        "reads_frac": found["reads_frac"],
    }
