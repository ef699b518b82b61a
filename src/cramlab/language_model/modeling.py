"""A causal language model of CRAM layers with the interface of transformers: Auto classes, cache, generate, Trainer.

Importing this module registers the model type "cram" with the Auto classes; `import cramlab` does the same as soon as
transformers is imported.
"""

from __future__ import annotations

import uuid
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple

from cramlab.language_model import inputs
from cramlab.language_model.bigrams import Bigrams, BigramTable
from cramlab.language_model.block import CRAMBlock, Passed, Tokens
from cramlab.language_model.cache import CRAMCacheLayer, checked_cache, new_cache
from cramlab.language_model.call import Call, CRAMOutput, Stacked
from cramlab.language_model.configuration import CRAMForCausalLMConfig
from cramlab.language_model.fresh_weights import keep_fresh, reset_missing
from cramlab.language_model.packed_rows import Packing, Past, documents, silent_tokens
from cramlab.memory import CRAMLayer
from cramlab.memory.router import BenefitGate
from cramlab.mixer import Bounds, Routing
from cramlab.model import ModelConfig
from cramlab.objective import Judged, next_token_losses, terms
from cramlab.ops import dispatch
from cramlab.ranks import draw_rows


class CRAMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, CRAM blocks, head. With labels, `loss` is the sum of `objective.terms`.

    Attributes:
        fixed_sizes: in training, no size depends on which tokens read, as compiled blocks need it; on accelerators this
            is so in any case.
    """

    fixed_sizes = False
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
        mixers = config.mixers()
        blocks = ModelConfig(
            mixer=mixers,
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            d_mlp=config.intermediate_size,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CRAMBlock(blocks, mixer) for mixer in mixers)
        self.bigrams: BigramTable | None = None
        if config.bigram_slots:
            self.bigrams = BigramTable(config.bigram_slots, config.vocab_size, config.hidden_size, len(mixers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.objective = config.objective()
        self.own_name = uuid.uuid4().hex  # caches know by it whose state they hold; copies share it
        keep_fresh(self)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Initialises each parameter by itself: transformers skips modules of others that have none."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Scales the embedding for text; the layers initialise themselves."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        else:
            reset_missing(module)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Returns False: `forward` makes a cache with layers of its own kind."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Makes a cache; refuses a kind of cache that cannot hold the state, before anything runs."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f'cache_implementation = "{wanted}" cannot hold a recurrent state; leave it out')
        generation_config.cache_implementation = None
        prepare = cast("Any", GenerationMixin)._prepare_cache_for_generation
        prepare(self, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = new_cache(self.own_name, len(self.layers))

    def _prepare_position_ids_for_generation(self, *_: Any, **__: Any) -> None:
        """Makes none: the model uses no positions, and would have to check them at every token."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Returns the arguments of each step of `generate`; refuses an empty prompt."""
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
        read_none: bool = False,
        output_gates: bool = False,
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
    ) -> CRAMOutput:
        """One pass.

        Args:
            input_ids: token numbers, (B, T).
            attention_mask: 0 on padding, which may be anywhere in a row, (B, T) or (B, past + T).
            past_key_values: cache returned by the previous call, or an empty `DynamicCache`; filled in place.
            inputs_embeds: embeddings in place of `input_ids`, (B, T, D).
            labels: (B, T), -100 where there is no loss; padding and the last token of a document predict nothing.
            use_cache: return the state; None: only outside training, and not for packed rows.
            output_hidden_states: return the residual stream before each layer and after the last norm; None: as the
                config says.
            logits_to_keep: number of last tokens to return logits for, or the indices of tokens; 0: all tokens.
            read_all: every token reads and is written, as in the encoding phase of training.
            read_none: no token reads, whatever the router.
            output_gates: return `gate_margins`.
            position_ids: marks the documents of packed rows, see `Packing`; the model itself uses no positions.
            seq_idx: see `Packing`.
            cu_seq_lens_q: see `Packing`.
            cu_seq_lens_k: see `Packing`.
            max_length_q: see `Packing`.
            max_length_k: see `Packing`.
            token_type_ids: zeros, if given.
            output_attentions: refused, because a token that does not read has no attention weights.
            num_items_in_batch: number of targets in all parts of the batch. Each term of the loss is then a sum over
                tokens divided by it, so that the losses of the parts add up to that of the batch.
            shift_labels: target of each token, (B, T), in place of labels shifted by one.
            kwargs: refused, unless None or false.

        Raises:
            ValueError: for an argument that cannot be honoured; the message names it.
        """
        inputs.check_nothing_else(kwargs)
        inputs.check_no_types(token_type_ids)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions cannot be honoured: a token that does not read has none; leave it out")
        inputs.check_tokens(input_ids, inputs_embeds, self.config.vocab_size, self)
        if self.bigrams is not None and input_ids is None:
            raise ValueError(
                f"inputs_embeds has no token numbers, which bigram_slots = {self.config.bigram_slots} needs; "
                "give input_ids"
            )
        packing = Packing(position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        given = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        shape = (given.shape[0], given.shape[1])
        call = self._checked(
            shape, attention_mask, past_key_values, packing, use_cache, labels, shift_labels, num_items_in_batch
        )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        bigrams = None if input_ids is None else self._bigrams(input_ids, call)
        stacked = self._through_blocks(x, bigrams, call, read_all=read_all, read_none=read_none)
        x = self.norm(stacked.x)
        logits = self.lm_head(x if call.target is not None else inputs.kept(x, logits_to_keep))
        loss = None
        if call.target is not None:
            loss = self._loss(stacked, logits, call)
            logits = inputs.kept(logits, logits_to_keep)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CRAMOutput(
            loss=loss,
            logits=logits,
            past_key_values=call.cache if call.use_cache else None,
            hidden_states=(*stacked.hidden, x) if output_hidden_states else None,  # type: ignore[arg-type]
            gate_margins=tuple(margin.detach() for margin in stacked.margins) if output_gates else None,
        )

    @torch.no_grad()
    def set_threshold(self, threshold: float | Tensor) -> None:
        """Sets the threshold of all read gates, in nats if they learn nats: the price of a read.

        Raises:
            ValueError: for a model without a gate that has a threshold.
        """
        if not (gates := self._gates()):
            raise ValueError('this model has no gate with a threshold; build it with gate_learns = "nats"')
        for gate in gates:
            cast("Tensor", gate.threshold).copy_(torch.as_tensor(threshold))

    def _gates(self) -> list[BenefitGate]:
        """The read gates that have a threshold."""
        found = [m for m in self.layers.modules() if isinstance(m, BenefitGate)]
        return [gate for gate in found if gate.threshold is not None]

    def _checked(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        packing: Packing,
        use_cache: bool | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        n_items: int | Tensor | None,
    ) -> Call:
        """Checks the arguments of `forward` against each other; raises likewise. `shape` is B and T."""
        if past_key_values is not None:
            past_key_values = checked_cache(past_key_values, self.own_name, len(self.layers), shape[0])
        first = None if past_key_values is None else cast("CRAMCacheLayer", past_key_values.layers[0])
        past, seen = Past() if first is None else first.past, None if first is None else first.valid
        valid = inputs.valid_tokens(attention_mask, shape, past.n_tokens, seen)
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
            inputs.check_some_target(target, n_items)
        simple = packed is None and valid is None and shift_labels is None
        return Call(valid, packed, target, labels if simple else None, past_key_values, bool(use_cache), n_items)

    def _bigrams(self, input_ids: Tensor, call: Call) -> Bigrams | None:
        """Looks up the bigrams of tokens (B, T), and notes the newest token in the cache; None: there is no table."""
        if self.bigrams is None:
            return None
        first = None if call.cache is None else cast("CRAMCacheLayer", call.cache.layers[0])
        found: Bigrams = self.bigrams(input_ids, call.valid, call.documents, None if first is None else first.newest)
        if first is not None:
            first.newest = found.newest
        return found

    def _through_blocks(
        self, x: Tensor, bigrams: Bigrams | None, call: Call, *, read_all: bool, read_none: bool
    ) -> Stacked:
        """Runs all blocks on embeddings (B, T, D), and continues the cache if there is one."""
        tokens = Tokens(torch.ones(x.shape[:2], dtype=x.dtype, device=x.device), call.valid, call.documents)
        routing = Routing(read_all=read_all, by_sequence=call.n_items is not None)
        if read_none:
            routing = routing._replace(skips=torch.ones_like(tokens.gaps, dtype=torch.bool))
        without = -1
        routes = any(name in ("benefit", "random") for name in self.config.routers())
        if self.training and call.target is not None and not read_none and routes:
            routing, without = self._training_routing(routing, tokens.gaps)
        stepping = x.shape[1] == 1 and call.valid is None
        stepping = stepping and not (self.training or read_all or read_none or torch.is_grad_enabled())
        silent: Tensor | None = None
        judged: Passed | None = None
        threshold: Tensor | None = None
        # Only the judged layer is audited: if all layers were, each could rely on the others' reads. A gate that the
        # task's loss teaches learns only where there is a read, so then all layers are audited.
        audited = range(len(self.layers)) if without < 0 else (without,)
        hidden, margins, unjudged, aux = [], [], [], {"consolidation": [], "salience": []}
        for i, block in enumerate(cast("list[CRAMBlock]", list(self.layers))):
            if bigrams is not None and self.bigrams is not None:
                x = self.bigrams.onto(x, bigrams, i)
                silent = None if silent is None else self.bigrams.onto(silent, bigrams, i)
            hidden.append(x)
            layer = None if call.cache is None else cast("CRAMCacheLayer", call.cache.layers[i])
            if stepping and layer is not None and layer.n_tokens and block.steps:
                mixer = cast("CRAMLayer", block.mixer)
                x = block.finish(x, layer.step(mixer, block.mixer_input(x), tokens.gaps))
                continue
            state = None if layer is None else layer.take()
            asked = routing._replace(counterfactual=i == without, audits=routing.audits if i in audited else None)
            parts = () if state is None else (state.working, *state.buffer)
            passed = Passed(*block(x, tokens, asked, *parts, keeps_state=layer is not None))
            if silent is not None:  # a pass of its own, so that a compiled block has one form less
                silent = Passed(*block(silent, tokens, asked, *parts, keeps_state=False)).x
            x = passed.x
            for name, losses in aux.items():
                if (loss := getattr(passed, name)) is not None:
                    losses.append(loss)
            if i == without:
                judged, silent = passed, passed.silent
                threshold = cast("CRAMLayer", block.mixer).gate.threshold
            if passed.gate_logit is not None:
                margins.append(passed.gate_logit)
                if i != without:
                    unjudged.append(passed.gate_logit)
            if layer is not None:
                layer.saw(call.valid)
                layer.put(passed.state, x.shape[1])
        return Stacked(x, tuple(hidden), aux, silent, judged, threshold, margins, unjudged)

    def _training_routing(self, routing: Routing, gaps: Tensor) -> tuple[Routing, int]:
        """Draws audits or skips, and the layer with a gate that a second pass runs without reads; -1: none."""
        drawn = draw_rows(lambda shape: torch.rand(shape, device=gaps.device), gaps.shape)
        if not routing.read_all:
            routing = routing._replace(audits=drawn < self.config.audit_frac)
        if self.fixed_sizes or dispatch.few_launches(gaps.device):  # bounds that are never met, so that nothing waits
            routing = routing._replace(bounds=Bounds(gaps.shape[1], gaps.shape[1]))
        gated = [i for i, name in enumerate(self.config.routers()) if name == "benefit"]
        if not gated or self.config.gate_learns not in ("decision", "nats"):
            return routing, -1
        if self.config.judged_frac < 1 and float(torch.rand(())) >= self.config.judged_frac:
            return routing._replace(audits=None), -1
        return routing, gated[int(torch.randint(len(gated), ()))]

    def _loss(self, stacked: Stacked, logits: Tensor, call: Call) -> Tensor:
        """Sum of the objective's terms, scalar."""
        target, n_items = cast("Tensor", call.target), call.n_items
        n_targets = None if n_items is None else torch.as_tensor(n_items, device=logits.device)
        means = {name: torch.stack(losses).mean() for name, losses in stacked.aux.items() if losses}
        aux = {name: loss / len(means) for name, loss in means.items()}  # the average of both, see docs/log.md
        if n_targets is not None:
            aux = {name: loss / n_targets for name, loss in aux.items()}
        judged = None
        if stacked.silent is not None and stacked.judged is not None:
            silent_logits = self.lm_head(self.norm(stacked.silent))
            with torch.no_grad():
                with_reads = next_token_losses(logits, target, ignored=inputs.IGNORED)
            without = next_token_losses(silent_logits, target, ignored=inputs.IGNORED)
            trace = stacked.judged.trace(target != inputs.IGNORED, decides=stacked.threshold is None)
            judged = Judged(trace, with_reads, without, stacked.threshold)
        task = self._next_token_loss(logits, call.labels, target, n_items)
        found = terms(task, aux, self.objective, judged, n_targets=n_targets)
        loss = torch.stack(list(found.values())).sum()
        if self.training and stacked.unjudged:  # data parallelism waits for every parameter's gradient, even a zero
            loss = loss + 0.0 * torch.stack(stacked.unjudged).mean()
        return loss

    def _next_token_loss(
        self, logits: Tensor, labels: Tensor | None, target: Tensor, n_items: int | Tensor | None
    ) -> Tensor:
        """Cross-entropy by the model's loss function, scalar; labels None: only the targets say what is predicted."""
        how: dict[str, Any] = {} if n_items is None else {"num_items_in_batch": n_items}
        if labels is None:
            labels, how["shift_labels"] = target, target
        return self.loss_function(logits=logits, labels=labels.long(), vocab_size=self.config.vocab_size, **how)


AutoModelForCausalLM.register(CRAMForCausalLMConfig, CRAMForCausalLM)
