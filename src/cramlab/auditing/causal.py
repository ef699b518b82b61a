"""The causal side of an audit: the loss of every test document under every replacement of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import SiteFit
from cramlab.auditing.replacement import Loss, MaskedToken, NextToken, Replacement, losses, memory_serves, plan
from cramlab.auditing.resume import Stages, TensorRows
from cramlab.auditing.setting import Setting
from cramlab.auditing.split import Split
from cramlab.hf.attention_sites import base_model
from cramlab.hf.structure import is_decoder


@dataclass(frozen=True, kw_only=True)
class CausalSums:
    """Losses under replacements, summed by document.

    Attributes:
        kind: kind of the loss, "next-token" or "masked-token".
        replacements: the replacements that were tried, by family, see `plan`.
        n_contexts: number of contexts used, of all documents.
        n_tokens: number of tokens with a loss in each document, (N,).
        nats: summed loss of each document: unchanged, then under each replacement in order, (N, 1 + R).
    """

    kind: str
    replacements: Mapping[str, Sequence[Replacement]]
    n_contexts: int
    n_tokens: Tensor
    nats: Tensor


def causal_contexts(parts: Split, config: AuditConfig) -> tuple[Tensor, Tensor]:
    """Selects contexts up to `causal_tokens`: a random one of each test document, then the next of each, and so on.

    Returns:
        Index of each context's document in the test part, (C,), and the tokens, (C, T).
    """
    generator = torch.Generator().manual_seed(config.seed)
    starts = [int(torch.randint(len(c.tokens), (1,), generator=generator)) for c in parts.test]
    chosen = [
        (row, c.tokens[(start + turn) % len(c.tokens)])
        for turn in range(config.contexts_per_document)
        for row, (c, start) in enumerate(zip(parts.test, starts, strict=True))
        if turn < len(c.tokens)
    ][: max(1, config.causal_tokens // config.context)]
    return torch.tensor([row for row, _ in chosen]), torch.stack([tokens for _, tokens in chosen])


def measure_losses(
    setting: Setting, parts: Split, fits: list[SiteFit], stages: Stages, mask_token: int | None
) -> CausalSums | None:
    """Measures the loss of the test documents under every replacement; None when the model or config has no loss."""
    config = setting.config
    loss = loss_of(setting.model, mask_token)
    if config.causal_tokens == 0 or loss is None:
        return None
    replacements = plan(fits, config)
    flat: list[Replacement] = [r for family in replacements.values() for r in family]
    documents, contexts = causal_contexts(parts, config)
    table = TensorRows(len(contexts), 2 + len(flat))
    batches = list(enumerate(contexts.split(max(1, config.batch_tokens // config.context))))

    remember = memory_serves(setting.model, setting.sites, contexts[:1, :16].to(setting.device))

    def step(item: tuple[int, Tensor]) -> int:
        number, tokens = item
        first = number * len(batches[0][1])
        rows = table.rows[first : first + len(tokens)]
        seed = config.seed * 1_000_003 + number
        rows[:, 0] = loss.n_tokens(tokens, seed)
        rows[:, 1:] = losses(setting.model, loss, setting.sites, fits, flat, tokens.to(setting.device), seed,
                             remember=remember).cpu()  # fmt: skip
        return tokens.numel()

    stages.run("causal", batches, step, table, contexts.numel())
    sums = table.rows.new_zeros(int(documents.max()) + 1, table.rows.shape[1]).index_add_(0, documents, table.rows)
    return CausalSums(
        kind=loss.kind, replacements=replacements, n_contexts=len(contexts), n_tokens=sums[:, 0], nats=sums[:, 1:]
    )


def loss_of(model: nn.Module, mask_token: int | None) -> Loss | None:
    """Returns the loss of the model's head; None for a model without one."""
    if base_model(model) is model and not hasattr(model, "lm_head"):  # a CRAM language model has its head beside
        return None
    if is_decoder(model):
        return NextToken()
    return None if mask_token is None else MaskedToken(mask_token)
