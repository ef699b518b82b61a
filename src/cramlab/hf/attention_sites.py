"""The attention sub-layers of a pretrained model, found by its structure; only `DECLARED` names modules of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cramlab.hf.structure import Paths, UnknownFamilyError, base_model, found, text_config

__all__ = ["AttentionSite", "UnknownFamilyError", "affine_map", "attention_sites", "base_model", "longest_context"]


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Paths of modules in a model of this project; `norm`, `attention` and `out_proj` are relative to the block.

    Attributes:
        blocks: the list of blocks, relative to the model without its head; those without `attention` are passed over.
        norm: the normalisation before attention.
        attention: the module that reads.
        out_proj: the affine map from the heads' outputs, side by side, to the sub-layer's output.
    """

    blocks: str
    norm: str
    attention: str
    out_proj: str


# Models of this project, by `config.model_type`: what they read with is not called as an attention module.
DECLARED: dict[str, Declared] = {
    # CRAM language models, and GPT-2 with CRAM layers: the reads of the episodic memory.
    "cram": Declared(blocks="layers", norm="mixer.norm", attention="mixer.episodic", out_proj="mixer.episodic.w_out"),
    "cram_gpt2": Declared(
        blocks="h", norm="attn.mixer.norm", attention="attn.mixer.episodic", out_proj="attn.mixer.episodic.w_out"
    ),
    # The constructed model of auditing/controls.py.
    "planted": Declared(blocks="blocks", norm="norm", attention="attention", out_proj="attention.out_proj"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention sub-layer.

    Attributes:
        layer: index of its block, from 0.
        block: the block, whose (first) output is the residual stream after it.
        norm: the normalisation from the residual stream to the input of attention; None: attention takes the stream.
        attention: the attention module.
        out_proj: the map from the heads' outputs, side by side, to the sub-layer's output.
        n_heads: number of query heads.
        d_head: width of one head's output.
        d_model: width of the sub-layer's output.
        direct: whether the projection takes the heads' outputs as attention returns them; False where a gate or a norm
            stands between. Only consolidation asks, see `consolidation.patch.sites`.
    """

    layer: int
    block: nn.Module
    norm: nn.Module | None
    attention: nn.Module
    out_proj: nn.Module
    n_heads: int
    d_head: int
    d_model: int
    direct: bool = True

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


def longest_context(model: nn.Module) -> int | None:
    """Number of positions of a model, tokens; None where its config does not say."""
    config = text_config(model)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    longest = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    if longest is None:
        return None
    for name, module in model.named_modules():  # RoBERTa's positions begin after the id of its padding token
        padding = getattr(module, "padding_idx", None) if "position" in name else None
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and padding is not None:
            return longest - padding - 1
    return longest


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention sub-layers of a model, in order of depth; blocks without attention have none.

    Raises:
        UnknownFamilyError: when the model's attention cannot be found; the message says why.
    """
    declared = DECLARED.get(getattr(getattr(model, "config", None), "model_type", ""))
    return [_site(model, paths) for paths in (found(model) if declared is None else _resolved(model, declared))]


def _resolved(model: nn.Module, declared: Declared) -> list[Paths]:
    """Paths from the model's root; blocks without the attention module have none."""
    if window := getattr(model.config, "window", None):
        raise UnknownFamilyError(
            f"config.window = {window} runs the modules of each read a second time for nearby tokens, and hooks cannot "
            "tell the two apart; give a model without a window"
        )
    base = base_model(model)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    root = next(name for name, module in model.named_modules() if module is base)
    blocks = f"{root}.{declared.blocks}".strip(".")
    paths = []
    for layer in range(len(cast(nn.ModuleList, model.get_submodule(blocks)))):
        block = f"{blocks}.{layer}"
        norm, attention, out_proj = (
            f"{block}.{name}" for name in (declared.norm, declared.attention, declared.out_proj)
        )
        if attention in names:
            paths.append(Paths(layer=layer, block=block, norm=norm, attention=attention, out_proj=out_proj))
    if not paths:
        raise UnknownFamilyError(f"no block of this {type(model).__name__} attends; give a model with memory_layers")
    return paths


def _site(model: nn.Module, paths: Paths) -> AttentionSite:
    attention, out_proj = model.get_submodule(paths.attention), model.get_submodule(paths.out_proj)
    d_in, d_model = _widths(out_proj)
    n_heads = _n_heads(model, attention, d_in)
    return AttentionSite(
        layer=paths.layer,
        block=model.get_submodule(paths.block),
        norm=None if paths.norm is None else model.get_submodule(paths.norm),
        attention=attention,
        out_proj=out_proj,
        n_heads=n_heads,
        d_head=d_in // n_heads,
        d_model=d_model,
    )


def _n_heads(model: nn.Module, attention: nn.Module, d_in: int) -> int:
    """Number of heads whose outputs, side by side, are `d_in` wide; layers may differ, so the module is asked first."""
    for name in ("v_head_dim", "head_dim", "attention_head_size"):
        width: Any = getattr(attention, name, None)
        if isinstance(width, int) and width > 0 and d_in % width == 0:
            return d_in // width
    return int(text_config(model).num_attention_heads)


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
