"""GPT-2 with a CRAM layer in place of every attention sub-layer; everything else is GPT-2's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from cramlab.language_model import inputs
from cramlab.language_model.configuration_gpt2 import CramGPT2Config
from cramlab.language_model.fresh_weights import keep_fresh, reset_missing
from cramlab.language_model.packed_rows import Documents, Packing, documents, silent_tokens
from cramlab.memory import CRAMConfig, CRAMLayer, EpisodicMemoryConfig
from cramlab.mixer import MixerOutput, Routing

Outputs = dict[int, MixerOutput]


class Asked(NamedTuple):
    """What a pass asks of the CRAM layers of a model; other layers follow their router's own rule, as in decoding.

    Attributes:
        layers: number of each layer that is asked, by its identity.
        routing: of each of them.
        without_reads_in: the layer that answers as if no token had read; None: no layer.
        outputs: where each layer leaves what its mixer returned, by its number.
    """

    layers: Mapping[int, int]
    routing: Routing
    without_reads_in: int | None
    outputs: Outputs


class MixerAttention(nn.Module):
    """A CRAM layer that looks to GPT-2 like its attention. All tokens are one unit of time apart."""

    def __init__(self, config: CramGPT2Config) -> None:
        super().__init__()
        episodic = EpisodicMemoryConfig(n_heads=config.n_head, capacity=config.n_positions)
        self.mixer: CRAMLayer = dataclasses.replace(CRAMConfig(), episodic=episodic).build(config.n_embd)

    def forward(
        self,
        hidden_states: Tensor,
        asked: Asked | None = None,
        valid: Tensor | None = None,
        packed: Documents | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Mixes (B, T, D); GPT-2 expects attention weights beside it, and gives a mask that is in `valid` already."""
        asked = asked or _asked.get()
        layer = None if asked is None else asked.layers.get(id(self))
        routing = Routing()
        if asked is not None and layer is not None:
            routing = asked.routing._replace(counterfactual=layer == asked.without_reads_in)
        gaps = hidden_states.new_ones(hidden_states.shape[:2])
        if packed is None:
            output: MixerOutput = self.mixer(hidden_states, gaps, valid=valid, routing=routing)
        else:
            output = packed.mix(self.mixer, hidden_states, gaps, valid, routing)
        if asked is not None and layer is not None:
            asked.outputs[layer] = output
        return (output.y if output.y_without_reads is None else output.y_without_reads), None


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)  # of one thread: the model may be many threads'


class CramGPT2Model(GPT2Model):
    """The blocks of GPT-2, which know how CRAM layers in place of their attention are initialised."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Looks at each parameter by itself, where transformers passes over modules of others that have none."""
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        mixers = (part for part in self.modules() if isinstance(part, MixerAttention))
        if any(module is part for mixer in mixers for part in mixer.modules()):
            reset_missing(module)
        else:
            super()._init_weights(module)


class CramGPT2LMHeadModel(GPT2LMHeadModel):
    """A GPT-2 whose attention has been replaced; saved and loaded like any other. Without a cache: for audits."""

    config_class = CramGPT2Config  # type: ignore[assignment]

    _supports_attention_backend = False  # its blocks have no attention function to replace

    def __init__(self, config: CramGPT2Config) -> None:
        super(GPT2LMHeadModel, self).__init__(config)  # its parent's: the transformer is of our class
        self.transformer = CramGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
        for block in self.transformer.h:
            block.attn = MixerAttention(config)
            keep_fresh(block.attn)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: it has no cache."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Generates without a cache, and refuses one that was asked for."""
        if generation_config.cache_implementation is not None or model_kwargs.get("past_key_values") is not None:
            raise ValueError("a cram_gpt2 model has no cache; leave out cache_implementation and past_key_values")
        generation_config.use_cache = False
        prepare = cast("Any", GenerationMixin)._prepare_cache_for_generation
        return prepare(self, generation_config, model_kwargs, *args, **kwargs)

    def mixers(self) -> list[MixerAttention]:
        """In order of depth."""
        return [cast(MixerAttention, b.attn) for b in self.transformer.h if isinstance(b.attn, MixerAttention)]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """One pass; the arguments of `GPT2LMHeadModel.forward`, and those of packed rows, see `Packing`.

        Raises:
            ValueError: for what cannot be honoured: a cache, attention weights, masks that are no padding; and for
                packed rows whose positions do not say so, as GPT-2 embeds them.
        """
        inputs.check_nothing_else(kwargs)
        if past_key_values is not None or use_cache:
            raise ValueError("a cram_gpt2 model has no cache; say use_cache=False and leave out past_key_values")
        if output_attentions:
            raise ValueError("output_attentions cannot be honoured: CRAM layers have none to show; leave it out")
        inputs.check_tokens(input_ids, inputs_embeds, self.config.vocab_size, self)
        given = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        shape = (given.shape[0], given.shape[1])
        valid = inputs.valid_tokens(attention_mask, shape, 0, None)
        packing = Packing(position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packed = documents(packing, shape, valid)
        n_places = shape[1] if position_ids is None or not position_ids.numel() else int(position_ids.max()) + 1
        if n_places > self.config.n_positions:
            raise ValueError(f"{n_places} tokens are too many: the model has {self.config.n_positions} positions")
        if packed is not None and position_ids is None:
            raise ValueError("packed rows need position_ids, which GPT-2 embeds; give them too")
        how: dict[str, Any] = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if labels is not None:
            target = inputs.targets(labels, None, shape, self.config.vocab_size, silent_tokens(valid, packed))
            inputs.check_some_target(target, num_items_in_batch)
            how |= {"labels": labels, "shift_labels": target}
        how |= {
            "input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "use_cache": False, "logits_to_keep": logits_to_keep,
            "return_dict": return_dict, "output_hidden_states": output_hidden_states,
        }  # fmt: skip
        return super().forward(asked=_asked.get(), valid=valid, packed=packed, **how)


@contextlib.contextmanager
def routed(model: nn.Module, routing: Routing, without_reads_in: int | None = None) -> Iterator[Outputs]:
    """While open, in this thread, the CRAM layers of a model are asked for `routing`; models without take no notice.

    Args:
        model: the model; nothing is left on it.
        routing: what is asked.
        without_reads_in: the layer that answers as if no token had read; None: no layer.

    Yields:
        What each layer's mixer returned on the last pass, by layer.
    """
    outputs: Outputs = {}
    mixers = [module for module in model.modules() if isinstance(module, MixerAttention)]
    layers = {id(mixer): layer for layer, mixer in enumerate(mixers)}
    token = _asked.set(Asked(layers, routing, without_reads_in, outputs))
    try:
        yield outputs
    finally:
        _asked.reset(token)


def reads_frac(outputs: Outputs) -> Tensor | None:
    """Share of tokens that read, layer by layer, (L,), by what `routed` yields; None if there are no CRAM layers."""
    shares = [outputs[layer].trace.scored.double().mean() for layer in sorted(outputs)]
    return torch.stack(shares) if shares else None


AutoModelForCausalLM.register(CramGPT2Config, CramGPT2LMHeadModel)
