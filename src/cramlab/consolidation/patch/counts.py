"""Counts of what a patched layer has done: tokens, far reads, and pairs of query and key."""

from __future__ import annotations

import dataclasses
import operator
import threading
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Counts:
    """Work of one layer since its counts were last reset; pairs are counted for one head.

    Attributes:
        tokens: number of tokens seen.
        far_tokens: number of tokens that have keys beyond the window and the first keys.
        far_reads: number of far reads made; fractional where only some of the heads read. A number on a device while
            the layer computes, in order not to wait for it.
        window_pairs: number of pairs of query and key scored for the windows, as executed.
        far_pairs: number of pairs scored for the far reads, as executed.
        causal_pairs: number of pairs that full causal attention scores.
        unreachable: number of keys that have left the window of a layer that never reads, so that no later token can
            attend to them; they were written for the window.
        audit_reads: number of far reads made to audit answers without them; they change no output.
        audit_pairs: number of pairs scored for these.
    """

    tokens: int = 0
    far_tokens: int = 0
    far_reads: float | Tensor = 0
    window_pairs: int = 0
    far_pairs: float = 0
    causal_pairs: int = 0
    unreachable: int = 0
    audit_reads: int = 0
    audit_pairs: int = 0

    @property
    def skipped_frac(self) -> float:
        """Share of the far reads that were skipped, less those made to audit; 0 where no token had anything far."""
        return 1 - (float(self.far_reads) + self.audit_reads) / self.far_tokens if self.far_tokens else 0.0

    @property
    def pairs_frac(self) -> float:
        """Pairs scored, windows and audits included, divided by those of full causal attention."""
        scored = self.window_pairs + self.far_pairs + self.audit_pairs
        return scored / self.causal_pairs if self.causal_pairs else 0.0

    def __add__(self, other: Counts) -> Counts:
        """The sum, field by field."""
        return Counts(*map(operator.add, vars(self).values(), vars(other).values()))


class Tally:
    """Counts that several threads add to. Copying or unpickling a tally gives one that starts from zero."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def add(self, counts: Counts) -> None:
        """Adds the counts of one call."""
        with self._lock:
            self._counts = self._counts + counts

    def total(self) -> Counts:
        """The counts so far, as numbers of the host."""
        counts = self._counts
        reads = counts.far_reads
        return dataclasses.replace(counts, far_reads=float(reads)) if isinstance(reads, Tensor) else counts

    def reset(self) -> None:
        """Starts again from zero."""
        with self._lock:
            self._counts = Counts()

    def __reduce__(self) -> tuple[type[Tally], tuple[()]]:
        """A fresh tally, for copies and pickles."""
        return Tally, ()
