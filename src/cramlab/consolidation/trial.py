"""Continuing one prompt with the original and with the consolidated model, token by token.

Source: ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cramlab.consolidation.cost_in_use import prefilled
from cramlab.consolidation.folder import load_layers
from cramlab.consolidation.in_use import load_in_use
from cramlab.consolidation.patch.install import patched
from cramlab.consolidation.patch.observe import Recorder, recorded
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.hf.pieces import pieces
from cramlab.timing import wall_ms


@dataclass(frozen=True)
class Continued:
    """A prompt as one model continued it.

    Attributes:
        pieces: text of each new token.
        prompt_ms: time for the prompt and the first new token.
        token_ms: time for each further token.
    """

    pieces: list[str]
    prompt_ms: float
    token_ms: list[float]

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Trial:
    """A prompt, continued by both models.

    Attributes:
        prompt: text of the prompt.
        n_prompt: number of its tokens.
        n_far: number of its tokens that have far keys.
        original: the original's continuation.
        consolidated: the consolidated model's continuation.
        layers: indices of the blocks that can skip.
        reads: whether a layer read for the token that a new token was computed from, bool (layers, new tokens).
        prompt_reads: share of the prompt's far reads that each of these layers made, (layers,); 0 without far keys.
    """

    prompt: str
    n_prompt: int
    n_far: int
    original: Continued
    consolidated: Continued
    layers: list[int]
    reads: Tensor
    prompt_reads: Tensor


@torch.no_grad()
def tried(
    pretrained: Pretrained,
    folder: Path,
    prompt: str | None = None,
    *,
    n_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Trial:
    """Continues a prompt with both models, the original first; each call of a model has the time that a user waits.

    Args:
        pretrained: the model, without a patch; it is left as it was.
        folder: folder of its consolidation.
        prompt: text; None: three quarters of the folder's sample.
        n_tokens: new tokens, at most; both models stop at the model's end of text.
        temperature: temperature of sampling; 0: the most probable token.
        seed: seed of sampling, the same for both models.

    Raises:
        ConsolidationError: when the folder does not fit the model, or the prompt is empty or too long.
    """
    record, layers = load_layers(pretrained.model, folder)
    ids = _prompt(pretrained, folder, record, prompt)
    if not ids:
        raise ConsolidationError("the prompt has no tokens; give a longer one")
    if len(ids) + n_tokens > pretrained.context:
        raise ConsolidationError(
            f"the prompt's {len(ids)} tokens and {n_tokens} new ones (--tokens) exceed the model's context of "
            f"{pretrained.context}; shorten either"
        )
    near = record["window"] + record["n_sinks"]
    recorders = recorded(layers)
    made = {}
    for way, around in (("original", contextlib.nullcontext()), ("consolidated", patched(pretrained.model, recorders))):
        with around:
            prefilled(pretrained.model, _batch(pretrained.model, ids[: near + 2]))  # what is slow once is not timed
            made[way] = _continued(pretrained, ids, n_tokens, temperature, seed)
    reads = _reads(recorders, len(ids) + len(made["consolidated"].pieces) - 1)
    prompt_reads, n_far = reads[:, near : len(ids)], max(0, len(ids) - near)
    return Trial(
        prompt=pretrained.decode(ids),
        n_prompt=len(ids),
        n_far=n_far,
        layers=list(layers),
        reads=reads[:, len(ids) - 1 :],
        prompt_reads=prompt_reads.double().sum(1) / max(1, n_far),
        **made,
    )


def _reads(recorders: Mapping[int, Recorder], n_tokens: int) -> Tensor:
    return torch.stack([recorder.reads(n_tokens) for recorder in recorders.values()])


def _prompt(pretrained: Pretrained, folder: Path, record: Mapping[str, Any], prompt: str | None) -> list[int]:
    """Token ids of the prompt, or of three quarters of the folder's sample."""
    if prompt is not None:
        return pretrained.encode(prompt)
    in_use = load_in_use(folder, record)
    if in_use is None or in_use["sample"] is None:
        raise ConsolidationError(f"{folder} holds no sample text; give a prompt")
    sample = in_use["sample"]["pieces"]
    return pretrained.encode("".join(sample[: 3 * len(sample) // 4]))


def _continued(pretrained: Pretrained, ids: Sequence[int], n_tokens: int, temperature: float, seed: int) -> Continued:
    model: nn.Module = pretrained.model
    clock, generator = wall_ms(next(model.parameters()).device), torch.Generator().manual_seed(seed)
    stops = _stops(model)
    new: list[int] = []
    cache: list[DynamicCache] = []

    def first() -> None:
        made, logits = prefilled(model, _batch(model, ids))
        cache.append(made)
        new.append(_drawn(logits, temperature, generator))

    def following() -> None:
        logits = model(input_ids=_batch(model, new[-1:]), past_key_values=cache[0], use_cache=True).logits
        new.append(_drawn(logits, temperature, generator))

    prompt_ms, token_ms = clock(first), []
    while len(new) < n_tokens and new[-1] not in stops:
        token_ms.append(clock(following))
    return Continued(pieces(pretrained.decode, new), prompt_ms, token_ms)


def _batch(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Token ids as a batch of one row on the model's device, (1, T)."""
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


def _stops(model: nn.Module) -> set[int]:
    """Ids that end a text."""
    for config in (getattr(model, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return set()


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from logits (1, T, V)."""
    last = logits[0, -1].float().cpu()
    if not temperature:
        return int(last.argmax())
    return int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
