"""A causal language model of CRAM layers with the interface of transformers: Auto classes, cache, generate, Trainer.

Importing this module registers the model type "cram" with the Auto classes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from cramlab.memory import (
    AdapterConfig,
    CRAMConfig,
    CRAMLayer,
    CRAMState,
    EpisodicMemoryConfig,
    RouterConfig,
    WorkingMemoryConfig,
)
from cramlab.memory.decoder import Decoder
from cramlab.memory.episodic import Buffer
from cramlab.mixer import MixerOutput, Routing
from cramlab.model import Block, ModelConfig


@strict
class CRAMForCausalLMConfig(PreTrainedConfig):
    """Sizes of a CRAM language model; text has no time gaps, so each token comes one unit after the one before.

    Attributes:
        vocab_size: tokens.
        hidden_size: width.
        intermediate_size: hidden width of the MLPs.
        num_hidden_layers: blocks.
        num_attention_heads: heads of the episodic memory.
        memory_capacity: entries that a layer's buffer holds at most; None: no bound, so state grows with the context.
        memory_write: "all" or "salience" (see `EpisodicMemoryConfig`).
        state_size: width of the working memory's state.
        semantic_rank: width of the semantic memory.
        router: "benefit", "always" or "never", for all layers or one for each; "always" in one of eight makes a hybrid
            of recurrence and attention.
        read_price: nats that a read must save to be worth it.
        audit_frac: share of the tokens that reads in training whatever the gate says, in the layer taught at a step.
        initializer_range: of the embedding.
    """

    model_type = "cram"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers has it

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    memory_capacity: int | None = 4096
    memory_write: str = "all"
    state_size: int = 128
    semantic_rank: int = 256
    router: str | list[str] = "benefit"
    read_price: float = 0.1
    audit_frac: float = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def routers(self) -> list[str]:
        """One a layer; refuses those that cannot serve text, and too many or too few."""
        names = [self.router] * self.num_hidden_layers if isinstance(self.router, str) else self.router
        if len(names) != self.num_hidden_layers:
            raise ValueError(f"router names {len(names)} layers of {self.num_hidden_layers}; give one, or one for each")
        for name in names:
            if name not in ("benefit", "always", "never"):
                raise ValueError(f'router = "{name}" cannot serve text; give "benefit", "always" or "never"')
        return names

    def mixer(self, router: str) -> CRAMConfig:
        """The config of a layer's mixer; refuses what a layer cannot be built with."""
        return CRAMConfig(
            working=WorkingMemoryConfig(d_state=self.state_size),
            episodic=EpisodicMemoryConfig(
                n_heads=self.num_attention_heads,
                capacity=self.memory_capacity,
                write=self.memory_write,  # type: ignore[arg-type]
            ),
            semantic=AdapterConfig(rank=self.semantic_rank),
            router=RouterConfig(name=router),  # type: ignore[arg-type]
        )


