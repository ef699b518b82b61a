"""One token for each sequence of a batch through a consolidated model, with fixed shapes and no value read on the host.

The caches are static and their lengths live on the device, so a step can be recorded as a CUDA graph or compiled as a
whole. It runs on a copy of the model that shares all weights; the patched model itself reads the prompt. Source: ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from cramlab.consolidation.patch.attach import installed, remove
from cramlab.consolidation.patch.counts import Counts
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.consolidation.serving.gates import NAME, Gate, Now, Running
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import attention_sites

_COUNTED = ("tokens", "far_tokens", "far_reads", "window_pairs", "far_pairs", "causal_pairs")


class DecodeStep(nn.Module):
    """Decodes one token a sequence; call `prefill` once, then the step once a token.

    Args:
        model: a patched model whose rules are learned gates, in evaluation.
        n_batch: number of sequences.
        capacity: number of tokens that the static cache holds, prompt and padding included.
        gated: evaluate the gates; False: every layer reads all keys and nothing is added, which is the original with
            the same kernel.

    Attributes:
        thresholds: scores above which a gate opens, by patched layer and sequence, (L, B). They may be changed in
            place, also after a recording: -inf opens a gate, inf shuts it.

    Raises:
        ConsolidationError: when the model is not patched, has another rule than learned gates, or a layer whose
            attention is limited to a window.
    """

    first: Tensor
    thresholds: Tensor
    counted: Tensor
    sizes: Tensor

    def __init__(self, model: PreTrainedModel, *, n_batch: int, capacity: int, gated: bool = True) -> None:
        super().__init__()
        for name, size in (("n_batch", n_batch), ("capacity", capacity)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConsolidationError(f"{name} = {size} must be a whole number, at least 1")
        rules = _rules(model) if gated else []
        device = next(model.parameters()).device
        self._patched = (model,)  # no child: its weights are those of the copy
        self.n_batch, self.capacity = n_batch, capacity
        self.model, self.layers = _with_gates(model, running := Running(), gated)
        self._running = running
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        if any(layer.is_sliding for layer in cast("list[Any]", self.cache.layers)):
            raise ConsolidationError("a DecodeStep needs full attention in every layer; this model has sliding windows")
        limits = torch.tensor([layer.threshold for layer in rules], dtype=torch.float32, device=device)
        near = [[layer.window + layer.n_sinks] for layer in rules]
        self.register_buffer("first", torch.zeros(n_batch, dtype=torch.int64, device=device))
        self.register_buffer("thresholds", limits[:, None].repeat(1, n_batch))
        self.register_buffer("counted", torch.zeros(len(_COUNTED), len(rules), dtype=torch.int64, device=device))
        self.register_buffer("sizes", torch.tensor(near, device=device))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Reads prompts through the patched model, which decides on the host, into the static cache.

        Args:
            input_ids: (B, T).
            attention_mask: 0 for padding, which must stand before a prompt, (B, T); None: no padding.

        Returns:
            Logits of each sequence's next token, (B, V).

        Raises:
            ConsolidationError: when the batch has another size, the prompts fill the cache, or padding stands behind.
        """
        n_batch, n_tokens = input_ids.shape
        if n_batch != self.n_batch or n_tokens >= self.capacity:
            raise ConsolidationError(
                f"input_ids has shape {tuple(input_ids.shape)}; give {self.n_batch} sequences of fewer than "
                f"{self.capacity} tokens, or make a DecodeStep with another n_batch or capacity"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        if not bool((mask[:, -1] != 0).all()) or bool((mask.diff(dim=1) < 0).any()):
            raise ConsolidationError("attention_mask hides a token behind a visible one; pad prompts on the left")
        if self.cache.is_initialized:
            self.cache.reset()
        self.first.copy_(n_tokens - mask.sum(dim=1))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = cast(Any, self._patched[0])(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1]

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the tokens after the given ones, (B, V). The caller sees to it that the cache has room.

        Args:
            tokens: newest token of each sequence, int64 (B, 1).
        """
        held = cast(Any, self.cache.layers[0]).cumulative_length  # on the device
        end = held + torch.ones_like(self.first)
        self._running.now = now = Now(self.first, end, self.thresholds)
        output = cast(Any, self.model)(
            input_ids=tokens, position_ids=(end - 1 - self.first)[:, None], past_key_values=self.cache, use_cache=True
        )
        self._running.now = None
        if now.reads:
            self._count(torch.stack(now.reads), end - self.first)
        return output.logits[:, -1]

    def _count(self, reads: Tensor, n_keys: Tensor) -> None:
        """Adds to the counts of all layers, from the gates (L, B) and the numbers of visible keys (B,)."""
        far = n_keys > self.sizes  # (L, B)
        reads = reads & far
        near = torch.minimum(n_keys, self.sizes)
        seen = n_keys.expand_as(far)
        all_of = (torch.ones_like(near), far, reads, near, reads * (seen - near), seen)
        self.counted.add_(torch.stack([part.to(torch.int64) for part in all_of]).sum(dim=-1))

    @property
    def length(self) -> int:
        """Number of tokens in the cache, padding included; reading it waits for the device."""
        layer = cast(Any, self.cache.layers[0])
        return int(layer.cumulative_length) if layer.is_initialized else 0

    @length.setter
    def length(self, n_tokens: int) -> None:
        """Forgets the tokens from `n_tokens` on, or takes what lies in the cache for tokens."""
        for layer in cast(Any, self.cache.layers):
            layer.cumulative_length.fill_(n_tokens)

    def counts(self) -> Mapping[int, Counts]:
        """Work of all steps since the step was made, by index of the block; reading it waits for the device.

        Pairs are counted for one head: those that decide what is loaded, not blocks that a kernel fills up.
        """
        columns = self.counted.t().tolist()
        return {i: Counts(**dict(zip(_COUNTED, c, strict=True))) for i, c in zip(self.layers, columns, strict=True)}

    @torch.no_grad()
    def recorded(self) -> Callable[[Tensor], Tensor]:
        """The step as one CUDA graph, from tokens (B, 1) to logits (B, V), which the next call overwrites.

        Counts and the length of the cache are as before the recording.

        Raises:
            ConsolidationError: without CUDA, before `prefill`, or when the cache is full.
        """
        if self.first.device.type != "cuda":
            raise ConsolidationError(f"a CUDA graph cannot be recorded on {self.first.device}; call the step itself")
        length, counted = self.length, self.counted.clone()
        if not 0 < length < self.capacity:
            raise ConsolidationError(f"the cache holds {length} of {self.capacity} tokens; prefill it and leave room")
        tokens = self.first.new_zeros(self.n_batch, 1)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # kernels are compiled and workspaces taken outside of the recording
                self(tokens)
                self.length = length
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self(tokens)
        self.length = length
        self.counted.copy_(counted)

        def replay(newest: Tensor) -> Tensor:
            tokens.copy_(newest)
            graph.replay()
            return logits

        return replay

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        n_tokens: int,
        through: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Greedy continuations, (B, n_tokens).

        Args:
            input_ids: as in `prefill`.
            attention_mask: as in `prefill`.
            n_tokens: number of tokens that each sequence is continued by.
            through: what `recorded` returned, or the step as a compiler made it; None: the step itself.

        Raises:
            ConsolidationError: as `prefill`, or when the cache is too small for the continuation.
        """
        if n_tokens < 1 or input_ids.shape[1] + n_tokens - 1 > self.capacity:
            raise ConsolidationError(
                f"n_tokens = {n_tokens} after {input_ids.shape[1]} tokens does not fit into a cache of {self.capacity} "
                "tokens; give at least 1, or make a DecodeStep of a larger capacity"
            )
        newest = self.prefill(input_ids, attention_mask).argmax(dim=-1, keepdim=True)
        if n_tokens == 1:
            return newest
        step, found = through or self, [newest]
        for _ in range(n_tokens - 1):
            found.append(step(found[-1]).argmax(dim=-1, keepdim=True))
        return torch.cat(found, dim=1)


def _rules(model: nn.Module) -> list[ConsolidatedAttention]:
    """The learned gates of a patched model, in the order of its blocks."""
    rules = list(installed(model).values())
    if not rules:
        raise ConsolidationError("the model is not patched; call load_consolidated or install first")
    for layer in rules:
        if not isinstance(layer, ConsolidatedAttention) or layer.rule is not None:
            name = type(layer).__name__
            raise ConsolidationError(f"a DecodeStep evaluates learned gates alone; {name} decides on the host")
    return cast("list[ConsolidatedAttention]", rules)


def _with_gates(model: PreTrainedModel, running: Running, gated: bool) -> tuple[PreTrainedModel, list[int]]:
    """A copy of a patched model that shares its weights and executes gates on the device; and the patched blocks."""
    own = {id(t) for layer in installed(model).values() for t in (*layer.parameters(), *layer.buffers())}
    tensors = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if id(tensor) not in own})
    rules = {id(copied.get_submodule(name)): cast(Any, layer).float() for name, layer in installed(copied).items()}
    remove(copied)
    layers: list[int] = []
    for site in attention_sites(copied):
        rule = rules.get(id(site.attention)) if gated else None
        gate = Gate(rule, len(layers), running)
        site.attention.add_module(Gate.CHILD, gate)
        site.attention.register_forward_pre_hook(gate.enter, with_kwargs=True)
        site.out_proj.register_forward_hook(gate.correct)
        if rule is not None:
            layers.append(site.layer)
    copied.set_attn_implementation(NAME)
    return copied.eval(), layers
