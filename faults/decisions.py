"""Decisions in bfloat16: a patched model must let the same tokens read with a cache as without one.

Rounding changes scores, so a token whose score is at the threshold may fall on either side. The share of decisions (a
token at a layer) that agree is measured; 99% is the goal. Thresholds lie at the median of the scores of each layer,
so that half of the tokens read: no rounding would change the decisions of a threshold that all or none pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from cramlab.consolidation import folder as consolidation_folder
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.errors import LoadError
from cramlab.hf.loading import load
from faults.cases import Case, Fault, FaultFoundError, Measured, NotHereError, answer
from faults.commands import command, settings
from faults.material import fresh
from faults.models import patched, tokens

GOAL = 0.99


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Trained models with a small consolidation of their own, and random ones of every family."""
    for family in ("llama", "qwen3") if share == 1 else ("llama",):
        yield Case("decisions in bfloat16, random models", f"{family}: decisions",
                   functools.partial(_random, family, seed))  # fmt: skip
    if share == 1:
        for name in ("glassllm", "smollm2"):
            yield Case("decisions in bfloat16, trained models", f"{name}: decisions", functools.partial(_trained, name))


def _random(family: str, seed: int) -> Measured:
    return _compared(patched(family, 0.0, seed, torch.bfloat16), tokens(4, 60, seed))


def _trained(name: str) -> Measured:
    try:
        pretrained = load(name)
    except LoadError as error:
        raise NotHereError(str(error)) from error
    folder = _consolidation(name)
    model = consolidation_folder.load(pretrained.model, folder).to(torch.bfloat16)
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    ids = torch.tensor(pretrained.encode(text[:40_000]))
    length = min(192, pretrained.context)
    n_rows = min(24 if name == "glassllm" else 4, len(ids) // length)
    return _compared(model, ids[: n_rows * length].view(n_rows, length))


@functools.cache
def _consolidation(name: str) -> Path:
    """A small consolidation: few documents, little learning."""
    context, window = (96, 16) if name == "glassllm" else (128, 16)
    small = settings(
        context=context, window=window, n_sinks=4, fit_documents=8, sensitivity_documents=2, layers_per_document=4,
        gate_documents=8, validation_documents=4, calibration_documents=30, test_documents=4, tokens_per_document=64,
        local_steps=0, end_steps=0, max_rank=8, units=0,
    )  # fmt: skip
    out = fresh("decisions")
    call = command("consolidate", name, "--text", "stdlib", "--max-loss-increase", 0.3, *small)
    if (given := answer(lambda: call(out, False))).code:
        raise RuntimeError(f"no consolidation of {name} could be made: {given.err.strip()}")
    return out


def _compared(model: Any, ids: Tensor) -> Measured:
    """Compares the decisions of one pass with those of a prompt of half the tokens and single steps after it."""
    half = ids.shape[1] // 2
    _at_the_median(model, ids)
    whole = reads_while(lambda: model(input_ids=ids, use_cache=False))

    def steps() -> None:
        cache = DynamicCache(config=model.config)
        for part in ids.split([half, *[1] * (ids.shape[1] - half)], dim=1):
            model(input_ids=part, past_key_values=cache, use_cache=True)

    stepped = reads_while(steps)
    if whole.shape != stepped.shape:
        raise FaultFoundError(Fault.WRONG, f"decisions of shape {tuple(stepped.shape)}, not {tuple(whole.shape)}")
    after = slice(half, None)
    n, alike = whole[..., after].numel(), int((whole == stepped)[..., after].sum())
    if not 0.2 < whole.double().mean() < 0.8:
        raise RuntimeError(f"{whole.double().mean():.1%} of the tokens read, too one-sided for a test of decisions")
    found = {"decisions": n, "alike": alike, "share": alike / n, "reads": float(whole.double().mean()), "tried": n}
    if alike < GOAL * n:
        raise FaultFoundError(Fault.WRONG, f"{alike} of {n} decisions alike ({alike / n:.2%})")
    return found


def _at_the_median(model: Any, ids: Tensor) -> None:
    """Sets the threshold of each layer to the median of its scores."""
    decide = ConsolidatedAttention.decide

    def set_and_decide(layer: ConsolidatedAttention, seen: Any) -> Any:
        layer.threshold = float(layer.scores(seen.features, seen.n_keys)[seen.far].float().median())
        return decide(layer, seen)

    with torch.no_grad(), mock.patch.object(ConsolidatedAttention, "decide", set_and_decide):
        model(input_ids=ids, use_cache=False)


def reads_while(call: Callable[[], object]) -> Tensor:
    """Which tokens read at which layer while something is called, bool (L, B, T)."""
    decide = ConsolidatedAttention.decide
    by_layer: dict[int, list[Tensor]] = {}

    def noted(layer: ConsolidatedAttention, seen: Any) -> Any:
        decision = decide(layer, seen)
        by_layer.setdefault(id(layer), []).append(decision[0] & seen.far)
        return decision

    with torch.no_grad(), mock.patch.object(ConsolidatedAttention, "decide", noted):
        call()
    return torch.stack([torch.cat(parts, dim=1) for parts in by_layer.values()])
