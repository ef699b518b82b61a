"""Gates and adapters learned by gradient steps; the backbone is frozen.

Two stages. *Local*: on the states of the original model, each layer's adapter learns what the far read adds, its gate
the log of the remaining error. *End*: the model as it will run, with reads drawn at random by the gates, learns the
original's output.

A read is a binary decision, which has no gradient. One backward pass gives, for every token of every layer, how much
the loss falls if it reads a little more: its counterfactual benefit to first order. The gate then ascends
`sum of P(read) x (benefit - price)`. Shares of skipped reads are held by thresholds, which are running quantiles of the
scores; the price of a share is the mean benefit of the tokens at its threshold, which is the multiplier of that
constraint. So one gate learns an order of tokens that serves all shares.

Source: ours.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.learn.rehearsal import Drawn, end_loss, rehearse
from cramlab.consolidation.learn.steps import (
    MOST_GRADIENT,
    N_SOURCES,
    GradientStage,
    half_precision,
    schedule,
    take_steps,
)
from cramlab.consolidation.patch.far_reads import Seen
from cramlab.consolidation.patch.observe import added_by_far
from cramlab.consolidation.rules.learned import ConsolidatedAttention, rounded
from cramlab.consolidation.setting import LOCAL, ROUTER_ONLY, Setting
from cramlab.hf.attention_sites import AttentionSite

_LEAST_ERROR = 1e-12
_LAST_TEMPERATURE = 0.2  # as a share of the first
_UP_RATE = 4.0  # learning rate of maps up relative to the others, as they take few numbers (LoRA+, Hayou et al. 2024)
_OFFSET_RATE = 10.0  # learning rate of offsets, each of which few tokens see, relative to that of the gate's weights
_ANSWERS = ("up.", "constant")
_THRESHOLD_RATE = 0.2  # step with which a running quantile follows the latest batch


def with_units(
    sites: Sequence[AttentionSite], layers: Mapping[int, ConsolidatedAttention], units: int, seed: int,
    n_offsets: int = 0,
) -> dict[int, ConsolidatedAttention]:  # fmt: skip
    """The layers with GELU units and offsets that change no output yet: random maps down, zeros elsewhere."""
    grown = {}
    for site in sites:
        old = layers[site.layer]
        new = ConsolidatedAttention.beside(
            site, rank=old.rank, units=units, window=old.window, n_sinks=old.n_sinks, n_offsets=n_offsets
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


class Distiller(GradientStage):
    """Learns the weights of layers in place.

    Adapters' maps up learn at four times the rate, in units of the size of their outputs.

    Args:
        setting: model, sites and config.
        layers: gates and adapters by index of the block; see `with_units`.
        sensitivity: loss per squared error of each site, nats.
        n_steps: number of steps of the stage.
        router_only: whether only gates learn and adapters stay as they are.
    """

    def __init__(
        self,
        setting: Setting,
        layers: Mapping[int, ConsolidatedAttention],
        sensitivity: Sequence[float],
        n_steps: int,
        *,
        router_only: bool = False,
    ) -> None:
        self.setting, self.sites, self.layers, self.config = setting, setting.sites, layers, setting.config
        self.sensitivity, self.n_steps, self.router_only = sensitivity, n_steps, router_only
        self.device = setting.device
        groups: list[dict[str, Any]] = []
        for layer in layers.values():
            answers = [p for name, p in layer.named_parameters() if name.startswith(_ANSWERS)]
            others = [p for name, p in layer.named_parameters() if not name.startswith((*_ANSWERS, "offsets"))]
            groups.append({"params": others, "times": 1.0})
            if layer.offsets is not None:
                groups.append({"params": [layer.offsets], "times": _OFFSET_RATE})
            if not router_only:
                groups.append({"params": answers, "times": _UP_RATE * _size(answers)})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups, lr=self.config.learning_rate, betas=(0.9, 0.99))
        n_fracs = len(self.config.learning_fracs)
        self.thresholds = torch.full((n_fracs,), torch.nan, device=self.device)
        # One row a step: the loss, then the mean price of each share.
        self.history = torch.full((n_steps, 1 + n_fracs), torch.nan, dtype=torch.float64)

    def local_step(self, step: int, tokens: Tensor) -> None:
        """One step of every layer on its own error; tokens (B, T)."""
        losses: list[Tensor] = []

        def look(i: int, seen: Seen) -> None:
            layer, far = self.layers[self.sites[i].layer], seen.far
            with torch.enable_grad():
                x, code = layer.inner(seen.features[far])
                added = added_by_far(self.sites[i], seen, far)
                error = (added - layer.answer(code)).square().sum(-1)
                nats = (error.detach().clamp(min=_LEAST_ERROR) * self.sensitivity[i]).log()
                share = error.mean() / added.square().sum(-1).mean().clamp(min=_LEAST_ERROR)
                loss = share + (layer.score(x, code, seen.n_keys[far]) - nats).square().mean()
                loss.backward()
            losses.append(share.detach().to(self.device))

        with _Step(self, step):
            with torch.no_grad():
                self.setting.observe(tokens, look)
            self.history[step, 0] = float(torch.stack(losses).mean())

    def end_step(self, step: int, tokens: Tensor) -> None:
        """One step on the output of the whole model; tokens (B, T)."""
        index = step * len(tokens) + torch.arange(len(tokens), device=self.device)
        share = index // N_SOURCES % len(self.config.learning_fracs)  # every source of text meets every share
        if bool(self.thresholds.isnan().any()):
            self.thresholds.copy_(self._first_thresholds(tokens))
        temperature = self.config.temperature * (1 - (1 - _LAST_TEMPERATURE) * step / self.n_steps)
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + step)
        with _Step(self, step):
            with half_precision(self.device), torch.enable_grad():
                hidden, decisions = rehearse(
                    self.setting, self.layers, tokens, self.thresholds[share], temperature, generator
                )
                loss = end_loss(self.setting, hidden, tokens)
            loss.backward()
            self.history[step, 0] = float(loss.detach())
            self._reward(step, decisions, share, temperature)

    def _reward(self, step: int, decisions: list[Drawn], share: Tensor, temperature: float) -> None:
        """Adds the gates' gradients and updates prices and thresholds, after the backward pass of the loss."""
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
        """Quantiles of the scores on the states of the original model, one for each share."""
        scores: list[Tensor] = []

        def look(i: int, seen: Seen) -> None:
            layer = self.layers[self.sites[i].layer]
            scores.append(layer.scores(seen.features, seen.n_keys)[seen.far].float().to(self.device))

        with half_precision(self.device):
            self.setting.observe(tokens, look)
        return torch.stack([_quantile(torch.cat(scores), frac) for frac in self.config.learning_fracs])


