"""GPT-2 with a CRAM layer in place of every attention sub-layer: opens models saved by earlier versions.

New models are trained as `CRAMForCausalLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

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
from cramlab.mixer import Routing


class MixerAttention(nn.Module):
    """A CRAM layer with the interface of GPT-2's attention. Tokens are one unit of time apart."""

    def __init__(self, config: CramGPT2Config) -> None:
        super().__init__()
        episodic = EpisodicMemoryConfig(n_heads=config.n_head, capacity=config.n_positions)
        self.mixer: CRAMLayer = dataclasses.replace(CRAMConfig(), episodic=episodic).build(config.n_embd)

    def forward(
        self,
        hidden_states: Tensor,
        read_all: bool = False,
        valid: Tensor | None = None,
        packed: Documents | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Mixes (B, T, D). Returns no attention weights; ignores GPT-2's own mask, which `valid` replaces."""
        routing, gaps = Routing(read_all=read_all), hidden_states.new_ones(hidden_states.shape[:2])
        if packed is not None:
            return packed.mix(self.mixer, hidden_states, gaps, valid, routing).y, None
        return self.mixer(hidden_states, gaps, valid=valid, routing=routing).y, None


class CramGPT2Model(GPT2Model):
    """GPT-2's blocks, with the initialisation of the CRAM layers in place of attention."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Initialises each parameter by itself: transformers skips modules of others that have none."""
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        mixers = (part for part in self.modules() if isinstance(part, MixerAttention))
        if any(module is part for mixer in mixers for part in mixer.modules()):
            reset_missing(module)
        else:
            super()._init_weights(module)


class CramGPT2LMHeadModel(GPT2LMHeadModel):
    """A GPT-2 whose attention has been replaced. It has no cache: it serves audits."""

    config_class = CramGPT2Config  # type: ignore[assignment]

    _supports_attention_backend = False  # its blocks have no attention function to replace

    def __init__(self, config: CramGPT2Config) -> None:
        super(GPT2LMHeadModel, self).__init__(config)  # skips the parent's, which would build GPT-2's own blocks
        self.transformer = CramGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
        for block in self.transformer.h:
            block.attn = MixerAttention(config)
            keep_fresh(block.attn)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Returns False: the model has no cache."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Generates without a cache; refuses one that was asked for."""
        if generation_config.cache_implementation is not None or model_kwargs.get("past_key_values") is not None:
            raise ValueError("a cram_gpt2 model has no cache; leave out cache_implementation and past_key_values")
        generation_config.use_cache = False
        prepare = cast("Any", GenerationMixin)._prepare_cache_for_generation
        return prepare(self, generation_config, model_kwargs, *args, **kwargs)

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
        read_all: bool = False,
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
        """One pass, with the arguments of `GPT2LMHeadModel.forward` and `CRAMForCausalLM.forward`.

        Raises:
            ValueError: for a cache, attention weights, and masks other than padding; and for packed rows without
                `position_ids`, which GPT-2 embeds.
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
        return super().forward(read_all=read_all, valid=valid, packed=packed, **how)


AutoModelForCausalLM.register(CramGPT2Config, CramGPT2LMHeadModel)
