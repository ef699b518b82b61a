"""Adapters and gates learned by gradients; the backbone is frozen and stays as it is.

Two stages. *Local*: each layer's adapter learns what the far read adds, its gate the log of the error that is left, on
the states of the original model. *End*: the model as it will run, reads drawn by the gates with a little chance, learns
to say what the original says.

A read is a yes or no, which has no gradient. One backward pass gives, for every token of every layer, by how much the
loss would fall if it read a little more: its counterfactual benefit, to first order. The gate then climbs
`sum of chance to read x (benefit - price)`. Shares of skipped reads are held by thresholds, running quantiles of the
scores; the price that goes with a share is the mean benefit of the tokens at its threshold, which is the multiplier of
that constraint. So one gate learns an order of tokens that serves all shares.

Source: ours; drawn reads after the binary concrete distribution (Maddison et al. 2017).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cramlab.auditing.resume import Stages
from cramlab.consolidation.attention import ConsolidatedAttention
from cramlab.consolidation.closed_form import Learned
from cramlab.consolidation.config import RetrofitConfig
from cramlab.consolidation.install import patched
from cramlab.consolidation.observe import Look, added_by_far, observed
from cramlab.consolidation.patch import Decision, Seen
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import AttentionSite, base_model

_LEAST_ERROR = 1e-12
_TOKENS_AT_ONCE = 1024  # whose logits are held in memory
_LAST_TEMPERATURE = 0.2  # of the first
_WARM_UP = 0.1  # of all steps
_UP_RATE = 4.0  # times the learning rate: maps up take in few numbers (after LoRA+, Hayou et al. 2024)
_ANSWERS = ("up.", "constant")
_THRESHOLD_RATE = 0.2  # by which a running quantile follows the latest
MOST_GRADIENT = 1.0
_SOURCES = 2  # of contexts, in turn: the text itself, and further text or, without any, the text itself again


class Drawn(NamedTuple):
    """The reads of one layer on one batch.

    Attributes:
        score: the gate's, (B, T); its gradient reaches the gate alone.
        noise: logistic, (B, T).
        reads: 0 or 1, (B, T); asks for a gradient.
        far: tokens that have something far to read, bool (B, T).
    """

    score: Tensor
    noise: Tensor
    reads: Tensor
    far: Tensor


def with_units(
    sites: Sequence[AttentionSite], layers: Mapping[int, ConsolidatedAttention], units: int, seed: int
) -> dict[int, ConsolidatedAttention]:
    """The same layers with units that say nothing yet: random maps down, zeros up and in the gate."""
    grown = {}
    for site in sites:
        old = layers[site.layer]
        new = ConsolidatedAttention.beside(
            site, rank=old.rank, units=units, window=old.window, n_sinks=old.n_sinks
        ).requires_grad_(False)
        new.shift.copy_(old.shift)
        new.scale.copy_(old.scale)
        n_features = len(old.shift)
        if new.down is not None and new.up is not None:
            generator = torch.Generator().manual_seed(seed * 1000 + site.layer)
            new.down.weight[old.rank :] = torch.randn(units, n_features, generator=generator).to(
                new.down.weight
            ) / math.sqrt(n_features)
            if old.down is not None and old.up is not None:
                new.down.weight[: old.rank] = old.down.weight
                new.down.bias[: old.rank] = old.down.bias
                new.up.weight[:, : old.rank] = old.up.weight
                new.up.bias.copy_(old.up.bias)
            elif old.constant is not None:
                new.up.bias.copy_(old.constant)
        elif new.constant is not None and old.constant is not None:
            new.constant.copy_(old.constant)
        new.gate.weight[:, :n_features] = old.gate.weight[:, :n_features]
        new.gate.bias.copy_(old.gate.bias)
        grown[site.layer] = new
    return grown


def rounded(layers: Mapping[int, ConsolidatedAttention]) -> None:
    """Rounds weights to what the folder keeps of them."""
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.half().to(parameter.dtype)


class GradientStage:
    """Learns by gradient steps; a stage of `Stages` saves and continues it.

    Attributes:
        parameters: that learn.
        optimizer: theirs.
        thresholds: of the gates, one for each share of skipped reads.
        history: a row a step, the loss first.
    """

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    thresholds: Tensor
    history: Tensor

    def state(self) -> dict[str, Any]:
        """What `load` takes back."""
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict(),
                "thresholds": self.thresholds, "history": self.history}  # fmt: skip

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.thresholds.copy_(state["thresholds"])
        self.history.copy_(state["history"])


class Distiller(GradientStage):
    """Learns the weights of layers in place.

    Args:
        model: the original, without a patch.
        sites: to be consolidated.
        layers: by layer; see `with_units`.
        sensitivity: nats per squared error, by site.
        config: sizes and choices.
        n_steps: of the stage.
        router_only: adapters stay as they are, gates alone learn.

    Adapters' maps up learn at four times the rate, in units of their answers' size.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        layers: Mapping[int, ConsolidatedAttention],
        sensitivity: Sequence[float],
        config: RetrofitConfig,
        n_steps: int,
        *,
        router_only: bool = False,
    ) -> None:
        self.model, self.sites, self.layers, self.config = model, sites, layers, config
        self.sensitivity, self.n_steps, self.router_only = sensitivity, n_steps, router_only
        self.device = next(model.parameters()).device
        groups: list[dict[str, Any]] = []
        for layer in layers.values():
            answers = [p for name, p in layer.named_parameters() if name.startswith(_ANSWERS)]
            others = [p for name, p in layer.named_parameters() if not name.startswith(_ANSWERS)]
            groups.append({"params": others, "times": 1.0})
            if not router_only:
                groups.append({"params": answers, "times": _UP_RATE * _size(answers)})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.99))
        self.thresholds = torch.full((len(config.learning_fracs),), torch.nan, device=self.device)
        # A row a step: loss, then the mean price of each share.
        self.history = torch.full((n_steps, 1 + len(config.learning_fracs)), torch.nan, dtype=torch.float64)

    def local_step(self, step: int, tokens: Tensor) -> None:
        """One step of every layer on its own error; tokens (B, T)."""
        losses: list[Tensor] = []

        def look(i: int, seen: Seen) -> None:
            layer, far = self.layers[self.sites[i].layer], seen.far
            with torch.enable_grad():
                x, code = layer.inner(seen.features[far])
                added = added_by_far(self.sites[i], seen.full[far], seen.near[far])
                error = (added - layer.answer(code)).square().sum(-1)
                nats = (error.detach().clamp(min=_LEAST_ERROR) * self.sensitivity[i]).log()
                share = error.mean() / added.square().sum(-1).mean().clamp(min=_LEAST_ERROR)
                loss = share + (layer.score(x, code) - nats).square().mean()
                loss.backward()
            losses.append(share.detach().to(self.device))

        with self._learning(step):
            with torch.no_grad(), self._observing(look):
                base_model(self.model)(input_ids=tokens, use_cache=False)
            self.history[step, 0] = float(torch.stack(losses).mean())

    def end_step(self, step: int, tokens: Tensor) -> None:
        """One step on the answer of the whole model; tokens (B, T)."""
        index = step * len(tokens) + torch.arange(len(tokens), device=self.device)
        share = index // _SOURCES % len(self.config.learning_fracs)  # every source meets every share
        if bool(self.thresholds.isnan().any()):
            self.thresholds.copy_(self._first_thresholds(tokens))
        temperature = self.config.temperature * (1 - (1 - _LAST_TEMPERATURE) * step / self.n_steps)
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + step)
        with self._learning(step):
            with half_precision(self.device), torch.enable_grad():
                hidden, decisions = rehearse(
                    self.model,
                    self.sites,
                    self.layers,
                    self.config,
                    tokens,
                    self.thresholds[share],
                    temperature,
                    generator,
                )
                loss = end_loss(self.model, self.config.end_loss, hidden, tokens)
            loss.backward()
            self.history[step, 0] = float(loss.detach())
            self._reward(step, decisions, share, temperature)

    def _reward(self, step: int, decisions: list[Drawn], share: Tensor, temperature: float) -> None:
        """Gradients of the gates, prices and thresholds, after the backward pass of the loss."""
        n_tokens = decisions[0].reads.numel()
        gradients = [d.reads.grad for d in decisions]
        benefit = torch.stack([torch.zeros_like(d.reads) if g is None else -g * n_tokens
                               for d, g in zip(decisions, gradients, strict=True)])  # fmt: skip
        far = torch.stack([d.far for d in decisions])
        with torch.enable_grad():
            score = torch.stack([d.score.float() for d in decisions])  # (L, B, T)
            chance = torch.sigmoid((score - self.thresholds[share][:, None]) / temperature)
            slope = (chance * (1 - chance) * far).detach()
            price = torch.zeros_like(share, dtype=torch.float32)
            drawn = score.detach() + temperature * torch.stack([d.noise.float() for d in decisions])
            for k, frac in enumerate(self.config.learning_fracs):
                mine = share == k
                if not bool(mine.any()):
                    continue
                weight = slope[:, mine]
                price[mine] = (weight * benefit[:, mine]).sum() / weight.sum().clamp(min=1e-12)
                self.history[step, 1 + k] = float(price[mine][0])
                latest = _quantile(drawn[:, mine][far[:, mine]], frac)
                self.thresholds[k] += _THRESHOLD_RATE * (latest - self.thresholds[k])
            gain = chance * (benefit - price[:, None]) * far
            (-gain.sum() / n_tokens).backward()

    @torch.no_grad()
    def _first_thresholds(self, tokens: Tensor) -> Tensor:
        """Quantiles of the scores on the states of the original model."""
        scores: list[Tensor] = []

        def look(i: int, seen: Seen) -> None:
            found = self.layers[self.sites[i].layer].scores(seen.features)
            scores.append(found[seen.far].float().to(self.device))

        with half_precision(self.device), self._observing(look):
            base_model(self.model)(input_ids=tokens, use_cache=False)
        return torch.stack([_quantile(torch.cat(scores), frac) for frac in self.config.learning_fracs])

    def _observing(self, look: Look) -> Any:
        return patched(self.model, observed(self.sites, self.config.window, self.config.n_sinks, look))

    def _learning(self, step: int) -> Any:
        return _Step(self, step)


