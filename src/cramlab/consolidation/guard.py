"""A guard of a consolidated model: it audits skipped reads in use, and goes back to safer thresholds on an alarm.

Two things are watched, each by `betting.EProcess` against what was promised:

- *documents*, where a pass holds one from its start with the logits of all its tokens: the increase of its loss over
  the original's, against the guarantee of the folder, in the guarantee's own unit;
- *tokens* that follow a cache, as in generation, where no loss is known: what the skipped reads of the token would have
  changed in its next-token distribution, against the upper confidence bound of that change on reference documents.

Source: ours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from cramlab.betting import Watch, highest_mean
from cramlab.consolidation.audits import (
    Pass,
    arguments,
    changes_of,
    document_increase,
    n_cached,
    n_far_keys,
    n_real,
    seen_pass,
    token_change,
)
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.ladder import Rung, ladder_of
from cramlab.consolidation.patch.attach import installation, installed
from cramlab.consolidation.patch.calls import closed_here
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.errors import ConsolidationError

Watched = Literal["documents", "tokens"]
CAP = 0.25  # nats: the largest change of a token that counts; with rare large ones nothing could be bounded
_TOKENS_PER_REFERENCE = 4


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        watched: what raised it.
        audits: number of audits on this rung until then.
        mean: mean of what these audits found, nats (per token for documents).
        promised: what was promised, in the same unit.
        evidence: the e-value, at least 1 divided by the alpha of the rung.
        left: rung that was left.
        moved_to: rung that holds since.
    """

    watched: Watched
    audits: int
    mean: float
    promised: float
    evidence: float
    left: Rung
    moved_to: Rung

    def __str__(self) -> str:
        """One sentence."""
        unit = "nats per token" if self.watched == "documents" else "nats"
        return (
            f"{self.audits} audited {self.watched} on the rung with {self.left}: on average {self.mean:.3g} {unit}, "
            f"promised {self.promised:.3g} (evidence {self.evidence:.3g}); moved to {self.moved_to}"
        )


@dataclass
class _Watching:
    """What is watched on one rung, and what was seen since it holds."""

    promised: float
    to_unit: Callable[[float], float]
    alpha: float
    watch: Watch = field(init=False)
    n: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        self.watch = Watch(self.alpha, self.to_unit(self.promised))

    def add(self, found: float) -> bool:
        """Takes one audit; returns whether it raises an alarm."""
        self.n, self.total = self.n + 1, self.total + found
        self.watch.update(self.to_unit(found))
        return bool(self.watch.alarms[0])

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else math.nan

    @property
    def evidence(self) -> float:
        """Largest evidence so far."""
        return math.exp(min(700.0, float(self.watch.peak[0])))


@dataclass(frozen=True)
class GuardReport:
    """State of a guard.

    Attributes:
        rung: rung that holds.
        safer: rungs below it, the closed patch last.
        alpha: probability of any false alarm, of all rungs together.
        audit_frac: share of documents and tokens that are audited.
        audits: number of audits by what is watched, on all rungs.
        means: what they found on the present rung, on average; NaN without any.
        promised: what was promised.
        evidence: largest evidence on the present rung.
        candidates: number of documents and tokens that could have been audited.
        left_out: number of audits that could not be made; see `audits.seen_pass`.
        alarms: all alarms, oldest first.
    """

    rung: Rung
    safer: tuple[Rung, ...]
    alpha: float
    audit_frac: float
    audits: dict[Watched, int]
    means: dict[Watched, float]
    promised: dict[Watched, float]
    evidence: dict[Watched, float]
    candidates: dict[Watched, int]
    left_out: int
    alarms: tuple[Alarm, ...]

    def __str__(self) -> str:
        """A few lines."""
        lines = [f"guard: {self.rung}; {len(self.safer)} safer steps; alpha {self.alpha:g}"]
        for watched, promised in self.promised.items():
            n, of, e = self.audits[watched], self.candidates[watched], self.evidence[watched]
            mean = "" if math.isnan(self.means[watched]) else f", on average {self.means[watched]:.3g}"
            lines.append(f"{watched}: {n:,} of {of:,} audited{mean}, promised {promised:.3g}; evidence {e:.3g}")
        if "tokens" not in self.promised:
            lines.append("tokens: not audited in generation, as no reference documents were given")
        if self.left_out:
            lines.append(f"{self.left_out:,} audits could not be made (cache, mask or arguments of another kind)")
        lines += [f"alarm: {alarm}" for alarm in self.alarms]
        if self.alarms:
            lines.append("calibrate for the new text: cramlab consolidate MODEL --text TEXT --from FOLDER --out NEW")
        return "\n".join(lines)


