"""The consolidated model in a differentiable form: randomly drawn reads, and the loss of the model's output.

Source: ours; drawn reads after the binary concrete distribution (Maddison et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cramlab.consolidation.patch.far_reads import Decision, Seen
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.consolidation.setting import Setting
from cramlab.hf.attention_sites import base_model

_TOKENS_AT_ONCE = 1024  # tokens whose logits are in memory at a time


class Drawn(NamedTuple):
    """The reads of one layer on one batch.

    Attributes:
        score: score of the gate, (B, T); its gradient reaches the gate alone.
        noise: logistic noise, (B, T).
        reads: 0 or 1, (B, T); it requires a gradient.
        far: whether a token has far keys, bool (B, T).
    """

    score: Tensor
    noise: Tensor
    reads: Tensor
    far: Tensor


def rehearse(
    setting: Setting,
    layers: Mapping[int, ConsolidatedAttention],
    tokens: Tensor,
    thresholds: Tensor,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Drawn]]:
    """Runs the consolidated model on a batch, with reads drawn by the gates or, without a generator, decided by them.

    Args:
        setting: with the model, without a patch, and its sites.
        layers: gates and adapters by index of the block.
        tokens: (B, T).
        thresholds: threshold of each context, (B,).
        temperature: scale of the noise on the scores.
        generator: source of the noise; None: no noise, as at inference.

    Returns:
        The last hidden states (B, T, D), and the reads of each site.
    """
    drawn: list[Drawn] = []

    def look(i: int, seen: Seen) -> Decision:
        layer = layers[setting.sites[i].layer]
        with torch.autocast(tokens.device.type, enabled=False):
            answer = layer.adapt(seen.features)
            score = layer.scores(seen.features.detach(), seen.n_keys)
        noise = torch.zeros_like(score)
        if generator is not None:
            chance = torch.rand(score.shape, generator=generator, device=score.device)
            noise = chance.clamp(1e-6, 1 - 1e-6).logit().to(score)
        reads = score.detach() + temperature * noise > thresholds.to(score)[:, None]
        reads = (reads | ~seen.far).float().requires_grad_()
        drawn.append(Drawn(score, noise, reads, seen.far))
        return reads, answer

    return setting.observe(tokens, look), drawn


def end_loss(
    setting: Setting, hidden: Tensor, tokens: Tensor, original: AbstractContextManager | None = None
) -> Tensor:  # fmt: skip
    """Loss of the model's output, nats per token; at no time are all logits in memory.

    Args:
        setting: with the model, without a patch, and `config.end_loss`.
        hidden: last hidden states, (B, T, D), see `rehearse`.
        tokens: (B, T).
        original: context manager that is open while the original's output is computed; None: the model is the original.
    """
    model = setting.model
    if setting.config.end_loss == "nats":
        return _in_chunks(model, _nats, hidden[:, :-1], tokens[:, 1:])
    with torch.no_grad(), original or nullcontext():
        wanted = base_model(model)(input_ids=tokens, use_cache=False).last_hidden_state
    return _in_chunks(model, _divergence, hidden, wanted)


def _in_chunks(model: nn.Module, loss: Callable[..., Tensor], hidden: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of a loss of logits, computed for some tokens at a time."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    flat, wanted = hidden.flatten(0, 1), wanted.flatten(0, 1)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(loss, head, own.float(), other, use_reentrant=False)
            for own, other in zip(flat.split(_TOKENS_AT_ONCE), wanted.split(_TOKENS_AT_ONCE), strict=True)
        ]
    return torch.stack([part for part in parts if part is not None]).sum() / len(flat)


def _divergence(head: nn.Module, own: Tensor, wanted: Tensor) -> Tensor:
    """Sum over tokens (N, D) of the KL divergence from the original's next-token distribution to ours, nats."""
    ours, theirs = head(own).float().log_softmax(-1), head(wanted.float()).float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _nats(head: nn.Module, own: Tensor, wanted: Tensor) -> Tensor:
    """Sum of the losses on the tokens (N,) themselves, nats."""
    return F.cross_entropy(head(own).float(), wanted, reduction="sum")
