"""Checks of model, config and text before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cramlab.auditing.config import AuditConfig
from cramlab.errors import AuditError
from cramlab.hf.attention_sites import AttentionSite, attention_sites, base_model, family_of, longest_context


def checked_sites(model: nn.Module, config: AuditConfig) -> list[AttentionSite]:
    """Returns the attention sites of the layers that the config selects.

    Raises:
        AuditError: when the model does not have one of the layers.
        UnknownFamilyError: when the model's family is not supported.
    """
    sites = attention_sites(model)
    for layer in config.layers or ():
        if layer >= len(sites):
            raise AuditError(f"audit.layers: layer {layer} does not exist; the model has layers 0 to {len(sites) - 1}")
    return sites if config.layers is None else [sites[layer] for layer in sorted(set(config.layers))]


def check_context(model: nn.Module, config: AuditConfig) -> None:
    """Raises AuditError when the contexts are longer than the model allows."""
    longest = longest_context(model)
    if longest is not None and config.context > longest:
        raise AuditError(f"audit.context = {config.context} exceeds the model's longest context, {longest}; lower it")


@torch.inference_mode()
def check_tokens(model: nn.Module, documents: Sequence[Tensor]) -> None:
    """Raises AuditError when a document is not a 1-D tensor of token ids that the model has embeddings for."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    for i, tokens in enumerate(documents):
        if not isinstance(tokens, Tensor) or tokens.ndim != 1 or (len(tokens) and tokens.is_floating_point()):
            found = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise AuditError(f"document {i} is not a 1-D tensor of token ids but {found}; give one tensor per document")
        if len(tokens) and size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise AuditError(
                f"document {i} holds token {int(tokens.max())}, but the model has tokens 0 to {size - 1}; "
                "use the model's own tokenizer"
            )


@torch.inference_mode()
def check_causal(model: nn.Module, tokens: Tensor) -> None:
    """Checks that changing the last token of a context (T,) does not change the hidden states of earlier tokens.

    Raises:
        AuditError: when it does, although the model's family is causal.
    """
    if not family_of(model).causal:
        return
    base = base_model(model)
    short = tokens[:16][None].to(next(model.parameters()).device)
    other = short.clone()
    other[0, -1] = short[0, 0] if short[0, 0] != short[0, -1] else (short[0, -1] + 1) % model.config.vocab_size  # type: ignore[union-attr]
    before, after = (base(input_ids=ids, use_cache=False)[0][:, :-1].float() for ids in (short, other))
    scale = before.square().mean().sqrt()
    if not bool((before - after).abs().max() <= 1e-3 * scale) and bool(torch.isfinite(before).all()):
        raise AuditError(
            "the model has no causal mask: changing a token changes the hidden states of earlier tokens, so that a "
            "next-token loss would be meaningless; load it as a decoder (is_decoder), or use a causal model"
        )
