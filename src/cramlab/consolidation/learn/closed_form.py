"""Fits adapters, gates and the value of a far read in closed form, from sums over documents, with a frozen backbone.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cramlab.auditing.regression import LinearProbe, Moments
from cramlab.consolidation.learn.ridge import Adapter, choose_ranks, fit_adapter, fit_gate, sensitivities, unit_scale
from cramlab.consolidation.measure import token_losses
from cramlab.consolidation.patch.far_reads import Seen
from cramlab.consolidation.patch.install import patched
from cramlab.consolidation.patch.observe import added_by_far
from cramlab.consolidation.rules.baselines import WindowOnly
from cramlab.consolidation.rules.learned import Affine, ConsolidatedAttention
from cramlab.consolidation.setting import Setting, StageName
from cramlab.hf.attention_sites import AttentionSite

_LEAST_ERROR = 1e-12


class LayerSums:
    """Sums over tokens for every layer; `Stages` saves and loads them.

    Attributes:
        device: device of the moments; None: the CPU.
        moments: moments of features and regression targets, one a layer.
        scalars: further sums by name, (L,) each.
    """

    def __init__(
        self, n_layers: int, d_in: int, d_out: int, scalars: Sequence[str] = (), device: torch.device | None = None
    ) -> None:
        self.device = device
        self.moments = [Moments(d_in, d_out, device=device) for _ in range(n_layers)]
        self.scalars = {name: torch.zeros(n_layers, dtype=torch.float64) for name in scalars}

    def mean(self, name: str) -> Tensor:
        """Mean of a scalar over the tokens that entered the moments, (L,)."""
        return self.scalars[name] / torch.stack([moments.n.cpu() for moments in self.moments])

    def state(self) -> dict[str, Any]:
        """What `load` takes back."""
        return {"moments": [moments.state() for moments in self.moments], "scalars": self.scalars}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            moments.load(saved)
        self.scalars = state["scalars"]


@dataclass(frozen=True)
class Learned:
    """All that is learned before a threshold is chosen.

    Attributes:
        layers: adapters and gates by index of the block; a gate predicts the log of the nats that a far read saves.
        benefit_gates: for comparison: gates that regress a token's counterfactual benefit itself, nats.
        ranks: rank of each adapter.
        strengths: ridge strengths of each adapter and gate.
        sensitivity: loss per squared error of each layer, nats.
        explained: share of the far read's squared length that the linear adapter predicts on held-out tokens, by layer.
        history: loss and prices of each gradient step, see `Distiller`; None: no step was made.
    """

    layers: dict[int, ConsolidatedAttention]
    benefit_gates: list[LinearProbe]
    ranks: list[int]
    strengths: list[tuple[float, float]]
    sensitivity: list[float]
    explained: list[float]
    history: Tensor | None = None


class Learner:
    """Learns in closed form.

    Args:
        setting: model, sites, config, documents and stages.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.sites, self.config = setting, setting.sites, setting.config
        site = self.sites[0]
        self.n_features = ConsolidatedAttention.n_features(site.d_model, site.d_heads, site.n_heads)
        self.device = setting.device

    def learn(self) -> Learned:
        """Runs all stages in turn."""
        fit, held_out = self.moments("fit"), self.moments("validation")
        sums = self._sensitivity()
        n_documents = sums.scalars["documents"]
        seen = n_documents.clamp(min=1)
        sensitivity = sensitivities(sums.scalars["increase"] / seen, sums.scalars["error"] / seen, n_documents)
        config = self.config
        adapters = [fit_adapter(f, h, config.strengths, config.max_rank)
                    for f, h in zip(fit.moments, held_out.moments, strict=True)]  # fmt: skip
        bytes_per_rank = 2 * (self.n_features + 1 + self.sites[0].d_model)
        ranks = choose_ranks([a.gains for a in adapters], sensitivity.tolist(), bytes_per_rank, config.adapter_bytes)
        layers = {
            site.layer: self._layer(site, adapter, rank, moments)
            for site, adapter, rank, moments in zip(self.sites, adapters, ranks, fit.moments, strict=True)
        }
        gate, gate_held_out = self.errors("gate", layers), self.errors("validation", layers)
        strengths = []
        for i, site in enumerate(self.sites):
            probe, strength = fit_gate(gate.moments[i], gate_held_out.moments[i], config.strengths)
            set_gate(layers[site.layer], probe, offset=float(sensitivity[i].log()))
            strengths.append((adapters[i].strength, strength))
        before, after = held_out.mean("power"), gate_held_out.mean("error")
        return Learned(
            layers=layers,
            benefit_gates=self._benefit_gates(sums),
            ranks=ranks,
            strengths=strengths,
            sensitivity=sensitivity.tolist(),
            explained=(1 - after / before).tolist(),
        )

    def _benefit_gates(self, sums: LayerSums) -> list[LinearProbe]:
        """Gates from the sums of `_sensitivity`; a layer seen in only one half of the documents never asks to read."""
        n_layers = len(self.sites)
        gates = []
        for fit, held_out in zip(sums.moments[:n_layers], sums.moments[n_layers:], strict=True):
            if fit.n and held_out.n:
                gates.append(fit_gate(fit, held_out, self.config.strengths)[0])
            else:
                zeros = torch.zeros(self.n_features + 1, 1, device=self.device)
                gates.append(LinearProbe(zeros[1:], zeros[0]))
        return gates

    def _layer(self, site: AttentionSite, adapter: Adapter, rank: int, fit: Moments) -> ConsolidatedAttention:
        config = self.config
        layer = ConsolidatedAttention.beside(site, rank=rank, window=config.window, n_sinks=config.n_sinks)
        layer.shift.copy_(fit.x / fit.n)
        layer.scale.copy_(unit_scale(fit))
        if layer.down is None or layer.up is None:
            assert layer.constant is not None
            layer.constant.data.copy_(adapter.mean)
        else:
            down = adapter.down.weight[:, :rank].double()
            # The code has unit variance, so that one learning rate suits the maps before and after it.
            xx, _ = fit.about(fit.x / fit.n, fit.y / fit.n)
            deviation = ((down * (xx @ down)).sum(dim=0) / fit.n).clamp(min=1e-12).sqrt()
            _copy(layer.down, *_standardised(layer, down / deviation, adapter.down.bias[:rank] / deviation))
            _copy(layer.up, deviation[:, None] * adapter.up[:rank], adapter.mean)
        return layer.requires_grad_(False)

    def _sample(self, seen: Seen, document: int) -> Tensor:
        """Positions of the tokens of a document that enter the statistics; they are the same for every layer."""
        far = seen.far[0].nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + document)
        order = torch.randperm(len(far), generator=generator)[: self.config.tokens_per_document]
        return far[order.sort().values.to(far.device)]

    def _observe(self, document: int, tokens: Tensor, look: Callable[[int, Seen, Tensor], None]) -> None:
        """Runs the original model on one document; calls `look(i, seen, positions)` for each site."""
        self.setting.observe(tokens[None], lambda i, seen: look(i, seen, self._sample(seen, document)))

    def _each(
        self, stage: str, part: str, into: LayerSums, look: Callable[[int, Seen, Tensor], None]
    ) -> LayerSums:  # fmt: skip
        """Observes every document of a part."""
        self.setting.each(stage, part, into, lambda document, tokens: self._observe(document, tokens, look))
        return into

    def moments(self, part: str) -> LayerSums:
        """Moments of features and of what the far read adds to the output, on the documents of a part."""
        sums = LayerSums(len(self.sites), self.n_features, self.sites[0].d_model, ["power"], self.device)

        def look(i: int, seen: Seen, places: Tensor) -> None:
            added = added_by_far(self.sites[i], seen, (0, places))
            sums.moments[i].update(seen.features[0, places].to(self.device), added.to(self.device))
            sums.scalars["power"][i] += float(added.double().square().sum())

        return self._each(StageName.moments(part), part, sums, look)

    def errors(self, part: str, layers: dict[int, ConsolidatedAttention]) -> LayerSums:
        """Moments of features and of the log of the adapter's squared error, on the documents of a part."""
        sums = LayerSums(len(self.sites), self.n_features, 1, ["error"], self.device)

        def look(i: int, seen: Seen, places: Tensor) -> None:
            features = seen.features[0, places]
            added = added_by_far(self.sites[i], seen, (0, places))
            error = (added - layers[self.sites[i].layer].adapt(features)).double().square().sum(-1, keepdim=True)
            sums.moments[i].update(features.to(self.device), error.clamp(min=_LEAST_ERROR).log().to(self.device))
            sums.scalars["error"][i] += float(error.sum())

        return self._each(StageName.errors(part), part, sums, look)

    def _sensitivity(self) -> LayerSums:
        """Exact loss increases when a single layer goes without far reads, from two passes each.

        Layers are drawn without replacement for each document, so all layers are seen about equally often.
        """
        n_layers = len(self.sites)
        # Moments of even documents come first; those of odd documents choose the strength.
        sums = LayerSums(2 * n_layers, self.n_features, 1, device=self.device)
        sums.scalars = {name: torch.zeros(n_layers, dtype=torch.float64) for name in ("increase", "error", "documents")}
        order = torch.randperm(n_layers, generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        model, k = self.setting.model, self.config.layers_per_document

        def step(document: int, tokens: Tensor) -> None:
            features: dict[int, tuple[Tensor, Tensor]] = {}
            errors: dict[int, float] = {}

            def look(i: int, seen: Seen, places: Tensor) -> None:
                added = added_by_far(self.sites[i], seen, 0)[seen.far[0]]
                features[i] = seen.features[0, places], places
                errors[i] = float(added.double().square().sum(-1).mean())

            self._observe(document, tokens, look)
            base = token_losses(model, tokens)
            for i in {order[j % n_layers] for j in range(document * k, (document + 1) * k)}:
                without = WindowOnly(window=self.config.window, n_sinks=self.config.n_sinks)
                with patched(model, {self.sites[i].layer: without}):
                    benefit = token_losses(model, tokens) - base
                x, places = (part.to(self.device) for part in features[i])
                which = i + n_layers * (document // -(-n_layers // k) % 2)
                inside = places < len(benefit)
                sums.moments[which].update(x[inside], benefit.to(self.device)[places[inside]][:, None])
                sums.scalars["increase"][i] += float(benefit.double().mean())
                sums.scalars["error"][i] += errors[i]
                sums.scalars["documents"][i] += 1

        self.setting.each(StageName.sensitivity, "sensitivity", sums, step)
        return sums


def set_gate(layer: ConsolidatedAttention, probe: LinearProbe, offset: float = 0.0) -> None:
    """Makes a probe of raw features (F, 1), plus an offset, the gate of a layer; GELU units get no weight in it."""
    weight, bias = _standardised(layer, probe.weight, probe.bias)
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[:, : len(weight)] = weight.T
    layer.gate.bias.data.copy_(bias + offset)


def _standardised(layer: ConsolidatedAttention, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A map of raw features as a map of the layer's standardised ones; a constant feature gets no weight."""
    scale, shift = layer.scale.double()[:, None], layer.shift.double()
    weight = weight.double()
    return torch.where(scale > 0, weight / scale.clamp(min=1e-30), 0.0), bias.double() + shift @ weight


def _copy(linear: Affine, weight: Tensor, bias: Tensor) -> None:
    """Copies `x @ weight + bias` into an affine map."""
    linear.weight.data.copy_(weight.T)
    linear.bias.data.copy_(bias)
