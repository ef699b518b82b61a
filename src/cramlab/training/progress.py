"""The state of a run besides weights and optimisers: how far it has come and what it has measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OnRow = Callable[[dict[str, Any]], None]


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. Checkpoints hold it as plain data, so that a run can be resumed.

    Attributes:
        header: code and machine as the record states them, taken before the first step.
        step: optimiser steps made.
        stage: index of the current stage of the curriculum.
        stage_step: steps made in this stage.
        n_sequences: training sequences drawn.
        n_tokens: training tokens seen, without padding.
        n_reads: tokens among them that were scored against the buffer, mean over layers.
        encoding: whether the encoding phase, in which every token reads, is still going on.
        encoding_ended_step: step at which it ended; None: it has not.
        encoding_attention_frac: share of tokens that attended at the first validation; None: there was none yet.
        best: best validation metrics of the last stage, by name.
        evals_since_best: validations since one of them improved.
        cooldown_from_step: step at which the learning rate began to fall because validation stopped improving; None:
            it has not.
        validation: metrics of the newest validation; None: there was none yet.
        series: the rows of the record.
        elapsed_s: seconds of work up to the newest checkpoint.
    """

    header: dict[str, Any]
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    n_sequences: int = 0
    n_tokens: int = 0
    n_reads: float = 0.0
    encoding: bool = True
    encoding_ended_step: int | None = None
    encoding_attention_frac: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    evals_since_best: int = 0
    cooldown_from_step: int | None = None
    validation: dict[str, Any] | None = None
    series: list[dict[str, Any]] = field(default_factory=list)
    elapsed_s: float = 0.0

    @classmethod
    def begun(cls, header: dict[str, Any], *, encoding: bool) -> Progress:
        """The progress before the first step, with or without an encoding phase."""
        return cls(header=header, encoding=encoding, encoding_ended_step=None if encoding else 0)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Progress:
        """The progress that `to_dict` returned.

        Raises:
            LookupError: when a field is missing.
        """
        return cls(**{f.name: saved[f.name] for f in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; shares its lists and dicts."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class Clock:
    """Counts seconds of work, across a resume too."""

    def __init__(self, before_s: float) -> None:
        self._start_s = time.perf_counter() - before_s

    def seconds(self) -> float:
        """Seconds of work so far."""
        return time.perf_counter() - self._start_s