class CRAMCacheLayer(LinearAttentionAndFullAttentionLayer):
    """One layer's state: the recurrence, and a buffer of keys and values of bounded size."""

    is_croppable = False  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.state: CRAMState | None = None
        self.decoder: Decoder | None = None  # instead of `state`, while tokens come one at a time
        self.n_tokens = 0

    def put(self, state: CRAMState, n_tokens: int) -> None:
        """Replaces the state after another `n_tokens` tokens."""
        self.state, self.decoder, self.n_tokens = state, None, self.n_tokens + n_tokens
        self._show(state.buffer.keys, state.buffer.values)

    def take(self) -> CRAMState | None:
        """The state, to go on from by other means than `step`."""
        if self.decoder is not None:
            self.put(self.decoder.state(), 0)
        return self.state

    def step(self, layer: CRAMLayer, x: Tensor, gaps: Tensor) -> Tensor:
        """One more token, in place, (B, 1, D), from x (B, 1, D) and gaps (B, 1)."""
        if self.decoder is None:
            assert self.state is not None
            self.decoder, self.state = Decoder(layer, self.state), None
        y = self.decoder.step(x[:, 0], gaps[:, 0])
        self.n_tokens += 1
        self._show(self.decoder.ring.keys, self.decoder.ring.values)
        return y[:, None]

    def _show(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.device, self.dtype, self.is_initialized = keys.device, keys.dtype, True

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held."""
        return self.n_tokens

    def get_max_length(self) -> int:
        """No bound on the context, whatever the bound on the buffer."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.decoder, self.n_tokens = None, None, 0
        self.keys, self.values, self.is_initialized = None, None, False

    def _select(self, rows: Tensor) -> None:
        state = self.take()
        if state is not None:
            rows = rows.to(state.working.device)
            buffer = Buffer(*(part.index_select(0, rows) for part in state.buffer))
            self.put(CRAMState(working=state.working.index_select(0, rows), buffer=buffer), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each row becomes a copy of the row that its beam goes on from."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row, `repeats` times."""
        state = self.take()
        if state is not None:
            self._select(torch.arange(len(state.working)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless nothing is to be removed.

        Raises:
            NotImplementedError: the recurrence has summed over all tokens and evicted entries are gone.
        """
        if tokens_to_remove and self.n_tokens:
            raise NotImplementedError(
                f"cannot remove {abs(tokens_to_remove)} tokens: the recurrent state is a sum over all tokens seen and "
                "holds no single one of them, and what the buffer has evicted is gone; run the shorter context again"
            )


class CRAMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, CRAM blocks, head. `loss` with labels: next-token loss plus the memories' and gates' own terms."""

    config_class = CRAMForCausalLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
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
        self.layers = nn.ModuleList(Block(blocks, mixer) for mixer in mixers)
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The layers have initialised themselves; only the embedding is scaled for text."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes a cache of its own kind of layer."""
        return False

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
        logits_to_keep: int = 0,
        read_all: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: (B, T).
            attention_mask: 0 on padding, left or right, (B, T) or (B, past + T).
            past_key_values: returned by the call before.
            inputs_embeds: in place of `input_ids`, (B, T, D).
            labels: (B, T), -100 where there is no loss.
            use_cache: return the state; by default only outside of training.
            output_hidden_states: return the residual stream before each layer and after the last norm; None: as the
                config says.
            logits_to_keep: compute logits for the last so many tokens; 0: all.
            read_all: every token reads and is written: the encoding phase of training.
            kwargs: for the loss function.

        Raises:
            ValueError: when not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[CRAMCacheLayer() for _ in self.layers])
        gaps = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
        valid = None
        if attention_mask is not None and not bool((given := attention_mask[:, -x.shape[1] :] != 0).all()):
            valid = given
        learns_gate = self.training and labels is not None and "benefit" in self.config.routers()
        routing, without = self._training_routing(read_all, gaps) if learns_gate else (Routing(read_all=read_all), -1)
        stepping = x.shape[1] == 1 and valid is None and not (self.training or read_all or torch.is_grad_enabled())
        silent: Tensor | None = None  # the residual stream in which one layer, `without`, has not read
        hidden, auxes, waiting, judged = [], [], [], None
        for i, block in enumerate(cast("list[Block]", list(self.layers))):
            hidden.append(x)
            layer = None if past_key_values is None else cast("CRAMCacheLayer", past_key_values.layers[i])
            if stepping and layer is not None and (layer.state or layer.decoder):
                x = block.finish(x, layer.step(cast("CRAMLayer", block.mixer), block.mixer_input(x), gaps))
                continue
            state = None if layer is None else layer.take()
            # Audits are of the layer that goes without: were all audited, each could rely on the others' reads.
            asked = routing._replace(counterfactual=i == without, audits=routing.audits if i == without else None)
            mixed = block.mix(x, gaps, state, valid, asked)
            if mixed.y_without_reads is not None:
                silent, judged = block.finish(x, mixed.y_without_reads), mixed
            elif silent is not None:
                silent = block.finish(silent, block.mix(silent, gaps, state, valid, asked).y)
            x = block.finish(x, mixed.y)
            auxes += mixed.aux.values()
            if learns_gate and i != without and mixed.trace.gate_logit is not None:
                waiting.append(mixed.trace.gate_logit.mean())
            if layer is not None:
                layer.put(mixed.state, x.shape[1])
        x = self.norm(x)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            own = torch.stack(auxes).mean() if auxes else loss.new_zeros(())
            if silent is not None and judged is not None:
                own = own + self._gate_loss(judged, logits, self.lm_head(self.norm(silent)), labels)
            if waiting:  # gates whose turn it is not: data parallel waits for every gradient, be it zero
                own = own + 0.0 * torch.stack(waiting).sum()
            if (n_items := kwargs.get("num_items_in_batch")) is not None:  # Trainer sums over parts of a batch
                own = own * ((labels[:, 1:] != -100).sum() / n_items)
            loss = loss + own
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def _training_routing(self, read_all: bool, gaps: Tensor) -> tuple[Routing, int]:
        """Audits for this step, and the gated layer, drawn by lot, that a second pass does without."""
        audits = torch.rand(gaps.shape, device=gaps.device) < self.config.audit_frac
        gated = [i for i, name in enumerate(self.config.routers()) if name == "benefit"]
        return Routing(read_all=read_all, audits=audits), gated[int(torch.randint(len(gated), ()))]

    def _gate_loss(self, mixed: MixerOutput, logits: Tensor, silent_logits: Tensor, labels: Tensor) -> Tensor:
        """Task loss without the reads, and the gate's: see `losses.gate_loss`, here with the next token's nats."""
        target = F.pad(labels, (0, 1), value=-100)[:, 1:]
        read = mixed.trace.scored & (target != -100)
        nats, silent = (
            F.cross_entropy(given.float().transpose(1, 2), target, reduction="none")
            for given in (logits, silent_logits)
        )
        n_read = read.sum().clamp(min=1)
        margin = (silent - nats - self.config.read_price).detach()
        gate_logit = mixed.trace.gate_logit
        assert gate_logit is not None
        wrong = F.binary_cross_entropy_with_logits(gate_logit, (margin > 0).to(gate_logit.dtype), reduction="none")
        return ((wrong * margin.abs().clamp(max=2.0) + 0.5 * silent) * read).sum() / n_read


AutoConfig.register("cram", CRAMForCausalLMConfig)
AutoModelForCausalLM.register(CRAMForCausalLMConfig, CRAMForCausalLM)
