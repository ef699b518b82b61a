"""Checks of model, config and text before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cramlab.auditing.config import AuditConfig
from cramlab.errors import AuditError
from cramlab.hf.attention_sites import AttentionSite, attention_sites, longest_context
from cramlab.hf.structure import hidden_states, is_decoder, text_config


def checked_sites(model: nn.Module, config: AuditConfig) -> list[AttentionSite]:
    """Returns the attention sites of the layers that the config selects.

    Raises:
        AuditError: when the model does not have one of the layers.
        UnknownFamilyError: when the attention of the model cannot be found.
    """
    sites = attention_sites(model)
    numbers = [site.layer for site in sites]
    for layer in config.layers or ():
        if layer not in numbers:
            held = f"0 to {numbers[-1]}" if numbers == list(range(len(numbers))) else f"with attention {numbers}"
            raise AuditError(f"audit.layers: layer {layer} does not exist; the model has layers {held}")
    return [site for site in sites if config.layers is None or site.layer in config.layers]


def check_context(model: nn.Module, config: AuditConfig) -> None:
    """Raises AuditError when the contexts are longer than the model allows."""
    longest = longest_context(model)
    if longest is not None and config.context > longest:
        raise AuditError(f"audit.context = {config.context} exceeds the model's longest context, {longest}; lower it")


@torch.inference_mode()
def check_tokens(model: nn.Module, documents: Sequence[Tensor]) -> None:
    """Raises AuditError when a document is not a 1-D tensor of token ids that the model has embeddings for."""
    size = getattr(text_config(model), "vocab_size", None)
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
        AuditError: when it does, although the model is meant to be causal.
    """
    if not is_decoder(model):
        return
    short = tokens[:16][None].to(next(model.parameters()).device)
    other = short.clone()
    other[0, -1] = short[0, 0] if short[0, 0] != short[0, -1] else (short[0, -1] + 1) % text_config(model).vocab_size
    before, after = (hidden_states(model, ids)[:, :-1].float() for ids in (short, other))
    scale = before.square().mean().sqrt()
    if not bool((before - after).abs().max() <= 1e-3 * scale) and bool(torch.isfinite(before).all()):
        raise AuditError(
            "the model has no causal mask: changing a token changes the hidden states of earlier tokens, so that a "
            "next-token loss would be meaningless; load it as a decoder (is_decoder), or use a causal model"
        )