class _Hook:
    """The hook at the model; copies of a model and loaded pickles have one without a guard, which does nothing."""

    def __init__(self, guard: Guard | None) -> None:
        self.guard = guard

    def __call__(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.guard is not None:
            self.guard.look(args, kwargs, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class Guard:
    """Audits a consolidated model in use; see the module and `cramlab.guard`.

    All state is in this object. Several threads may use the model; alarms are handled one at a time.

    Args:
        model: a model that a consolidation was loaded into.
        alpha: probability of any false alarm over all time, of all rungs together.
        audit_frac: probability that a document that is scored, or a token that is generated, is audited.
        reference: token ids, (T,), of documents of the text that the model was calibrated for; None: tokens that follow
            a cache are not audited. Half of alpha is for their bound being too low.
        on_alarm: called with every `Alarm`, after the thresholds have moved.
        seed: seed of the choice of audits, which no other random numbers depend on.

    Raises:
        ConsolidationError: when an argument is out of its range, the model has no consolidation with a record, a guard
            already, or the reference documents are too few.
    """

    def __init__(
        self, model: nn.Module, *, alpha: float = 0.01, audit_frac: float = 0.002,
        reference: Sequence[Tensor] | None = None, on_alarm: Callable[[Alarm], None] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        for name, value, most in (("alpha", alpha, 0.5), ("audit_frac", audit_frac, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise ConsolidationError(f"{name} = {value!r} must be a number above 0 and at most {most:g}")
        made = installation(model)
        record = getattr(None if made is None else made.write, "record", None)
        layers = list(installed(model).values())
        if record is None or not all(isinstance(layer, ConsolidatedAttention) for layer in layers):
            raise ConsolidationError(
                "the model has no consolidation with a record; load one with cramlab.load_consolidated(model, folder)"
            )
        if any(isinstance(hook, _Hook) and hook.guard is not None for hook in model._forward_hooks.values()):
            raise ConsolidationError("the model has a guard already; call its remove() first")
        self.model, self.alpha, self.audit_frac, self.on_alarm = model, float(alpha), float(audit_frac), on_alarm
        self._layers = [layer for layer in layers if isinstance(layer, ConsolidatedAttention)]
        self.ladder = ladder_of(record)
        self._guarantee = Guarantee(**record["promise"])
        self._promised: dict[Watched, float] = {"documents": self._guarantee.increase}
        if reference is not None:
            self._promised["tokens"] = self._bound_of(reference, seed)
        self._lock = threading.Lock()
        self._generator = np.random.default_rng(seed)
        self._until: dict[Watched, int] = {watched: self._gap() for watched in self._promised}
        self._candidates: dict[Watched, int] = dict.fromkeys(self._promised, 0)
        self._audits: dict[Watched, int] = dict.fromkeys(self._promised, 0)
        self._left_out = 0
        self._alarms: list[Alarm] = []
        self._auditing = threading.local()
        self._move(0)
        self._handle = model.register_forward_hook(_Hook(self), with_kwargs=True)

    def _bound_of(self, reference: Sequence[Tensor], seed: int) -> float:
        """Upper confidence bound of the capped change of a token of reference documents, nats."""
        changes = changes_of(self.model, reference, tokens_per_document=_TOKENS_PER_REFERENCE, cap=CAP, seed=seed)
        bound = CAP * highest_mean(np.array(changes) / CAP, self.alpha / 2) if changes else CAP
        if bound >= 0.9 * CAP:
            raise ConsolidationError(
                f"reference: {len(changes)} documents with far tokens bound the change of a token by {bound:.3g} nats "
                f"only, with confidence {1 - self.alpha / 2:g}; give more documents"
            )
        return bound

    @property
    def rung(self) -> Rung:
        """The rung that holds."""
        return self.ladder[self._rung]

    def _move(self, rung: int) -> None:
        """Lets a rung hold; everything that is watched begins again with its part of alpha."""
        self._rung = rung
        for layer in self._layers:
            layer.threshold = self.rung.threshold
            if layer.reads_all != self.rung.is_closed:
                layer.reads_all = self.rung.is_closed
        n_parts = (len(self.ladder) - 1) * len(self._promised)
        alpha = self.alpha * (0.5 if "tokens" in self._promised else 1.0) / n_parts
        units: dict[Watched, Callable[[float], float]] = {
            "documents": lambda increase: float(self._guarantee.unit(increase)),
            "tokens": lambda change: min(change, CAP) / CAP,
        }
        self._watching: dict[Watched, _Watching] = {
            watched: _Watching(promised, units[watched], alpha) for watched, promised in self._promised.items()
        }

    def _gap(self) -> int:
        """Number of candidates that are passed over before the next audit."""
        return int(self._generator.geometric(self.audit_frac)) - 1

    def _chosen(self, watched: Watched, n: int) -> list[int]:
        """Which of the next `n` candidates are audited."""
        with self._lock:
            self._candidates[watched] += n
            chosen = []
            while self._until[watched] < n:
                chosen.append(self._until[watched])
                self._until[watched] += 1 + self._gap()
            self._until[watched] -= n
            return chosen

    def look(self, args: Any, kwargs: Any, output: Any) -> None:
        """Audits a pass that has ended, if it is chosen; called by the hook."""
        model, rung = self.model, self._rung
        if getattr(self._auditing, "now", False) or self.ladder[rung].is_closed or model.training:
            return
        if not self._layers[0].attached or self._layers[0] in closed_here.get():
            return
        given = arguments(model, args, kwargs)
        tokens, start = given.get("input_ids"), n_cached(given)
        watched: Watched = "tokens" if tokens is not None and start > 0 and tokens.shape[1] == 1 else "documents"
        if watched not in self._promised or not (chosen := self._chosen(watched, 1 if tokens is None else len(tokens))):
            return
        seen = seen_pass(given, output)
        if seen is None:
            with self._lock:
                self._left_out += len(chosen)
            return
        for b in chosen:
            self._auditing.now = True
            try:
                found = self._audit(watched, seen, b)
            finally:
                self._auditing.now = False
            if found is not None:
                self._take(watched, found, rung)

    def _audit(self, watched: Watched, seen: Pass, b: int) -> float | None:
        """What an audit of one sequence of a pass finds; None: it is padding, or nothing could be skipped."""
        if watched == "documents":
            return document_increase(self.model, seen, b) if n_real(seen, b) > 1 else None
        return token_change(self.model, seen, b) if n_far_keys(self.model, seen, b) else None

    def _take(self, watched: Watched, found: float, rung: int) -> None:
        """Takes what an audit found on a rung, and moves on an alarm."""
        with self._lock:
            self._audits[watched] += 1
            if rung != self._rung:  # another thread has moved since
                return
            watching = self._watching[watched]
            if not watching.add(found):
                return
            left = self.rung
            self._move(rung + 1)
            alarm = Alarm(watched, watching.n, watching.mean, watching.promised, watching.evidence, left, self.rung)
            self._alarms.append(alarm)
        if self.on_alarm is not None:
            self.on_alarm(alarm)

    def report(self) -> GuardReport:
        """State of the guard; printing it gives a few lines."""
        with self._lock:
            means, evidence = dict[Watched, float](), dict[Watched, float]()
            for watched, one in self._watching.items():
                means[watched], evidence[watched] = one.mean, one.evidence
            return GuardReport(
                self.rung, self.ladder[self._rung + 1 :], self.alpha, self.audit_frac, dict(self._audits), means,
                dict(self._promised), evidence, dict(self._candidates), self._left_out, tuple(self._alarms),
            )  # fmt: skip

    def reset(self) -> None:
        """Goes back to the calibrated thresholds and begins to watch again, with alpha anew for false alarms."""
        with self._lock:
            self._move(0)

    def remove(self) -> None:
        """Ends the guard; thresholds stay as they are. After `reset` they are the calibrated ones."""
        self._handle.remove()
