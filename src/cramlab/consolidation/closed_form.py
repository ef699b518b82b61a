"""From documents to adapters, gates and what a read is worth; the backbone is never changed.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.auditing.regression import LinearProbe, Moments
from cramlab.auditing.resume import Stages
from cramlab.consolidation.attention import Affine, ConsolidatedAttention
from cramlab.consolidation.config import RetrofitConfig
from cramlab.consolidation.install import patched
from cramlab.consolidation.observe import added_by_far, observed
from cramlab.consolidation.patch import Seen
from cramlab.consolidation.ridge import Adapter, choose_ranks, fit_adapter, fit_gate, sensitivities, unit_scale
from cramlab.consolidation.rules import WindowOnly
from cramlab.hf.attention_sites import AttentionSite, base_model

_LEAST_ERROR = 1e-12


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats of each next token of one context (T,), (T - 1,)."""
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    labels = tokens[1:].to(logits.device)
    parts = [F.cross_entropy(part.float(), wanted, reduction="none")
             for part, wanted in zip(logits.split(256), labels.split(256), strict=True)]  # fmt: skip
    return torch.cat(parts)


class LayerSums:
    """Sums over tokens for every layer; what `Stages` saves.

    Attributes:
        device: of the moments; None: the CPU.
        moments: of features and what is to be predicted from them, one a layer.
        scalars: further sums by name, (L,) each.
    """

    def __init__(
        self, n_layers: int, d_in: int, d_out: int, scalars: Sequence[str] = (), device: torch.device | None = None
    ) -> None:
        self.device = device
        self.moments = [Moments(d_in, d_out, device=device) for _ in range(n_layers)]
        self.scalars = {name: torch.zeros(n_layers, dtype=torch.float64) for name in scalars}

    def mean(self, name: str) -> Tensor:
        """A scalar per token that entered the moments, (L,)."""
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
    """All that is learned before any threshold is chosen.

    Attributes:
        layers: adapters and gates, by layer; gates score the log of the nats that a read is expected to save.
        benefit_gates: for comparison: gates that regress a token's counterfactual benefit itself, in nats.
        ranks: of the adapters.
        strengths: ridge strengths of the adapters and the gates.
        sensitivity: nats per squared error, by layer.
        explained: share of the far read's squared length that the linear adapter predicts on held-out tokens, by layer.
        history: loss and prices of each gradient step, see `Distiller`; None: there were none.
    """

    layers: dict[int, ConsolidatedAttention]
    benefit_gates: list[LinearProbe]
    ranks: list[int]
    strengths: list[tuple[float, float]]
    sensitivity: list[float]
    explained: list[float]
    history: Tensor | None = None


