"""The attention sub-layers of a pretrained model: one entry a family; no other file names modules of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cramlab.config import nearest
from cramlab.errors import UsageError


class UnknownFamilyError(UsageError, ValueError):
    """The attention of a model cannot be found; the message says how to add its family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Paths of modules; `norm`, `attention` and `out_proj` are relative to the block.

    Attributes:
        blocks: the list of blocks, relative to the model without its head.
        norm: the normalisation before attention; None: the input of attention is the residual stream itself.
        attention: the attention module, from the hidden state to the sub-layer's output.
        out_proj: the affine map from the heads' outputs, side by side, to the sub-layer's output.
        causal: whether attention is causal.
        counts_from_padding: whether positions start after the id of the padding token, so that the first are unused.
        hybrid: whether blocks without attention may stand among the others.
    """

    blocks: str
    norm: str | None
    attention: str
    out_proj: str
    causal: bool = True
    counts_from_padding: bool = False
    hybrid: bool = False


_LLAMA = Family(blocks="layers", norm="input_layernorm", attention="self_attn", out_proj="self_attn.o_proj")
_BERT = Family(
    blocks="encoder.layer", norm=None, attention="attention.self", out_proj="attention.output.dense", causal=False
)

# Families by `config.model_type`. To add one, add an entry; `print(model)` shows the paths.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(blocks="h", norm="ln_1", attention="attn", out_proj="attn.c_proj"),
    "gpt_neox": Family(blocks="layers", norm="input_layernorm", attention="attention", out_proj="attention.dense"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bert": _BERT,
    "roberta": dataclasses.replace(_BERT, counts_from_padding=True),
    # CRAM language models, and GPT-2 with CRAM layers: the reads of the episodic memory.
    "cram": Family(
        blocks="layers", norm="mixer.norm", attention="mixer.episodic", out_proj="mixer.episodic.w_out", hybrid=True
    ),
    "cram_gpt2": Family(
        blocks="h", norm="attn.mixer.norm", attention="attn.mixer.episodic", out_proj="attn.mixer.episodic.w_out"
    ),
    # The constructed model of auditing/controls.py.
    "planted": Family(blocks="blocks", norm="norm", attention="attention", out_proj="attention.out_proj"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention sub-layer.

    Attributes:
        layer: index of its block, from 0.
        block: the block, whose (first) output is the residual stream after it.
        norm: the normalisation from the residual stream to the input of attention; None: they are the same.
        attention: the attention module.
        out_proj: the map from the heads' outputs, side by side, to the sub-layer's output.
        n_heads: number of query heads.
        d_head: width of one head's output.
        d_model: width of the sub-layer's output.
    """

    layer: int
    block: nn.Module
    norm: nn.Module | None
    attention: nn.Module
    out_proj: nn.Module
    n_heads: int
    d_head: int
    d_model: int

    @property
    def d_heads(self) -> int:
        """Width of all heads' outputs side by side."""
        return self.n_heads * self.d_head

    @property
    def device(self) -> torch.device:
        """Device of the computation, also when the weights are stored elsewhere (accelerate's offloading)."""
        device = next(self.out_proj.parameters()).device
        hook = getattr(self.out_proj, "_hf_hook", None)
        return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; float32 where they are packed."""
        parameter = next(self.out_proj.parameters())
        return parameter.dtype if parameter.is_floating_point() else torch.float32


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnknownFamilyError: when the model has no `config.model_type`, or `FAMILIES` has no entry for it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f'config.model_type = "{model_type}" is unknown to cramlab'
            f"{nearest(str(model_type), FAMILIES) or '.'} To add it, add one Family(...) with the paths of its "
            "modules, as print(model) shows them, to FAMILIES in cramlab/hf/attention_sites.py"
        )
    return FAMILIES[model_type]


def longest_context(model: nn.Module) -> int | None:
    """Number of positions of a model, tokens; None where its config does not say."""
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if longest is None or family is None or not family.counts_from_padding:
        return longest
    return longest - config.pad_token_id - 1  # type: ignore[union-attr]


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where there is none."""
    return cast(nn.Module, getattr(model, getattr(model, "base_model_prefix", "") or "-", model))


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention sub-layers of a model, in order of depth.

    Raises:
        UnknownFamilyError: when `FAMILIES` has no entry for the model, or the entry does not fit.
    """
    family = family_of(model)
    try:
        blocks = cast(nn.ModuleList, base_model(model).get_submodule(family.blocks))
        return [
            _site(model, family, layer, block)
            for layer, block in enumerate(blocks)
            if not family.hybrid or _attends(block, family)
        ]
    except AttributeError as error:
        raise UnknownFamilyError(
            f"{type(model).__name__} lacks a module that FAMILIES in cramlab/hf/attention_sites.py names ({error}); "
            "correct the paths of its entry, as print(model) shows them"
        ) from error


def _site(model: nn.Module, family: Family, layer: int, block: nn.Module) -> AttentionSite:
    out_proj = block.get_submodule(family.out_proj)
    d_in, d_model = _widths(out_proj)
    n_heads = int(model.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
    return AttentionSite(
        layer=layer,
        block=block,
        norm=None if family.norm is None else block.get_submodule(family.norm),
        attention=block.get_submodule(family.attention),
        out_proj=out_proj,
        n_heads=n_heads,
        d_head=d_in // n_heads,
        d_model=d_model,
    )


def _attends(block: nn.Module, family: Family) -> bool:
    """Whether the block has an attention module."""
    try:
        block.get_submodule(family.attention)
    except AttributeError:
        return False
    return True


def _widths(out_proj: nn.Module) -> tuple[int, int]:
    """Input and output width of an affine map; GPT-2's Conv1D stores its weight transposed."""
    if hasattr(out_proj, "in_features"):  # nn.Linear, also with LoRA
        return cast(int, out_proj.in_features), cast(int, out_proj.out_features)
    d_in, d_out = cast(Tensor, out_proj.weight).shape
    return d_in, d_out


@torch.no_grad()
def affine_map(site: AttentionSite) -> tuple[Tensor, Tensor]:
    """Weight (d_heads, d_model) and bias (d_model,) of the output projection, in float64.

    They are the module's outputs for unit vectors, so they are right also where parameters are transposed, packed or
    quantised.
    """
    identity = torch.eye(site.d_heads, dtype=site.dtype, device=site.device)
    bias = site.out_proj(torch.zeros_like(identity[:1]))
    return (site.out_proj(identity) - bias).double(), bias[0].double()
