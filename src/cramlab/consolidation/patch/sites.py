"""Which attention of a model can be patched: found by structure, then proven; the rest is refused with its reason."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cramlab.consolidation.patch.attach import installed
from cramlab.consolidation.patch.look import Look, looked
from cramlab.consolidation.patch.originals import NAMES
from cramlab.consolidation.patch.prove import N_TOKENS, prove
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import AttentionSite, UnknownFamilyError, attention_sites
from cramlab.hf.structure import asks_the_interface, evaluating, is_decoder, some_tokens, text_config

# Keyword arguments of an attention function that a patch applies, or that change nothing where they are read at all.
_KNOWN = frozenset({
    "scaling", "softcap", "s_aux", "dropout", "is_causal", "sliding_window", "position_ids", "past_key_values",
    "use_cache", "output_attentions", "output_hidden_states", "cache_position", "deterministic", "position_embeddings",
})  # fmt: skip


@dataclass(frozen=True)
class _Proof:
    """What was found about a model.

    Attributes:
        of: attention function and modules that it holds for.
        sizes: fields of `AttentionSite` of the layers that can be patched, by index of the block.
        left_alone: why the other layers with attention cannot be, by index of the block.
    """

    of: tuple[Any, ...]
    sizes: dict[int, dict[str, Any]]
    left_alone: dict[int, str]


_proofs: weakref.WeakKeyDictionary[nn.Module, _Proof] = weakref.WeakKeyDictionary()


def consolidatable_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention sub-layers whose far reads can be skipped; a patch at them was proven right on a few tokens.

    Layers with a sliding window, and blocks without attention, are left out.

    Raises:
        UnknownFamilyError: when the attention of the model cannot be found, or is code of its own.
        ConsolidationError: when its attention cannot be patched; the message says why.
    """
    sites, proof = _proved(model)
    return [dataclasses.replace(site, **proof.sizes[site.layer]) for site in sites if site.layer in proof.sizes]


def left_alone(model: nn.Module) -> dict[int, str]:
    """Why layers with attention are not among `consolidatable_sites`, by index of the block.

    Raises:
        UnknownFamilyError: as `consolidatable_sites`.
        ConsolidationError: as `consolidatable_sites`.
    """
    return _proved(model)[1].left_alone


def _proved(model: nn.Module) -> tuple[list[AttentionSite], _Proof]:
    """The attention sub-layers of a model and what was found about them; a model is proven once."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnknownFamilyError(f"a {kind} was given in place of a model; give a model of transformers")
    if not isinstance(model, PreTrainedModel) and any(isinstance(m, PreTrainedModel) for m in model.modules()):
        raise ConsolidationError(
            f"{kind} wraps a model of transformers; give the wrapped model (peft: get_base_model())"
        )
    if installed(model) and model not in _proofs:
        raise ConsolidationError("the model is patched already; remove(model) first")
    implementation = model.config._attn_implementation if isinstance(model, PreTrainedModel) else None
    if installed(model):  # the same model was proven before it was patched
        return attention_sites(model), _proofs[model]
    if implementation is not None and implementation not in NAMES:
        raise ConsolidationError(
            f'the model uses "{implementation}" attention, which cannot be patched; load it with '
            'attn_implementation="sdpa" or "eager"'
        )
    sites = attention_sites(model)
    if not isinstance(model, PreTrainedModel) or not all(asks_the_interface(site.attention) for site in sites):
        names = ", ".join(sorted({type(site.attention).__name__ for site in sites}))
        raise UnknownFamilyError(
            f"{kind} has attention code of its own ({names}) instead of transformers' AttentionInterface, so it cannot "
            "be patched; cramlab audit takes it"
        )
    if not is_decoder(model):
        raise ConsolidationError(
            f"{kind} is not a causal language model (config.is_decoder = False); load it as a decoder, or give another"
        )
    if not getattr(model.config, "is_causal", True) or not all(getattr(s.attention, "is_causal", True) for s in sites):
        raise ConsolidationError(f"this {kind} lets tokens see later ones; give a causal language model")
    of = (implementation, *(weakref.ref(part) for site in sites for part in (site.attention, site.out_proj)))
    if model not in _proofs or _proofs[model].of != of:
        with evaluating(model):
            sizes, reasons = _far(model, sites)
            prove(model, [dataclasses.replace(site, **sizes[site.layer]) for site in sites if site.layer in sizes])
        _proofs[model] = _Proof(of, sizes, reasons)
    return sites, _proofs[model]


def _far(model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Sizes of the layers that can be patched, and why others cannot, both by index of the block; see `_Proof`."""
    looks = looked(model, sites, some_tokens(model, N_TOKENS))
    found = {site.layer: _reason(model, site, look) for site, look in zip(sites, looks, strict=True)}
    reasons = {layer: reason for layer, reason in found.items() if reason is not None}
    if len(reasons) == len(sites):
        counts = Counter(reasons.values())
        said = "; ".join(f"{n} of {len(sites)} layers: {reason}" for reason, n in counts.items())
        if len(counts) == 1:
            said = f"every layer {said.partition(': ')[2]}"
        kind = model.config.model_type  # type: ignore[union-attr]
        raise ConsolidationError(f"this {kind} has no far reads to skip: {said}")
    sizes: dict[int, dict[str, Any]] = {
        site.layer: {"n_heads": look.n_heads, "d_head": look.d_head, "direct": look.direct}
        for site, look in zip(sites, looks, strict=True)
        if site.layer not in reasons
    }
    if len({(size["n_heads"], size["d_head"]) for size in sizes.values()}) > 1:
        raise ConsolidationError(f"the layers of this {type(model).__name__} differ in number or width of their heads")
    return sizes, reasons


def _reason(model: nn.Module, site: AttentionSite, look: Look) -> str | None:
    """Why a site cannot be patched, to be read after "every layer"; None: it can."""
    if look.arguments is None or look.hidden is None or look.output is None:
        return "does not hand its attention to transformers' AttentionInterface under this config"
    if window := _window(model, site, look):
        return f"attends to {window} tokens only"
    if look.arguments.get("is_causal") is False:
        return "lets tokens see later ones"
    if unknown := [
        name for name, v in look.arguments.items() if name not in _KNOWN and v is not None and v is not False
    ]:
        return f"gives its attention {', '.join(unknown)}, which a patch does not apply"
    if not any(module is site.out_proj for module in site.attention.modules()):
        return "has its output projection outside the attention module"
    if look.hidden.shape[-1] != site.d_model:
        return f"takes {look.hidden.shape[-1]} numbers a token and returns {site.d_model}"
    return None


def _window(model: nn.Module, site: AttentionSite, look: Look) -> str | None:
    """What a layer is limited to; None: it sees the whole context."""
    config, kinds = text_config(model), ("sliding", "chunked", "local")
    types = getattr(config, "layer_types", None)
    if (
        types is not None
        and site.layer < len(types)
        and (kind := next((k for k in kinds if k in types[site.layer]), ""))
    ):
        size = getattr(config, "attention_chunk_size" if kind == "chunked" else "sliding_window", None)
        return f"a {kind} window of {size}"
    assert look.arguments is not None
    size = look.arguments.get("sliding_window")
    if size is None and types is None and getattr(config, "use_sliding_window", True):
        size = getattr(config, "sliding_window", None)
    return None if size is None else f"a sliding window of {size}"