def rehearse(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    layers: Mapping[int, ConsolidatedAttention],
    config: RetrofitConfig,
    tokens: Tensor,
    thresholds: Tensor,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Drawn]]:
    """The model as it will run on a batch, with reads drawn by the gates, or decided by them.

    Args:
        model: without a patch.
        sites: to be consolidated.
        layers: by layer.
        config: sizes and choices.
        tokens: (B, T).
        thresholds: of each context, (B,).
        temperature: of the noise on the scores.
        generator: of the noise; None: without, as at inference.

    Returns:
        The last hidden states (B, T, D), and what each site decided.
    """
    drawn: list[Drawn] = []

    def look(i: int, seen: Seen) -> Decision:
        layer = layers[sites[i].layer]
        with torch.autocast(tokens.device.type, enabled=False):
            answer = layer.adapt(seen.features)
            score = layer.scores(seen.features.detach())
        noise = torch.zeros_like(score)
        if generator is not None:
            chance = torch.rand(score.shape, generator=generator, device=score.device)
            noise = chance.clamp(1e-6, 1 - 1e-6).logit().to(score)
        reads = score.detach() + temperature * noise > thresholds.to(score)[:, None]
        reads = (reads | ~seen.far).float().requires_grad_()
        drawn.append(Drawn(score, noise, reads, seen.far))
        return reads, answer

    with patched(model, observed(sites, config.window, config.n_sinks, look)):
        hidden = base_model(model)(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden, drawn


def end_loss(
    model: nn.Module, kind: str, hidden: Tensor, tokens: Tensor, original: AbstractContextManager | None = None
) -> Tensor:
    """What the model's answers lose, nats per token; logits are never all in memory.

    Args:
        model: without a patch.
        kind: see `RetrofitConfig.end_loss`.
        hidden: see `rehearse`.
        tokens: (B, T).
        original: open while the original is asked for its answers, where the model is not quite that.
    """
    if kind == "nats":
        return _by_parts(model, _nats, hidden[:, :-1], tokens[:, 1:])
    with torch.no_grad(), original or nullcontext():
        wanted = base_model(model)(input_ids=tokens, use_cache=False).last_hidden_state
    return _by_parts(model, _divergence, hidden, wanted)


def _by_parts(model: nn.Module, loss: Callable[..., Tensor], hidden: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of a loss that needs logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    flat, wanted = hidden.flatten(0, 1), wanted.flatten(0, 1)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(loss, head, own.float(), other, use_reentrant=False)
            for own, other in zip(flat.split(_TOKENS_AT_ONCE), wanted.split(_TOKENS_AT_ONCE), strict=True)
        ]
    return torch.stack([part for part in parts if part is not None]).sum() / len(flat)


def course(step: int, n_steps: int) -> float:
    """Of the learning rate, relative to its highest: up over the first tenth of the steps, down along a cosine."""
    warm = max(1.0, _WARM_UP * n_steps)
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / n_steps)) / 2


