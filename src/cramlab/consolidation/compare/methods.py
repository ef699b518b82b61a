"""Consolidation, its oracle and its baselines by name, each ready to measure documents.

Every method skips some share of the far reads. `Comparison.entries` lists them; thresholds are those of the validation
documents everywhere.

Source: ours.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cramlab.auditing.regression import LinearProbe
from cramlab.auditing.resume import Stages
from cramlab.consolidation.calibration import Calibration
from cramlab.consolidation.candidates import learn
from cramlab.consolidation.compare import sublayers
from cramlab.consolidation.learn.closed_form import Learned, Learner, set_gate
from cramlab.consolidation.learn.gradients import distilled
from cramlab.consolidation.learn.lora import Weights, lora
from cramlab.consolidation.learn.recovery import recovered
from cramlab.consolidation.measure import DocumentLoss, measured
from cramlab.consolidation.rules import baselines
from cramlab.consolidation.rules.learned import at_threshold
from cramlab.consolidation.setting import CLOSED_FORM, END, LOCAL, LORA, ROUTER_ONLY, SAVED, Setting

Measure = Callable[[Tensor], DocumentLoss]

_FRACS = (0.5, 0.75, 0.9, 0.92, 1.0)  # shares of far reads that consolidation itself is measured at
_COMPARED = (0.75, 0.9)  # shares that the other skipping rules are measured at, and that LoRA is trained for
_DROPPED = (0.25, 0.5, 0.75)  # shares of the sub-layers that are replaced


class Entry(NamedTuple):
    """One method at one share of skipped far reads.

    Attributes:
        rule: name of the method.
        asked: share of the far reads that it is to skip.
        make: prepares the method; what it returns measures a document (T,).
    """

    rule: str
    asked: float
    make: Callable[[], Measure]


@dataclass(frozen=True)
class Extras:
    """Methods that are compared only when they get gradient steps.

    Attributes:
        router_steps: number of gradient steps of gates without adapters; 0: not compared.
        lora_steps: number of gradient steps of light recovery by LoRA; 0: not compared.
        lora_rank: rank of the LoRA.
    """

    router_steps: int = 0
    lora_steps: int = 0
    lora_rank: int = 8


class Comparison:
    """All methods on one model; each is prepared only when it is measured.

    Args:
        setting: model, sites, config, documents and stages.
        extras: methods that are optional.
        saved: record of a folder, and what was learned for it; None: everything is learned here.
    """

    def __init__(
        self, setting: Setting, extras: Extras | None = None, saved: tuple[dict[str, Any], Learned] | None = None
    ) -> None:
        self.setting, self.model, self.sites, self.config = setting, setting.model, setting.sites, setting.config
        self.extras, self.near = extras or Extras(), (self.config.window, self.config.n_sinks)
        self.from_folder = saved is not None
        if saved is not None:
            record, self.learned = saved
            self.gradients, self.chosen, self.candidates = record["gradients"], SAVED, {SAVED: self.learned}
        else:
            found = learn(setting)
            self.gradients, self.chosen, self.candidates = found.described(), found.chosen, dict(found.learned)
            self.learned = self.candidates[self.chosen]
        # Importances and the oracle's thresholds are estimated on a few documents.
        self.few = dataclasses.replace(
            setting, parts={"validation": setting.parts["validation"][:3]}, stages=Stages(None, "", None)
        )
        self.few_documents = self.few.parts["validation"]
        self._lora: Weights | None = None

    def entries(self, *, elsewhere: bool) -> Iterator[Entry]:
        """All methods, in the order in which they are measured.

        Args:
            elsewhere: whether documents are of another length or text than those that were learned from; methods that
                show how consolidation came about are then left out.
        """
        for frac in _FRACS:
            yield Entry("gate", frac, functools.partial(self.gate, self.chosen, frac))
        yield Entry("window", 1.0, self.window)
        for frac in _COMPARED:
            yield Entry("layers", frac, functools.partial(self.layers, frac))
            yield Entry("heads", frac, functools.partial(self.heads, frac))
            yield Entry("random", frac, functools.partial(self.random, frac))
            yield Entry("oracle", frac, functools.partial(self.oracle, frac))
            if self.extras.router_steps:
                yield Entry("router only", frac, functools.partial(self.router_only, frac))
            if self.extras.lora_steps:
                yield Entry(LORA, frac, functools.partial(self.gate, LORA, frac))
        for frac in _DROPPED:
            yield Entry("dropped", frac, functools.partial(self.dropped, frac, linear=False))
            yield Entry("linear", frac, functools.partial(self.dropped, frac, linear=True))
        if elsewhere or self.from_folder:
            return
        for name in (CLOSED_FORM, LOCAL, END):
            if name in self.candidates and name != self.chosen:
                for frac in _COMPARED:
                    yield Entry(name, frac, functools.partial(self.gate, name, frac))
        yield Entry("benefit gate", 0.75, functools.partial(self.benefit, 0.75))
        yield Entry("gate, no adapters", 0.75, functools.partial(self.without_adapters, 0.75))

    def measure(self, entry: Entry, documents: list[Tensor]) -> list[DocumentLoss]:
        """Prepares a method and measures it on documents (T,); with LoRA the backbone is another one meanwhile."""
        with self._recovered() if entry.rule == LORA else contextlib.nullcontext():
            measure = entry.make()
            return [measure(tokens) for tokens in documents]

    def _recovered(self) -> contextlib.AbstractContextManager[Any]:
        """While open, the backbone has LoRA; it is learned at the first call."""
        extras = self.extras
        if self._lora is None:
            thresholds = [self._threshold(self.chosen, frac) for frac in _COMPARED]
            with torch.enable_grad():
                self._lora, losses = recovered(
                    self.setting, self.learned, thresholds, rank=extras.lora_rank, n_steps=extras.lora_steps
                )
            self.candidates[LORA] = self.learned
            self.gradients["losses"][LORA] = [float(part.mean()) for part in torch.tensor(losses).chunk(20)]
        return lora(self.model, extras.lora_rank, self.config.seed, self._lora)

    def _with_patches(self, layers: baselines.Layers) -> Measure:
        return lambda tokens: measured(self.model, tokens, layers)

    def _threshold(self, name: str, frac: float) -> float:
        """Threshold of a candidate's gates at a share, from validation documents."""
        run = Calibration(self.setting, self.candidates[name], name)
        return run.thresholds()[self.config.skipped_fracs.index(frac)]

    def gate(self, name: str, frac: float) -> Measure:
        """The gates and adapters of a candidate."""
        return self._with_patches(at_threshold(self.candidates[name].layers, self._threshold(name, frac)))

    def window(self) -> Measure:
        """No far read in any layer, and no adapters."""
        return self._with_patches(baselines.static_window(self.sites, *self.near))

    def random(self, frac: float) -> Measure:
        """The learned adapters, with readers drawn at random."""
        return self._with_patches(baselines.by_chance(self.learned.layers, frac, self.config.seed))

    def router_only(self, frac: float) -> Measure:
        """Gates learned without adapters."""
        if ROUTER_ONLY not in self.candidates:
            closed_form, n_steps = self.candidates[CLOSED_FORM], self.extras.router_steps
            self.candidates[ROUTER_ONLY] = distilled(self.setting, closed_form, ROUTER_ONLY, n_steps)
        return self.gate(ROUTER_ONLY, frac)

    def without_adapters(self, frac: float) -> Measure:
        """The learned gates; tokens that do not read get the window alone."""
        layers = copy.deepcopy(self.learned.layers)
        for layer in layers.values():
            answers = [layer.constant] if layer.up is None else [layer.up.weight, layer.up.bias]
            for parameter in answers:
                assert parameter is not None
                parameter.data.zero_()
        return self._with_patches(at_threshold(layers, self._threshold(self.chosen, frac)))

    def benefit(self, frac: float) -> Measure:
        """Linear gates that regress the counterfactual benefit itself, with their own threshold."""
        closed_form = self.candidates[CLOSED_FORM]
        layers = copy.deepcopy(closed_form.layers)
        for site, probe in zip(self.sites, closed_form.benefit_gates, strict=True):
            set_gate(layers[site.layer], probe)
        run = Calibration(self.few, dataclasses.replace(closed_form, layers=layers), "few")
        return self._with_patches(at_threshold(layers, run.thresholds()[self.config.skipped_fracs.index(frac)]))

    def oracle(self, frac: float) -> Measure:
        """Reads chosen by the true error of every skip."""
        known = self.sites, self.learned.layers, self.learned.sensitivity
        threshold = baselines.oracle_threshold(self.model, *known, self.few_documents, frac)
        return self._with_patches(baselines.oracle(*known, threshold))

    def layers(self, frac: float) -> Measure:
        """No far reads in the layers where they are worth least, by sensitivity times the adapter's error."""
        worth = torch.tensor(self.learned.sensitivity) * self._errors
        which = worth.argsort()[: round(frac * len(self.sites))].tolist()
        return self._with_patches(baselines.some_layers(self.learned.layers, [self.sites[i].layer for i in which]))

    def heads(self, frac: float) -> Measure:
        """No far reads in the heads where they are worth least."""
        return self._with_patches(baselines.static_heads(self.sites, self._head_importance, frac, *self.near))

    def dropped(self, frac: float, *, linear: bool) -> Measure:
        """The least important attention sub-layers replaced by nothing, or by a linear map."""
        which = self._cosine_importance.argsort()[: round(frac * len(self.sites))].tolist()
        instead = self._linear_maps if linear else None
        return lambda tokens: sublayers.measured_without(self.model, tokens, self.sites, which, instead)

    @functools.cached_property
    def _errors(self) -> Tensor:
        """Mean squared error of each layer's adapter, (L,)."""
        return Learner(self.few).errors("validation", self.learned.layers).mean("error")

    @functools.cached_property
    def _head_importance(self) -> Tensor:
        sensitivity = self.learned.sensitivity
        return baselines.head_importance(self.model, self.sites, sensitivity, self.few_documents, *self.near)

    @functools.cached_property
    def _cosine_importance(self) -> Tensor:
        return sublayers.cosine_importance(self.model, self.sites, self.few_documents)

    @functools.cached_property
    def _linear_maps(self) -> list[LinearProbe]:
        learner = Learner(self.setting)
        fit, held_out = (learner.moments(part) for part in ("fit", "validation"))
        return sublayers.linear_maps(self.sites, fit.moments, held_out.moments, self.config.strengths)
