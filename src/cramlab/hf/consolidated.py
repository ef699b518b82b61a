"""The patch of a pretrained model: a window for every token, the far past for those that a gate lets read.

`install` puts one `ConsolidatedAttention` beside each attention sub-layer. The weights of the model are not touched;
when the patch is closed or removed, outputs are bit-equal to the original's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cramlab.hf.attention_sites import AttentionSite, UnknownFamilyError, attention_sites, base_model, family_of
from cramlab.hf.errors import ConsolidationError
from cramlab.hf.far_reads import Padding, far_read, has_far, window_read
from cramlab.hf.growing_cache import let_grow

NAME = "cramlab"  # of the attention function, in `config._attn_implementation`


@dataclass
class Counts:
    """What a layer has done since it was last reset; pairs are of one head.

    Attributes:
        tokens: seen.
        far_tokens: those with something to read beyond window and first tokens.
        far_reads: those that did; broken numbers only where some heads read and others do not (baselines).
        window_pairs: scored by the windows, as executed.
        far_pairs: scored by the readers, as executed.
        causal_pairs: what full causal attention would have had to score, each key once for every later token.
        unreachable: keys and values that have left the window of a layer that never reads, so that no later token can
            ask for them; they were written for the window.
    """

    tokens: int = 0
    far_tokens: int = 0
    far_reads: float = 0
    window_pairs: int = 0
    far_pairs: int = 0
    causal_pairs: int = 0
    unreachable: int = 0

    @property
    def skipped_frac(self) -> float:
        """Share of the far reads that were left out."""
        return 1 - self.far_reads / self.far_tokens if self.far_tokens else 0.0


class ConsolidatedAttention(nn.Module):
    """The semantic memory and the gate of one layer.

    Both look at the same features of a token: what attention sees, what the window said, and how well the window's keys
    and the first keys matched (log masses by head). None needs a read. A map down to a few numbers, some of them linear
    and some behind a GELU, and a map up make the adapter; the gate sees the features and the latter numbers.

    Args:
        d_model: width of the layer's answer and of what it sees.
        d_heads: width of all heads' outputs.
        n_heads: query heads.
        rank: linear numbers of the adapter.
        units: numbers behind a GELU, which adapter and gate share; with neither, the adapter answers a constant.
        window: keys that every token sees, itself included.
        n_sinks: first keys that every token sees.
    """

    CHILD = "consolidated"  # what it is called under the attention module
    shift: Tensor
    scale: Tensor

    def __init__(
        self, *, d_model: int, d_heads: int, n_heads: int, rank: int, window: int, n_sinks: int, units: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("rank", rank, 0), ("units", units, 0), ("window", window, 1), ("n_sinks", n_sinks, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"consolidated.{name} = {value} must be at least {least}")
        self.window, self.n_sinks, self.rank, self.units = window, n_sinks, rank, units
        n_features, n_code = self.n_features(d_model, d_heads, n_heads), rank + units
        self.down = nn.Linear(n_features, n_code) if n_code else None
        self.up = nn.Linear(n_code, d_model) if n_code else None
        self.constant = None if n_code else nn.Parameter(torch.zeros(d_model))
        self.gate = nn.Linear(n_features + units, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("shift", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.threshold = 0.0
        self.active = True
        self.rule: Callable[[Tensor], Tensor] | None = None
        self.counts = Counts()
        self.seen: Tensor | None = None
        self._correction: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    @staticmethod
    def n_features(d_model: int, d_heads: int, n_heads: int) -> int:
        """Numbers that adapter and gate look at."""
        return d_model + d_heads + 2 * n_heads

    @classmethod
    def beside(
        cls, site: AttentionSite, *, rank: int, window: int, n_sinks: int, units: int = 0
    ) -> ConsolidatedAttention:
        """One that fits a site, in its dtype and on its device."""
        parameter = next(site.out_proj.parameters())
        layer = cls(d_model=site.d_model, d_heads=site.d_heads, n_heads=site.n_heads, rank=rank, units=units,
                    window=window, n_sinks=n_sinks)  # fmt: skip
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        return layer.to(device=parameter.device, dtype=dtype)

    def inner(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What gate and adapter are made of: standardised features (..., F) and code (..., rank + units)."""
        x = (features - self.shift) * self.scale
        if self.down is None:
            return x, x[..., :0]
        code = self.down(x)
        if self.units:
            code = torch.cat([code[..., : self.rank], F.gelu(code[..., self.rank :])], dim=-1)
        return x, code

    def score(self, x: Tensor, code: Tensor) -> Tensor:
        """The gate's, (...,), from `inner`: the higher, the more a read is worth."""
        return self.gate(torch.cat([x, code[..., self.rank :]], dim=-1) if self.units else x).squeeze(-1)

    def answer(self, code: Tensor) -> Tensor:
        """The adapter's, (..., d_model), from `inner`: what the far read would have added to the layer's answer."""
        if self.up is None:
            assert self.constant is not None
            return self.constant.expand(*code.shape[:-1], -1)
        return self.up(code)

    def scores(self, features: Tensor) -> Tensor:
        """See `score`; from features (..., F)."""
        return self.score(*self.inner(features))

    def adapt(self, features: Tensor) -> Tensor:
        """See `answer`; from features (..., F)."""
        return self.answer(self.inner(features)[1])

    def read_rule(self, scores: Tensor) -> Tensor:
        """Which tokens read, given the gate's scores (B, T)."""
        return scores > self.threshold if self.rule is None else self.rule(scores)

    @property
    def never_reads(self) -> bool:
        """Whether no token can pass the gate."""
        return self.rule is None and self.threshold == float("inf")

    def attend(
        self,
        original: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Heads (B, T, H, D); what the adapter adds to the layer's answer is kept for the output projection's hook.

        Args:
            original: the unpatched attention on the same arguments.
            query: the newest tokens, (B, H, T, D).
            key: all that is in the cache, (B, H / G, S, D).
            value: likewise.
            mask: of causality and padding, bool (B, 1, T, S); None: causality alone.
            scale: of the scores.
        """
        padding = Padding.of(mask)
        self._correction = None
        n_tokens, n_keys = query.shape[2], key.shape[2]
        far = has_far(n_tokens, n_keys, self.window, self.n_sinks, padding, query).expand(len(query), -1)
        self.counts.tokens += far.numel()
        causal = len(query) * (n_tokens * (2 * n_keys - n_tokens + 1) // 2)
        self.counts.causal_pairs += causal
        n_far = int(far.sum())
        if not n_far:  # all within the window: the original is as cheap, and exact
            self.counts.window_pairs += causal
            return original()
        near = window_read(query, key, value, window=self.window, n_sinks=self.n_sinks, scale=scale, padding=padding)
        assert self.seen is not None
        features = torch.cat([self.seen, near.heads.flatten(2), near.masses], dim=-1)
        self.seen = None
        x, code = self.inner(features)
        reads = self.read_rule(self.score(x, code)) & far
        n_reads = int(reads.sum())
        self.counts.far_tokens += n_far
        self.counts.far_reads += n_reads
        self.counts.window_pairs += near.n_scored
        if self.never_reads:
            self.counts.unreachable += n_far  # with every such token one more key has left the window
        heads = near.heads
        if n_reads:
            answers, n_scored = far_read(query, key, value, reads, scale=scale, padding=padding)
            self.counts.far_pairs += n_scored
            heads = heads.index_put(reads.nonzero(as_tuple=True), answers)
        if n_reads < n_far:
            self._correction = torch.where((far & ~reads)[..., None], self.answer(code), 0.0)
        return heads

    def attach(self, site: AttentionSite) -> None:
        """Registers itself and its hooks at a site."""

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.seen = args[0] if args else kwargs["hidden_states"]

        def after(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            correction, self._correction = self._correction, None
            return None if correction is None else output + correction.to(output.dtype)

        site.attention.add_module(self.CHILD, self)
        self._handles = [
            site.attention.register_forward_pre_hook(before, with_kwargs=True),
            site.out_proj.register_forward_hook(after),
        ]

    def detach_from(self, module: nn.Module) -> None:
        """Takes back what `attach` did."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(module, self.CHILD)

    @property
    def attached(self) -> bool:
        """Whether its hooks are registered."""
        return bool(self._handles)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of patched models; the original's (SDPA) where there is no patch, or a closed one."""
    layer = getattr(module, ConsolidatedAttention.CHILD, None)
    if layer is None or not layer.active:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ConsolidationError("attention dropout and skipped reads do not go together; call model.eval()")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5

    def original() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]

    return layer.attend(original, query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def consolidatable_sites(model: nn.Module) -> list[AttentionSite]:
    """The sites whose far reads can be skipped: causal, and not limited to a window already.

    Raises:
        UnknownFamilyError: for a model whose attention cannot be found.
        ConsolidationError: for one whose attention cannot be patched.
    """
    if not family_of(model).causal:
        raise ConsolidationError(f"{type(model).__name__} is no causal language model; give one")
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise UnknownFamilyError(
            f"{type(model).__name__} does not ask transformers' AttentionInterface for its attention, so it cannot be "
            "patched; families that do need one Family(...) in FAMILIES in cramlab/hf/attention_sites.py"
        )
    sites = [site for site in attention_sites(model) if not _is_windowed(model.config, site.layer)]
    if not sites:
        raise ConsolidationError(
            f"every layer of this {model.config.model_type} sees a sliding window of {model.config.sliding_window} "
            "tokens only, so there are no far reads to skip"
        )
    return sites


def _is_windowed(config: Any, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[layer] != "full_attention"
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def install(model: nn.Module, layers: Mapping[int, ConsolidatedAttention]) -> None:
    """Patches the sites with these indices; new tokens are written into the cache in place from then on.

    Raises:
        ConsolidationError: when the model is patched already, does not use SDPA attention, or has no such site.
        UnknownFamilyError: see `consolidatable_sites`.
    """
    sites = {site.layer: site for site in consolidatable_sites(model)}
    patched = cast(PreTrainedModel, model)
    implementation = patched.config._attn_implementation
    if implementation == NAME:
        raise ConsolidationError("the model is patched already; remove(model) first")
    if implementation != "sdpa":
        raise ConsolidationError(
            f'the model uses "{implementation}" attention; load it with attn_implementation="sdpa", with which '
            "reads are compared bit by bit"
        )
    if unknown := layers.keys() - sites.keys():
        raise ConsolidationError(f"layers {sorted(unknown)} have no far reads to skip; the model has {sorted(sites)}")
    for i, layer in layers.items():
        layer.attach(sites[i])

    def grow(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        let_grow(kwargs.get("past_key_values"))

    handle = base_model(model).register_forward_pre_hook(grow, with_kwargs=True)
    next(iter(layers.values()))._handles.append(handle)
    patched.set_attn_implementation(NAME)


def installed(model: nn.Module) -> dict[str, ConsolidatedAttention]:
    """The patches of a model, by the name of the attention module that they sit at."""
    return {
        name.removesuffix(f".{ConsolidatedAttention.CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, ConsolidatedAttention)
    }


def remove(model: nn.Module) -> None:
    """Takes the patch off."""
    for name, layer in installed(model).items():
        layer.detach_from(model.get_submodule(name))
    cast(PreTrainedModel, model).set_attn_implementation("sdpa")


@contextlib.contextmanager
def closed(model: nn.Module) -> Iterator[None]:
    """While open, the model is the original, bit by bit."""
    layers = list(installed(model).values())
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


@contextlib.contextmanager
def patched(model: nn.Module, layers: Mapping[int, ConsolidatedAttention]) -> Iterator[None]:
    """`install` for as long as it is open."""
    install(model, layers)
    try:
        yield
    finally:
        remove(model)