def half_precision(device: torch.device) -> AbstractContextManager:
    """Half the bits on an accelerator while learning; everything is measured in full."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class _Step:
    """One step of the optimiser around a backward pass; the model's own weights ask for no gradient meanwhile."""

    def __init__(self, distiller: Distiller, step: int) -> None:
        self.distiller, self.step = distiller, step
        self.frozen = [p for p in distiller.model.parameters() if p.requires_grad]
        self.precision = torch.get_float32_matmul_precision()

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision("high")  # logits
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for parameter in self.distiller.parameters:
            parameter.requires_grad_(True)
            parameter.grad = None

    def __exit__(self, error: Any, *_: Any) -> None:
        torch.set_float32_matmul_precision(self.precision)
        own = self.distiller.parameters
        if error is None:
            for group in self.distiller.optimizer.param_groups:
                group["lr"] = (
                    group["times"] * self.distiller.config.learning_rate * course(self.step, self.distiller.n_steps)
                )
            torch.nn.utils.clip_grad_norm_(own, MOST_GRADIENT)
            self.distiller.optimizer.step()
        for parameter in own:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def distilled(
    model: nn.Module, sites: Sequence[AttentionSite], config: RetrofitConfig, parts: Mapping[str, Sequence[Tensor]],
    stages: Stages, learned: Learned, kind: str, n_steps: int,
) -> Learned:  # fmt: skip
    """One stage of gradient steps on copies of what has been learned.

    Args:
        model: the original, without a patch.
        sites: to be consolidated.
        config: sizes and choices.
        parts: "learning" and "further" contexts, see `text.parts_of`.
        stages: runs and saves.
        learned: to start from.
        kind: "local", "end" or "router-only": the last after mixture-of-depths, gates alone and no adapters.
        n_steps: gradient steps.

    Raises:
        ConsolidationError: when there is no context to learn from.
    """
    start = learned.layers
    if kind == "router-only":
        start = {site.layer: ConsolidatedAttention.beside(site, rank=0, window=config.window, n_sinks=config.n_sinks)
                 for site in sites}  # fmt: skip
        for i, layer in start.items():
            old = learned.layers[i]
            layer.shift.copy_(old.shift)
            layer.scale.copy_(old.scale)
            layer.gate.weight.data.copy_(old.gate.weight[:, : len(old.shift)])
            layer.gate.bias.data.copy_(old.gate.bias)
    layers = copy.deepcopy(start)
    if any(layer.units != config.units for layer in layers.values()):
        layers = with_units(sites, layers, config.units, config.seed)
    distiller = Distiller(model, sites, layers, learned.sensitivity, config, n_steps, router_only=kind == "router-only")
    take = distiller.local_step if kind == "local" else distiller.end_step

    take_steps(stages, kind, distiller, take, parts, config, n_steps, config.seed)
    rounded(layers)
    return dataclasses.replace(learned, layers=layers, history=distiller.history)


