"""A sequence model: embedding, blocks of mixer and MLP, two heads. It works with any mixer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.batch import Batch, InputSpec, Predictions
from cramlab.config import ConfigError, Layers, Size, checked
from cramlab.mixer import MixerConfig, MixerOutput, Routing, Trace

_CACHED_TOKENS = 512
_MANY_CLASSES = 1024  # from here on the answer head costs more than the rest of a small model


@checked("model")
class ModelConfig:
    """Config of a sequence model. Everything but the mixer is the same for all mixers.

    Attributes:
        mixer: config of every layer's mixer, or a pattern of several configs, repeated from the first layer on.
        d_model: width of the model.
        n_layers: number of blocks.
        d_mlp: hidden width of the MLP.
        n_frequencies: number of sine and cosine pairs that embed a gap or horizon; learned, initially from 0.01 to 3
            radians per time unit.
        norm: "pre" (default) or "post" (the paper's Add&Norm).
    """

    mixer: MixerConfig | tuple[MixerConfig, ...]
    d_model: Size = 128
    n_layers: Layers = 1
    d_mlp: Size = 256
    n_frequencies: Size = 12
    norm: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.mixer == ():
            raise ConfigError("model.mixer = () holds no mixer; give one, or a pattern of several")
        for mixer in self.mixer if isinstance(self.mixer, tuple) else (self.mixer,):
            if not dataclasses.is_dataclass(mixer) or isinstance(mixer, type):
                raise ConfigError(f"model.mixer = {mixer!r} is not a config of a mixer; give one, such as CRAMConfig()")

    def mixer_of(self, layer: int) -> MixerConfig:
        """Config of the mixer of a layer, counted from 0."""
        return self.mixer[layer % len(self.mixer)] if isinstance(self.mixer, tuple) else self.mixer


class ModelOutput(NamedTuple):
    """Everything that a call returns.

    Attributes:
        predictions: output of both heads.
        state: state of each layer, for the continuation.
        traces: trace of each layer.
        counterfactual_traces: traces of the layers above `counterfactual_layer` that ran a second time.
        aux: named losses of the mixers, each averaged over the layers that have it.
        without_reads: predictions as if the layer `counterfactual_layer` had not read; None unless asked for. If it is
            the last layer, only the tokens that read there are computed; the others are zero.
    """

    predictions: Predictions
    state: tuple[Any, ...]
    traces: tuple[Trace, ...]
    counterfactual_traces: tuple[Trace, ...]
    aux: dict[str, Tensor]
    without_reads: Predictions | None


class Embedding(nn.Module):
    """Sum of the embeddings of all channels and of gap and horizon, (B, T, D)."""

    def __init__(self, spec: InputSpec, config: ModelConfig) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, config.d_model) for size in spec.vocab_sizes)
        self.continuous = nn.Linear(spec.n_continuous, config.d_model)
        self.frequencies = nn.Parameter(torch.logspace(-2.0, 0.5, config.n_frequencies))
        self.time = nn.Linear(2 * (2 * config.n_frequencies + 1), config.d_model, bias=False)

    def forward(self, discrete: Tensor, continuous: Tensor, gaps: Tensor, horizons: Tensor) -> Tensor:
        """Embeds the inputs of a `Batch`."""
        x = self.continuous(continuous)
        for i, table in enumerate(self.tables):
            x = x + table(discrete[..., i])
        times = torch.stack([gaps, horizons], dim=-1)  # (B, T, 2)
        phase = times[..., None] * self.frequencies
        features = torch.cat([phase.sin(), phase.cos(), torch.log1p(times)[..., None]], dim=-1)
        return x + self.time(features.flatten(-2))


class Block(nn.Module):
    """Mixer and MLP, each added to the residual stream and normalised before ("pre") or after ("post")."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.mixer = mixer.build(config.d_model)
        self.mixer_norm = nn.LayerNorm(config.d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(config.d_model, bias=False)
        self.mlp_in = nn.Linear(config.d_model, config.d_mlp)
        self.mlp_out = nn.Linear(config.d_mlp, config.d_model)

    def mix(self, x: Tensor, gaps: Tensor, state: Any, valid: Tensor | None, routing: Routing | None) -> MixerOutput:
        """Output of the mixer for x, before it is added to x."""
        return self.mixer(self.mixer_input(x), gaps, state, valid=valid, routing=routing)

    def mixer_input(self, x: Tensor) -> Tensor:
        """Input of the mixer for x (..., T, D)."""
        return self.mixer_norm(x) if self.pre else x

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds the output of the mixer to x, both (..., T, D), then applies the MLP."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[-2] <= _CACHED_TOKENS:
            return self._finish(x, mixed)
        y = torch.empty_like(x)  # on a CPU, a few tokens at a time, so that the hidden layer stays in the cache
        for part, given, answer in zip(*(t.split(_CACHED_TOKENS, dim=-2) for t in (y, x, mixed)), strict=True):
            part.copy_(self._finish(given, answer))
        return y

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        if self.pre:
            x = x + mixed
            return x + self.mlp_out(F.silu(self.mlp_in(self.mlp_norm(x))))
        x = self.mixer_norm(x + mixed)
        return self.mlp_norm(x + self.mlp_out(F.silu(self.mlp_in(x))))


class SequenceModel(nn.Module):
    """Embedding, blocks, heads; built from a `ModelConfig` and a task's `InputSpec`."""

    def __init__(self, config: ModelConfig, spec: InputSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.embedding = Embedding(spec, config)
        self.layers = nn.ModuleList(Block(config, config.mixer_of(layer)) for layer in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.level_head = nn.Linear(config.d_model, 1)
        self.answer_head = nn.Linear(config.d_model, spec.n_classes)
        nn.init.zeros_(self.level_head.weight)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return cast("list[Block]", list(self.layers))

    def forward(
        self,
        batch: Batch,
        state: tuple[Any, ...] | None = None,
        *,
        routing: Routing | None = None,
        counterfactual_layer: int | None = None,
        only_asked: bool = False,
    ) -> ModelOutput:
        """Predicts next levels and answers.

        Args:
            batch: inputs; targets and masks are not used, but for `valid` and as `only_asked` says.
            state: state of a previous call, to continue the same sequences.
            routing: see `Routing`.
            counterfactual_layer: also predict without the reads of this layer, by running the rest of the model again.
                Audits then apply to this layer alone: if all layers were audited, each could rely on the reads of
                the others, no read would seem to be of use, and all gates would close.
            only_asked: with at least 1,024 classes, compute logits of the batch's retrieval tokens alone; see
                `Predictions.logits`. With fewer classes it changes nothing.
        """
        valid = None if bool(batch.valid.all()) else batch.valid
        routing = routing or Routing()
        asked = batch.retrieval_mask if only_asked and self.spec.n_classes >= _MANY_CLASSES else None
        if valid is not None:
            batch = batch.with_zero_padding()
        x = self.embedding(batch.discrete, batch.continuous, batch.gaps, batch.horizons)
        silent: Tensor | None = None  # residual stream as if the counterfactual layer had not read
        without_reads: Predictions | None = None
        states, traces, second_traces, auxes = [], [], [], []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state[i]
            wish = routing._replace(counterfactual=i == counterfactual_layer)
            if counterfactual_layer not in (None, i):  # measure this layer's reads given the decisions of the others
                wish = wish._replace(audits=None)
            mixed = block.mix(x, batch.gaps, before, valid, wish)
            if mixed.y_without_reads is not None and i + 1 == len(self.blocks):
                # After the last mixer no token depends on another, so the tokens that read are enough.
                without_reads = self._predict_some(mixed.trace.attended, x, mixed.y_without_reads, batch, asked)
            elif silent is not None:
                again = block.mix(silent, batch.gaps, before, valid, wish)
                second_traces.append(again.trace)
                silent = block.finish(silent, again.y)
            elif mixed.y_without_reads is not None:
                silent = block.finish(x, mixed.y_without_reads)
            x = block.finish(x, mixed.y)
            states.append(mixed.state)
            traces.append(mixed.trace)
            auxes.append(mixed.aux)
        names = dict.fromkeys(name for aux in auxes for name in aux)
        aux = {name: torch.stack([a[name] for a in auxes if name in a]).mean() for name in names}
        if silent is not None:
            without_reads = self._predict(silent, batch.continuous[..., 0], asked)
        return ModelOutput(
            predictions=self._predict(x, batch.continuous[..., 0], asked),
            state=tuple(states),
            traces=tuple(traces),
            counterfactual_traces=tuple(second_traces),
            aux=aux,
            without_reads=without_reads,
        )

    def _predict(self, x: Tensor, level: Tensor, asked: Tensor | None = None) -> Predictions:
        """Both heads on x (..., D); the level head predicts the change of `level` (...).

        With `asked`, bool (...), the logits are those of its tokens alone, (number of tokens, n_classes).
        """
        x = self.norm(x)
        logits = self.answer_head(x if asked is None else x[asked])
        return Predictions(level=level + self.level_head(x).squeeze(-1), logits=logits)

    def _predict_some(
        self, where: Tensor, x: Tensor, mixed: Tensor, batch: Batch, asked: Tensor | None = None
    ) -> Predictions:
        """Finishes the last block and predicts for the tokens of `where` (B, T); zero elsewhere. See `_predict`."""
        level = batch.continuous[..., 0]
        if bool(where.all()):
            return self._predict(self.blocks[-1].finish(x, mixed), level, asked)
        index = where.flatten().nonzero().squeeze(-1)
        x, mixed = (t.flatten(0, 1).index_select(0, index) for t in (x, mixed))
        asked_too = None if asked is None else asked.flatten()[index]
        some = self._predict(self.blocks[-1].finish(x, mixed), level.flatten()[index], asked_too)
        n_tokens, n_classes = where.numel(), self.spec.n_classes
        levels = some.level.new_zeros(n_tokens).index_copy(0, index, some.level)
        if asked is not None:
            rows = (asked.flatten().cumsum(0) - 1)[index[asked_too]]  # of the retrieval tokens that read
            logits = some.logits.new_zeros(int(asked.sum()), n_classes).index_copy(0, rows, some.logits)
            return Predictions(level=levels.view_as(level), logits=logits)
        logits = some.logits.new_zeros(n_tokens, n_classes).index_copy(0, index, some.logits)
        return Predictions(level=levels.view_as(level), logits=logits.view(*where.shape, n_classes))
