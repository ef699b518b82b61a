"""What is refused before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cramlab.auditing.config import AuditConfig
from cramlab.errors import AuditError
from cramlab.hf.attention_sites import AttentionSite, attention_sites, base_model, family_of, longest_context


def checked_sites(model: nn.Module, config: AuditConfig) -> list[AttentionSite]:
    """The sites that the config asks for.

    Raises:
        AuditError: when it asks for a layer that the model does not have.
        UnknownFamilyError: when the family has no entry.
    """
    sites = attention_sites(model)
    for layer in config.layers or ():
        if layer >= len(sites):
            raise AuditError(f"audit.layers: layer {layer} does not exist; the model has layers 0 to {len(sites) - 1}")
    return sites if config.layers is None else [sites[layer] for layer in sorted(set(config.layers))]


def check_context(model: nn.Module, config: AuditConfig) -> None:
    """Raises `AuditError` when the contexts are longer than the model's."""
    longest = longest_context(model)
    if longest is not None and config.context > longest:
        raise AuditError(f"audit.context = {config.context} is longer than the model's own, {longest}; shorten it")


@torch.inference_mode()
def check_tokens(model: nn.Module, documents: Sequence[Tensor]) -> None:
    """Raises `AuditError` when a document is no row of token ids, or has one that the model has no embedding for."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    for i, tokens in enumerate(documents):
        if not isinstance(tokens, Tensor) or tokens.ndim != 1 or (len(tokens) and tokens.is_floating_point()):
            found = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise AuditError(f"document {i} is no 1-D tensor of token ids but {found}; give one such tensor a document")
        if len(tokens) and size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise AuditError(
                f"document {i} holds token {int(tokens.max())}, but the model knows 0 to {size - 1}; "
                "use the model's own tokenizer"
            )


@torch.inference_mode()
def check_causal(model: nn.Module, tokens: Tensor) -> None:
    """Changes the last token of one context (T,) and looks whether earlier tokens notice.

    Raises:
        AuditError: when they do, though the family is causal.
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
            "there is no causal mask where one is needed: changing a token changes the hidden states of earlier ones. "
            "A next-token loss would be meaningless; load the model as a decoder (is_decoder), or use one that is"
        )