class _Step:
    """One optimiser step around a backward pass, during which the model's own weights require no gradient."""

    def __init__(self, distiller: Distiller, step: int) -> None:
        self.distiller, self.step = distiller, step
        self.frozen = [p for p in distiller.setting.model.parameters() if p.requires_grad]
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
            rate = self.distiller.config.learning_rate * schedule(self.step, self.distiller.n_steps)
            for group in self.distiller.optimizer.param_groups:
                group["lr"] = group["times"] * rate
            torch.nn.utils.clip_grad_norm_(own, MOST_GRADIENT)
            self.distiller.optimizer.step()
        for parameter in own:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def distilled(setting: Setting, learned: Learned, stage: str, n_steps: int) -> Learned:
    """Runs one stage of gradient steps on copies of the layers that have been learned.

    Args:
        setting: model, sites, config, stages, and the contexts of "learning" and "further", see `documents.parts_of`.
        learned: what to start from.
        stage: "local", "end" or "router-only"; the last learns gates alone, without adapters (as mixture-of-depths).
        n_steps: number of gradient steps.

    Raises:
        ConsolidationError: when there is no context to learn from.
    """
    config, alone = setting.config, stage == ROUTER_ONLY
    layers = _gates_alone(setting, learned.layers) if alone else copy.deepcopy(learned.layers)
    if any((layer.units, layer.n_offsets) != (config.units, config.n_offsets) for layer in layers.values()):
        layers = with_units(setting.sites, layers, config.units, config.seed, config.n_offsets)
    distiller = Distiller(setting, layers, learned.sensitivity, n_steps, router_only=alone)
    take = distiller.local_step if stage == LOCAL else distiller.end_step
    take_steps(setting, stage, distiller, take, n_steps, config.seed)
    rounded(layers)
    return dataclasses.replace(learned, layers=layers, history=distiller.history)


def _gates_alone(setting: Setting, learned: Mapping[int, ConsolidatedAttention]) -> dict[int, ConsolidatedAttention]:
    """Layers with the linear gates of others and adapters whose output is zero."""
    near = {"window": setting.config.window, "n_sinks": setting.config.n_sinks}
    layers = {site.layer: ConsolidatedAttention.beside(site, rank=0, **near) for site in setting.sites}
    for i, layer in layers.items():
        old = learned[i]
        layer.shift.copy_(old.shift)
        layer.scale.copy_(old.scale)
        layer.gate.weight.data.copy_(old.gate.weight[:, : len(old.shift)])
        layer.gate.bias.data.copy_(old.gate.bias)
    return layers


def _size(answers: Sequence[Tensor]) -> float:
    """Root mean square of an adapter's output for a code of unit variance, from the parameters of its map up.

    It varies 1000-fold between layers, so it scales the learning rate, to which Adam alone does not adapt.
    """
    square = sum(float(part.double().square().sum()) for part in answers)
    return math.sqrt(square / len(answers[-1])) if square else 1.0


def _quantile(values: Tensor, frac: float) -> Tensor:
    """The quantile of values (N,) for any N."""
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, int(frac * len(ordered)))]
