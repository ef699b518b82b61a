"""Language models: padding, batch, cache and packing do not matter, nor do future tokens and other sequences.

The checks take any model with the interface of transformers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from faults.cases import Case, Fault, FaultFoundError, RefusedError
from faults.equal import EXACT, case, pieces, same
from faults.models import families, is_refusal, language_model, tokens

KINDS = ("roomy", "small", "salience", "hybrid", "unbounded", "recurrent")
Check = Callable[[Any, int], None]


def cases(seed: int, share: float) -> Iterator[Case]:
    """CRAM language models of several kinds, and GPT-2 with CRAM layers."""
    for number in range(max(1, round(4 * share))):
        for kind in KINDS[:: 1 if share == 1 else 3]:
            for test, check in (BOTH | WITH_CACHE).items():
                yield case(f"CRAM language models: {test}", f"{kind}: {test} #{number}", _ours, check, kind,
                           1000 * seed + number)  # fmt: skip
        for test, check in BOTH.items():
            yield case(f"GPT-2 with CRAM layers: {test}", f"cram_gpt2: {test} #{number}", _cram_gpt2, check,
                       1000 * seed + number)  # fmt: skip


def _ours(check: Check, kind: str, seed: int) -> None:
    check(language_model(kind, seed), seed)


def _cram_gpt2(check: Check, seed: int) -> None:
    check(families().build("cram_gpt2"), seed)


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """Logits of one pass, (B, T, V)."""
    return model(input_ids=ids, **given).logits


def refusable(call: Callable[[], Tensor]) -> Tensor:
    """What a call returns; a refusal in words is right too."""
    try:
        return call()
    except Exception as error:
        if is_refusal(error):
            raise RefusedError(str(error)) from error
        raise


def padding(side: str) -> Callable[[Any, int], None]:
    """Rows of different lengths, padded on a side, against each row alone."""

    def check(model: Any, seed: int) -> None:
        lengths = [random.Random(seed + row).randint(6, 24) for row in range(3)]
        longest = max(lengths) + 2
        ids, mask = tokens(3, longest, seed), torch.zeros(3, longest, dtype=torch.int64)
        for row, length in enumerate(lengths):
            mask[row, longest - length if side == "left" else 0 : longest if side == "left" else length] = 1
        # A GPT-2 counts places from the start of the row, padding included, unless it is told otherwise.
        gpt2 = model.config.model_type == "cram_gpt2"
        given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if gpt2 else {}
        together = refusable(lambda: logits(model, ids, attention_mask=mask, **given))
        for row in range(3):
            alone = logits(model, ids[row][mask[row].bool()][None])[0]
            same(together[row][mask[row].bool()], alone, _tolerance(model), f"row {row} with padding on the {side}")

    return check


def _tolerance(model: Any) -> float:
    return EXACT if next(model.parameters()).dtype == torch.float64 else 2e-4


def batch(model: Any, seed: int) -> None:
    """Four rows together against each alone."""
    ids = tokens(4, 25, seed)
    together = logits(model, ids)
    for row in range(4):
        same(logits(model, ids[row : row + 1])[0], together[row], _tolerance(model), f"row {row} alone")


def cached(model: Any, seed: int) -> None:
    """A prompt and single tokens against one pass."""
    parts(model, seed, [5] + [1] * 20)


def chunks(model: Any, seed: int) -> None:
    """Pieces of random lengths against one pass."""
    parts(model, seed, pieces(40, random.Random(seed)))


def parts(model: Any, seed: int, lengths: list[int]) -> None:
    """Pieces of these lengths against one pass."""
    ids = tokens(2, sum(lengths), seed)
    wanted, cache, found = logits(model, ids), None, []
    for part in ids.split(lengths, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    same(torch.cat(found, dim=1), wanted, _tolerance(model), f"in {len(lengths)} calls")


def padded_steps(model: Any, seed: int) -> None:
    """A padded prompt, then tokens one by one, as `generate` does it."""
    ids, mask = tokens(3, 24, seed), torch.ones(3, 24, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 7)):
        mask[row, :padding] = 0
    cache, found = None, []
    for start, end in [(0, 12), *((t, t + 1) for t in range(12, 24))]:
        output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    together = torch.cat(found, dim=1)
    for row, padding in enumerate((0, 3, 7)):
        alone = logits(model, ids[row : row + 1, padding:])[0]
        same(together[row, padding:], alone, _tolerance(model), f"row {row} with {padding} of padding, with a cache")


def future(model: Any, seed: int) -> None:
    """Other tokens from some place on change nothing before it."""
    ids = tokens(2, 30, seed)
    cut = random.Random(seed).randint(1, 29)
    other = ids.clone()
    other[:, cut:] = (ids[:, cut:] + 7) % 50 + 2
    same(logits(model, other)[:, :cut], logits(model, ids)[:, :cut], _tolerance(model), f"others from {cut} on")


def others(model: Any, seed: int) -> None:
    """Other rows change nothing in the first."""
    ids = tokens(3, 30, seed)
    other = torch.cat([ids[:1], tokens(2, 30, seed + 1)])
    same(logits(model, other)[:1], logits(model, ids)[:1], _tolerance(model), "the other sequences are others")


def packed(how: str) -> Callable[[Any, int], None]:
    """Three documents in one row, said by one of three arguments, against each alone."""

    def check(model: Any, seed: int) -> None:
        lengths = [random.Random(seed + row).randint(5, 16) for row in range(3)]
        ids = [tokens(1, length, seed + row) for row, length in enumerate(lengths)]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        given = {
            "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
            "seq_idx": {"seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()},
            "cu_seq_lens": {
                "cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int(),
                "max_length_q": max(lengths), "max_length_k": max(lengths),
            },
        }[how]  # fmt: skip
        together = refusable(lambda: logits(model, torch.cat(ids, dim=1), use_cache=False, **given))
        for row, part in enumerate(together.split(lengths, dim=1)):
            same(part, logits(model, ids[row]), _tolerance(model), f"document {row} of a row packed by {how}")

    return check


def last(model: Any, seed: int) -> None:
    """Logits of some tokens are those of all."""
    ids = tokens(2, 20, seed)
    wanted = logits(model, ids)
    same(logits(model, ids, logits_to_keep=3), wanted[:, -3:], _tolerance(model), "the last three")
    at = torch.tensor([0, 7, 19])
    found = refusable(lambda: logits(model, ids, logits_to_keep=at))
    same(found, wanted[:, at], _tolerance(model), "three by a tensor")


def generate(model: Any, seed: int) -> None:
    """Greedy generation with a cache against greedy by whole passes."""
    ids = tokens(2, 9, seed)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    if not torch.equal(found, ids):
        raise FaultFoundError(Fault.WRONG, "generate gives other tokens than whole passes")


def copies(model: Any, seed: int) -> None:
    """A deep copy answers as the model does."""
    ids = tokens(1, 20, seed)
    same(logits(copy.deepcopy(model), ids), logits(model, ids), 0.0, "a deep copy")


BOTH: dict[str, Check] = {
    "padding on the left": padding("left"),
    "padding on the right": padding("right"),
    "batch of one against many": batch,
    "future tokens do not matter": future,
    "other sequences do not matter": others,
    "packed by position_ids against alone": packed("position_ids"),
}
WITH_CACHE: dict[str, Check] = {
    "with a cache against without": cached,
    "prefill in pieces against one pass": chunks,
    "padded prompt with a cache": padded_steps,
    "packed by seq_idx against alone": packed("seq_idx"),
    "packed by cu_seq_lens against alone": packed("cu_seq_lens"),
    "logits of some tokens": last,
    "generate against whole passes": generate,
    "a deep copy": copies,
}
