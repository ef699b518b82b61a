"""The config of a CRAM language model, registered with `AutoConfig` when this module is imported.

The model is imported, and so registered with the Auto classes, when the first config is made. Programs that use other
models do not import it.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from cramlab.config import ConfigError
from cramlab.memory import (
    AdapterConfig,
    CRAMConfig,
    DeltaMemoryConfig,
    EpisodicMemoryConfig,
    NothingConfig,
    RouterConfig,
    WorkingLayerConfig,
    WorkingMemoryConfig,
)
from cramlab.objective import LossConfig

_DELTA_HEAD = 64  # channels of a head of the delta rule


class BringsModel:
    """A config whose first instance imports its model, which registers itself."""

    model_module: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG004
        """Imports the model's module."""
        importlib.import_module(cls.model_module)
        return super().__new__(cls)


@strict
class CRAMForCausalLMConfig(BringsModel, PreTrainedConfig):
    """Sizes and loss weights of a CRAM language model. Tokens of text are one unit of time apart.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width.
        intermediate_size: hidden width of the MLPs.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of the episodic memory.
        memory_layers: layers, counted from 0, with an episodic and a semantic memory; None: all. The other layers have
            only the working memory. If given, a layer whose router is "always" has no semantic memory, which nothing
            would ask. A layer whose router is "never" belongs here for its semantic memory or a window; without a
            window its keys and values are computed and never read.
        memory_capacity: largest number of entries in a layer's buffer; None: the buffer grows with the context.
        rope: rotary positions in the episodic memory, counted in entries written (see `EpisodicMemoryConfig`).
        rope_theta: base of their wavelengths.
        qk_norm: RMS norm of each head's queries and keys, with a learned scale.
        memory_write: "all" or "salience" (see `EpisodicMemoryConfig`).
        window: in layers with memories, every token attends to this many of the newest entries, whether or not it reads
            (see `CRAMConfig`); a layer whose router is "never" is then one of sliding-window attention. Layers whose
            router is "always" have no use for it and none. None: no layer has a window.
        working: working memory: "leaky" integrators, or a gated "delta" rule with heads of 64 channels.
        state_size: width of the leaky integrators' state.
        semantic_rank: width of the semantic memory.
        bigram_slots: rows of a table of bigrams, which is added to the residual stream before every block; 0: no table.
            Five times the vocabulary is a good size (see `BigramTable`).
        router: "benefit", "always", "never" or "random", for all layers with memories or one per layer, "never" in
            layers without; "always" in one layer of eight and "never" in the others make a hybrid of recurrence and
            attention. "random" is a control: each token reads with probability `random_frac`, drawn anew in every call.
        random_frac: see `RouterConfig`.
        gate_learns: what gates learn; see `RouterConfig.learns`.
        gate_width: hidden width of the gates.
        read_price: smallest benefit that makes a read worthwhile, in nats; for gates that learn a "decision".
        audit_frac: share of the tokens that read in training whatever the gate says, in the layer judged at a step.
        judged_frac: share of the training steps in which a layer is judged, that is, runs a second time without reads.
        benefit_cap: see `LossConfig`, like the fields after it.
        gate_weight: see `LossConfig`.
        no_read_weight: see `LossConfig`.
        no_read_floor: see `LossConfig`.
        consolidation_weight: see `LossConfig`.
        initializer_range: standard deviation of the embedding's initial weights.
    """

    model_type = "cram"
    model_module = "cramlab.language_model.modeling"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers has it

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    memory_layers: list[int] | None = None
    memory_capacity: int | None = 4096
    rope: bool = False
    rope_theta: float = 10000.0
    qk_norm: bool = False
    memory_write: str = "all"
    window: int | None = None
    working: str = "leaky"
    state_size: int = 128
    semantic_rank: int = 256
    bigram_slots: int = 0
    router: str | list[str] = "benefit"
    random_frac: float = 0.05
    gate_learns: str = "decision"
    gate_width: int = 64
    read_price: float = 0.1
    audit_frac: float = 0.1
    judged_frac: float = 1.0
    benefit_cap: float = 2.0
    gate_weight: float = 1.0
    no_read_weight: float = 0.5
    no_read_floor: float = 1.0
    consolidation_weight: float = 1.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def routers(self) -> list[str]:
        """The routers, one per layer; raises ValueError for unknown ones and for too many or too few."""
        remembers = self._remembers()
        names = self.router
        if isinstance(names, str):
            names = [names if here else "never" for here in remembers]
        if len(names) != self.num_hidden_layers:
            raise ValueError(f"router names {len(names)} layers of {self.num_hidden_layers}; give one, or one for each")
        for layer, (name, here) in enumerate(zip(names, remembers, strict=True)):
            if name not in ("benefit", "always", "never", "random"):
                raise ValueError(f'router = "{name}" cannot serve text; give "benefit", "always", "never" or "random"')
            if not here and name != "never":
                raise ValueError(
                    f'router[{layer}] = "{name}" is of a layer without memories; give "never", or add {layer} to '
                    f"memory_layers = {self.memory_layers}"
                )
        return names

    def _remembers(self) -> list[bool]:
        """Whether each layer has an episodic and a semantic memory; raises ValueError for a layer that is none."""
        if self.memory_layers is None:
            return [True] * self.num_hidden_layers
        for layer in self.memory_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"memory_layers = {self.memory_layers} names layer {layer} of {self.num_hidden_layers}; "
                    f"give layers from 0 to {self.num_hidden_layers - 1}"
                )
        return [layer in self.memory_layers for layer in range(self.num_hidden_layers)]

    def objective(self) -> LossConfig:
        """Weights and prices of the loss.

        Raises:
            ConfigError: for one that is out of range, naming the field.
        """
        names = ("read_price", "benefit_cap", "gate_weight", "no_read_weight", "no_read_floor", "consolidation_weight")
        try:
            return LossConfig(retrieval_emphasis=1.0, **{name: getattr(self, name) for name in names})
        except ConfigError as error:
            raise ConfigError(str(error).replace("training.loss.", "")) from error

    def _working(self) -> WorkingMemoryConfig | DeltaMemoryConfig:
        """The working memory's config; raises ValueError for an unknown name."""
        if self.working == "leaky":
            return WorkingMemoryConfig(d_state=self.state_size)
        if self.working == "delta":
            width = min(_DELTA_HEAD, self.hidden_size)
            return DeltaMemoryConfig(n_heads=self.hidden_size // width, d_head=width)
        raise ValueError(f'working = "{self.working}" is unknown; give "leaky" or "delta"')

    def mixers(self) -> tuple[CRAMConfig | WorkingLayerConfig, ...]:
        """The configs of the layers' mixers; raises ConfigError for sizes that no layer can have."""
        return tuple(
            self._mixer(router) if here else WorkingLayerConfig(working=self._working())
            for router, here in zip(self.routers(), self._remembers(), strict=True)
        )

    def _mixer(self, router: str) -> CRAMConfig:
        """The config of a layer with memories."""
        asked = self.memory_layers is None or router != "always"
        return CRAMConfig(
            working=self._working(),
            episodic=EpisodicMemoryConfig(
                n_heads=self.num_attention_heads,
                capacity=self.memory_capacity,
                rope=self.rope,
                rope_theta=self.rope_theta,
                qk_norm=self.qk_norm,
                write=self.memory_write,  # type: ignore[arg-type]
            ),
            semantic=AdapterConfig(rank=self.semantic_rank) if asked else NothingConfig(),
            router=RouterConfig(
                name=router,  # type: ignore[arg-type]
                learns=self.gate_learns,  # type: ignore[arg-type]
                d_hidden=self.gate_width,
                random_frac=self.random_frac,
            ),
            window=None if router == "always" else self.window,
        )


AutoConfig.register(CRAMForCausalLMConfig.model_type, CRAMForCausalLMConfig)