def take_steps(
    stages: Stages, kind: str, into: GradientStage, step: Callable[[int, Tensor], None],
    parts: Mapping[str, Sequence[Tensor]], config: RetrofitConfig, n_steps: int, seed: int,
) -> None:  # fmt: skip
    """Calls `step` with its number and a batch (B, T), `n_steps` times, as a stage of this name.

    Raises:
        ConsolidationError: when there is no context to learn from.
    """
    if not parts["learning"]:
        raise ConsolidationError("all documents are held out, none is left to learn from; give more text")

    def one(item: tuple[int, Tensor]) -> int:
        step(*item)
        return item[1].numel()

    drawn = list(enumerate(batches(parts, config.batch_contexts, n_steps, seed)))
    stages.run(kind, drawn, one, into, sum(tokens.numel() for _, tokens in drawn))


def batches(parts: Mapping[str, Sequence[Tensor]], size: int, n_steps: int, seed: int) -> Iterator[Tensor]:
    """Batches (B, T): every second context from further text if there is some; each text in a new order every round."""
    sources = [parts["learning"], parts["further"] or parts["learning"]]
    endless = [_shuffled(source, seed * 10 + i) for i, source in enumerate(sources)]
    for step in range(n_steps):
        yield torch.stack([next(endless[(step * size + i) % _SOURCES]) for i in range(size)])


def _shuffled(contexts: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(contexts), generator=generator).tolist():
            yield contexts[i]


def _divergence(head: nn.Module, own: Tensor, wanted: Tensor) -> Tensor:
    """Sum over tokens (N, D) of the divergence of the original's next token from ours, nats."""
    ours, theirs = head(own).float().log_softmax(-1), head(wanted.float()).float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _nats(head: nn.Module, own: Tensor, wanted: Tensor) -> Tensor:
    """Sum of the losses on the tokens (N,) themselves."""
    return F.cross_entropy(head(own).float(), wanted, reduction="sum")


def _size(answers: Sequence[Tensor]) -> float:
    """Of a layer's answers: what its far reads add differs a thousandfold from layer to layer, and Adam does not know.

    The root mean square over the answer's width, for numbers of unit variance.
    """
    square = sum(float(part.double().square().sum()) for part in answers)
    return math.sqrt(square / len(answers[-1])) if square else 1.0


def _quantile(values: Tensor, frac: float) -> Tensor:
    """Of any number of values (N,)."""
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, int(frac * len(ordered)))]