class Learner:
    """Runs the stages on the parts of the text.

    Args:
        model: the original, without a patch.
        sites: to be consolidated.
        config: sizes and choices.
        parts: documents, (T,) each, by name of the part.
        stages: runs and saves.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        config: RetrofitConfig,
        parts: dict[str, list[Tensor]],
        stages: Stages,
    ) -> None:
        self.model, self.sites, self.config, self.parts, self.stages = model, sites, config, parts, stages
        site = sites[0]
        self.n_features = ConsolidatedAttention.n_features(site.d_model, site.d_heads, site.n_heads)
        self.device = next(model.parameters()).device

    def learn(self) -> Learned:
        """All stages in turn."""
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
        gate, gate_held_out = self.errors("gate", layers), self.errors("validation-gate", layers)
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
        """From the sums of `_sensitivity`; a layer seen in one half of the documents only never asks to read."""
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
            # Numbers of unit variance in between, so that one learning rate suits the maps before and after.
            xx, _ = fit.about(fit.x / fit.n, fit.y / fit.n)
            deviation = ((down * (xx @ down)).sum(dim=0) / fit.n).clamp(min=1e-12).sqrt()
            _copy(layer.down, *_standardised(layer, down / deviation, adapter.down.bias[:rank] / deviation))
            _copy(layer.up, deviation[:, None] * adapter.up[:rank], adapter.mean)
        return layer.requires_grad_(False)

    def _sample(self, seen: Seen, document: int) -> Tensor:
        """Places of the tokens of this document that enter the statistics: the same for every layer."""
        far = seen.far[0].nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + document)
        order = torch.randperm(len(far), generator=generator)[: self.config.tokens_per_document]
        return far[order.sort().values.to(far.device)]

    def _watch(self, tokens: Tensor, document: int, look: Callable[[int, Seen, Tensor], None]) -> None:
        """One pass of the original model over one document; `look(i, seen, places)` for each site."""

        def sampled(i: int, seen: Seen) -> None:
            look(i, seen, self._sample(seen, document))

        with patched(self.model, observed(self.sites, self.config.window, self.config.n_sinks, sampled)):
            base_model(self.model)(input_ids=tokens[None], use_cache=False)

    def _run(self, stage: str, part: str, into: LayerSums, step: Callable[[Tensor, int], None]) -> LayerSums:
        documents = self.parts[part]

        def one(item: tuple[int, Tensor]) -> int:
            step(item[1], item[0])
            return len(item[1])

        n_tokens = sum(len(document) for document in documents)
        self.stages.run(stage, list(enumerate(documents)), one, into, n_tokens)
        return into

    def moments(self, part: str) -> LayerSums:
        """Features and what the far read adds."""
        sums = LayerSums(len(self.sites), self.n_features, self.sites[0].d_model, ["power"], self.device)

        def look(i: int, seen: Seen, places: Tensor) -> None:
            added = added_by_far(self.sites[i], seen.full[0, places], seen.near[0, places])
            sums.moments[i].update(seen.features[0, places].to(self.device), added.to(self.device))
            sums.scalars["power"][i] += float(added.double().square().sum())

        return self._run(part, part, sums, lambda tokens, document: self._watch(tokens, document, look))

    def errors(self, stage: str, layers: dict[int, ConsolidatedAttention]) -> LayerSums:
        """Features and the log of the squared error that the adapter leaves."""
        part = stage.removesuffix("-gate") if stage != "gate" else stage
        sums = LayerSums(len(self.sites), self.n_features, 1, ["error"], self.device)

        def look(i: int, seen: Seen, places: Tensor) -> None:
            features = seen.features[0, places]
            added = added_by_far(self.sites[i], seen.full[0, places], seen.near[0, places])
            error = (added - layers[self.sites[i].layer].adapt(features)).double().square().sum(-1, keepdim=True)
            sums.moments[i].update(features.to(self.device), error.clamp(min=_LEAST_ERROR).log().to(self.device))
            sums.scalars["error"][i] += float(error.sum())

        return self._run(stage, part, sums, lambda tokens, document: self._watch(tokens, document, look))

    def _sensitivity(self) -> LayerSums:
        """What it costs when one layer alone goes without far reads: exact differences of two passes.

        Layers are drawn without replacement for each document, so every layer is as likely to be looked at.
        """
        n_layers = len(self.sites)
        # Moments of even documents come first, those of odd ones choose the strength.
        sums = LayerSums(2 * n_layers, self.n_features, 1, device=self.device)
        sums.scalars = {name: torch.zeros(n_layers, dtype=torch.float64) for name in ("increase", "error", "documents")}
        order = torch.randperm(n_layers, generator=torch.Generator().manual_seed(self.config.seed)).tolist()

        def step(tokens: Tensor, document: int) -> None:
            features: dict[int, tuple[Tensor, Tensor]] = {}

            def look(i: int, seen: Seen, places: Tensor) -> None:
                added = added_by_far(self.sites[i], seen.full[0], seen.near[0])[seen.far[0]]
                features[i] = seen.features[0, places], places
                errors[i] = float(added.double().square().sum(-1).mean())

            errors: dict[int, float] = {}
            self._watch(tokens, document, look)
            base = token_losses(self.model, tokens)
            k = self.config.layers_per_document
            for i in {order[j % n_layers] for j in range(document * k, (document + 1) * k)}:
                without = WindowOnly(window=self.config.window, n_sinks=self.config.n_sinks)
                with patched(self.model, {self.sites[i].layer: without}):
                    benefit = token_losses(self.model, tokens) - base
                x, places = features[i]
                which = i + n_layers * (document // -(-n_layers // k) % 2)
                x, places = x.to(self.device), places.to(self.device)
                inside = places < len(benefit)
                sums.moments[which].update(x[inside], benefit.to(self.device)[places[inside]][:, None])
                sums.scalars["increase"][i] += float(benefit.double().mean())
                sums.scalars["error"][i] += errors[i]
                sums.scalars["documents"][i] += 1

        return self._run("sensitivity", "sensitivity", sums, step)


def set_gate(layer: ConsolidatedAttention, probe: LinearProbe, offset: float = 0.0) -> None:
    """Makes a probe of raw features (F, 1), plus an offset, the gate of a layer; its units have no say then."""
    weight, bias = _standardised(layer, probe.weight, probe.bias)
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[:, : len(weight)] = weight.T
    layer.gate.bias.data.copy_(bias + offset)


def _standardised(layer: ConsolidatedAttention, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A map of raw features as one of the layer's standardised ones; a feature that never varied has no weight."""
    scale, shift = layer.scale.double()[:, None], layer.shift.double()
    weight = weight.double()
    return torch.where(scale > 0, weight / scale.clamp(min=1e-30), 0.0), bias.double() + shift @ weight


def _copy(linear: Affine, weight: Tensor, bias: Tensor) -> None:
    """`x @ weight + bias` into an affine map."""
    linear.weight.data.copy_(weight.T)
    linear.bias.data.copy_(bias)
