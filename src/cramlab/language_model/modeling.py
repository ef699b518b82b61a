"""A causal language model of CRAM layers with the interface of transformers: Auto classes, cache, generate, Trainer.

Importing this module registers the model type "cram" with the Auto classes; so does `import cramlab` when transformers
is used.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple

from cramlab.language_model import inputs
from cramlab.language_model.cache import CRAMCacheLayer, checked_cache, new_cache
from cramlab.language_model.configuration import CRAMForCausalLMConfig
from cramlab.language_model.fresh_weights import keep_fresh, reset_missing
from cramlab.language_model.packed_rows import Documents, Packing, Past, documents, silent_tokens
from cramlab.memory import CRAMLayer, CRAMState
from cramlab.memory.episodic import Buffer
from cramlab.mixer import MixerOutput, Routing
from cramlab.model import Block, ModelConfig
from cramlab.ops.plain import is_plain


class Tokens(NamedTuple):
    """What a pass knows of its tokens beside the residual stream; see `Mixer.forward`."""

    gaps: Tensor
    valid: Tensor | None
    documents: Documents | None


class Passed(NamedTuple):
    """What a block returns: tensors alone and on one level, as gradient checkpointing asks.

    Attributes:
        x: residual stream, (B, T, D).
        silent: the same if one layer had not read; None: no layer so far has been asked to do without.
        aux: losses of the memories, summed over sequences; None outside of training.
        gate_logit: of the read gate, (B, T); None: it has none.
        scored: tokens that read, bool (B, T).
        working: state of the working memory.
        keys: of the buffer, like the parts after it.
        values: see `Buffer`.
        times: see `Buffer`.
        filled: see `Buffer`.
    """

    x: Tensor
    silent: Tensor | None
    aux: Tensor | None
    gate_logit: Tensor | None
    scored: Tensor
    working: Tensor
    keys: Tensor
    values: Tensor
    times: Tensor
    filled: Tensor


class CRAMBlock(Block, GradientCheckpointingLayer):
    """A block that also carries the residual stream in which one of the layers has not read."""

    def forward(
        self, x: Tensor, silent: Tensor | None, tokens: Tokens, routing: Routing, *state: Tensor
    ) -> tuple[Tensor | None, ...]:
        """One pass over x and, where there is one, the silent stream; returns a `Passed`, as a tuple."""
        before = CRAMState(state[0], Buffer(*state[1:])) if state else None
        mixed = self._mixed(x, tokens, before, routing)
        if mixed.y_without_reads is not None:
            silent = self.finish(x, mixed.y_without_reads)
        elif silent is not None:
            silent = self.finish(silent, self._mixed(silent, tokens, before, routing).y)
        aux = torch.stack([loss.sum() for loss in mixed.aux.values()]) if mixed.aux else None
        y = self.finish(x, mixed.y)
        return y, silent, aux, mixed.trace.gate_logit, mixed.trace.scored, mixed.state.working, *mixed.state.buffer

    def _mixed(self, x: Tensor, tokens: Tokens, state: CRAMState | None, routing: Routing) -> MixerOutput:
        if tokens.documents is None:
            return self.mix(x, tokens.gaps, state, tokens.valid, routing)
        return tokens.documents.mix(self.mixer, self.mixer_input(x), tokens.gaps, tokens.valid, routing)

    @property
    def steps(self) -> bool:
        """Whether a decoder may go around `forward`: nothing has been hung on the block or its mixer."""
        return is_plain(self, CRAMBlock) and is_plain(self.mixer, CRAMLayer)


class CRAMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, CRAM blocks, head. `loss` with labels: next-token loss plus the memories' and gates' own terms."""

    config_class = CRAMForCausalLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CRAMBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # type: ignore[assignment]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # type: ignore[assignment]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: CRAMForCausalLMConfig) -> None:
        super().__init__(config)
        mixers = tuple(config.mixer(router) for router in config.routers())
        blocks = ModelConfig(
            mixer=mixers,
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            d_mlp=config.intermediate_size,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CRAMBlock(blocks, mixer) for mixer in mixers)
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.own_name = uuid.uuid4().hex  # by which caches know whose state they hold; copies share it
        keep_fresh(self)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Looks at each parameter by itself, where transformers passes over modules of others that have none."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The layers initialise themselves; only the embedding is scaled for text."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        else:
            reset_missing(module)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes a cache of its own kind of layer."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Makes a cache, and refuses a kind of cache that cannot hold the state, before anything runs."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f'cache_implementation = "{wanted}" cannot hold a recurrent state; leave it out')
        generation_config.cache_implementation = None
        prepare = cast("Any", GenerationMixin)._prepare_cache_for_generation
        prepare(self, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = new_cache(self.own_name, len(self.layers))

    def _prepare_position_ids_for_generation(self, *_: Any, **__: Any) -> None:
        """Makes none: the model knows no positions, and would have to check them at every token."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The arguments of each step of `generate`; an empty prompt, with no token to go on from, is refused."""
        if not input_ids.shape[1] and inputs_embeds is None:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give a token to generate from")
        given = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return cast("Any", super()).prepare_inputs_for_generation(input_ids, *args, **given, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = cast("nn.Embedding", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        read_all: bool = False,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: (B, T).
            attention_mask: 0 on padding, left, right or in between, (B, T) or (B, past + T).
            past_key_values: returned by the call before, or an empty `DynamicCache`, which is filled in place.
            inputs_embeds: in place of `input_ids`, (B, T, D).
            labels: (B, T), -100 where there is no loss; padding predicts nothing, nor does the end of a document.
            use_cache: return the state; by default only outside of training, and not for packed rows.
            output_hidden_states: return the residual stream before each layer and after the last norm; None: as the
                config says.
            logits_to_keep: return logits for the last so many tokens, or for those of these numbers; 0: all.
            read_all: every token reads and is written: the encoding phase of training.
            position_ids: packed rows, see `Packing`; the model itself knows no positions.
            seq_idx: see `Packing`.
            cu_seq_lens_q: see `Packing`.
            cu_seq_lens_k: see `Packing`.
            max_length_q: see `Packing`.
            max_length_k: see `Packing`.
            token_type_ids: zeros, if any.
            output_attentions: refused, as a token that does not read has no attention to show.
            num_items_in_batch: targets in all parts of the batch. Each term of the loss is then a sum over tokens
                divided by it, so that the losses of the parts add up to that of the whole.
            shift_labels: the target of each token, (B, T), in place of the labels moved by one.
            kwargs: refused, unless they say nothing.

        Raises:
            ValueError: for what cannot be honoured; the message names the argument.
        """
        inputs.check_nothing_else(kwargs)
        inputs.check_no_types(token_type_ids)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions cannot be honoured: a token that does not read has none; leave it out")
        inputs.check_tokens(input_ids, inputs_embeds, self.config.vocab_size, self)
        given = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        shape = (given.shape[0], given.shape[1])
        if past_key_values is not None:
            past_key_values = checked_cache(past_key_values, self.own_name, len(self.layers), shape[0])
        first = None if past_key_values is None else cast("CRAMCacheLayer", past_key_values.layers[0])
        past, seen = Past() if first is None else first.past, None if first is None else first.valid
        valid = inputs.valid_tokens(attention_mask, shape, past.n_tokens, seen)
        packing = Packing(position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packed = documents(packing, shape, valid, past)
        if packed is not None and (use_cache or past_key_values is not None):
            raise ValueError("packed rows have no state to go on from; leave out use_cache and past_key_values")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and packed is None
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.own_name, len(self.layers))
        target = None
        if labels is not None or shift_labels is not None:
            absent = silent_tokens(valid, packed if shift_labels is None else None)
            target = inputs.targets(labels, shift_labels, shape, self.config.vocab_size, absent)
            inputs.check_some_target(target, num_items_in_batch)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = Tokens(torch.ones(shape, dtype=x.dtype, device=x.device), valid, packed)
        routing = Routing(read_all=read_all, by_sequence=num_items_in_batch is not None)
        learns_gate = self.training and target is not None and "benefit" in self.config.routers()
        without = -1
        if learns_gate:
            routing, without = self._training_routing(routing, tokens.gaps)
        stepping = shape[1] == 1 and valid is None and not (self.training or read_all or torch.is_grad_enabled())
        silent: Tensor | None = None  # the residual stream in which one layer, `without`, has not read
        hidden, auxes, waiting, judged = [], [], [], None
        for i, block in enumerate(cast("list[CRAMBlock]", list(self.layers))):
            hidden.append(x)
            layer = None if past_key_values is None else cast("CRAMCacheLayer", past_key_values.layers[i])
            if stepping and layer is not None and layer.n_tokens and block.steps:
                mixer = cast("CRAMLayer", block.mixer)
                x = block.finish(x, layer.step(mixer, block.mixer_input(x), tokens.gaps))
                continue
            state = None if layer is None else layer.take()
            # Audits are of the layer that goes without: were all audited, each could rely on the others' reads.
            asked = routing._replace(counterfactual=i == without, audits=routing.audits if i == without else None)
            parts = () if state is None else (state.working, *state.buffer)
            passed = Passed(*block(x, silent, tokens, asked, *parts))
            x, silent = passed.x, passed.silent
            if passed.aux is not None:
                auxes.append(passed.aux)
            if i == without:
                judged = passed
            elif learns_gate and passed.gate_logit is not None:
                waiting.append(passed.gate_logit.mean())
            if layer is not None:
                layer.saw(valid)
                layer.put(CRAMState(passed.working, Buffer(*passed[-4:])), shape[1])
        x = self.norm(x)
        logits = self.lm_head(x if target is not None else inputs.kept(x, logits_to_keep))
        loss = None
        if target is not None:
            simple = packed is None and valid is None and shift_labels is None
            loss = self._next_token_loss(logits, labels if simple else None, target, num_items_in_batch)
            n_items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=x.device)
            own = torch.cat(auxes).mean() if auxes else loss.new_zeros(())
            own = own if n_items is None else own / n_items
            if silent is not None and judged is not None:
                own = own + self._gate_loss(judged, logits, self.lm_head(self.norm(silent)), target, n_items)
            if waiting:  # gates whose turn it is not: data parallel waits for every gradient, be it zero
                own = own + 0.0 * torch.stack(waiting).sum()
            loss = loss + own
            logits = inputs.kept(logits, logits_to_keep)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def _training_routing(self, routing: Routing, gaps: Tensor) -> tuple[Routing, int]:
        """Audits for this step, and the gated layer, drawn by lot, that a second pass does without."""
        audits = torch.rand(gaps.shape, device=gaps.device) < self.config.audit_frac
        gated = [i for i, name in enumerate(self.config.routers()) if name == "benefit"]
        return routing._replace(audits=audits), gated[int(torch.randint(len(gated), ()))]

    def _next_token_loss(
        self, logits: Tensor, labels: Tensor | None, target: Tensor, n_items: int | Tensor | None
    ) -> Tensor:
        """By the model's loss function; labels None: the targets are not simply these moved by one."""
        how: dict[str, Any] = {} if n_items is None else {"num_items_in_batch": n_items}
        if labels is None:
            labels, how["shift_labels"] = target, target
        return self.loss_function(logits=logits, labels=labels.long(), vocab_size=self.config.vocab_size, **how)

    def _gate_loss(
        self, judged: Passed, logits: Tensor, silent_logits: Tensor, target: Tensor, n_items: Tensor | None
    ) -> Tensor:
        """Task loss without the reads, and the gate's: see `objective.gate_loss`, here with the next token's nats.

        A mean over the tokens that read, or their sum by the items of the whole batch.
        """
        read = judged.scored & (target != inputs.IGNORED)
        nats, silent = (
            F.cross_entropy(given.float().transpose(1, 2), target, reduction="none")
            for given in (logits, silent_logits)
        )
        n_read = read.sum().clamp(min=1) if n_items is None else n_items
        margin = (silent - nats - self.config.read_price).detach()
        gate_logit = judged.gate_logit
        assert gate_logit is not None
        wrong = F.binary_cross_entropy_with_logits(gate_logit, (margin > 0).to(gate_logit.dtype), reduction="none")
        return ((wrong * margin.abs().clamp(max=2.0) + 0.5 * silent) * read).sum() / n_read


AutoModelForCausalLM.register(CRAMForCausalLMConfig, CRAMForCausalLM)
