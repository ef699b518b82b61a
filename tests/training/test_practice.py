import numpy as np
import pytest
import torch

from cramlab.mixer import Trace
from cramlab.tasks.srcd import TINY
from cramlab.training.practice import PracticeLog, encounter_bins


def batch_of(index=0):
    return TINY.dataset(seed=0, split="train", batch_size=8).batch(index)


def trace(read):
    return Trace.of_reads(read, torch.float32)


def test_bins_are_two_an_octave():
    assert encounter_bins(20) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_patterns_stand_at_recurring_queries_alone():
    batch = batch_of()
    assert torch.equal(batch.pattern >= 0, batch.slices["recurring"] | batch.slices["rebound"])
    assert batch.pattern.max() < TINY.n_patterns


def test_counts_equal_a_slow_loop():
    log, met = PracticeLog(TINY.n_patterns), {}
    n, read = np.zeros((TINY.n_patterns, 9)), np.zeros((TINY.n_patterns, 9))
    firsts = encounter_bins(30)
    for index in range(0, 64, 8):
        batch = batch_of(index)
        chosen = torch.rand(batch.gaps.shape) < 0.5
        other = torch.rand(batch.gaps.shape) < 0.5
        log.update(batch, [trace(chosen), trace(other)])
        for p, a, b in zip(batch.pattern.flatten().tolist(), chosen.flatten(), other.flatten(), strict=True):
            if p >= 0:
                met[p] = met.get(p, 0) + 1
                place = max(i for i, first in enumerate(firsts) if first <= met[p])
                n[p, place] += 1
                read[p, place] += (float(a) + float(b)) / 2
    found = log.record()
    n_bins = len(found["first_encounter"])
    assert found["first_encounter"] == firsts[:n_bins]
    assert found["n"] == n[:, :n_bins].tolist()
    assert np.allclose(found["read"], read[:, :n_bins])
    assert n[:, n_bins:].sum() == 0


def test_a_log_continues_from_its_state():
    whole, first = PracticeLog(TINY.n_patterns), PracticeLog(TINY.n_patterns)
    for index in (0, 8):
        batch = batch_of(index)
        whole.update(batch, [trace(batch.valid)])
    first.update(batch_of(0), [trace(batch_of(0).valid)])
    second = PracticeLog(TINY.n_patterns)
    second.load(first.state())
    second.update(batch_of(8), [trace(batch_of(8).valid)])
    assert second.record() == whole.record()


def test_without_recurrence_there_is_no_practice():
    assert PracticeLog(4).record() is None
    with pytest.raises(IndexError):
        PracticeLog(2).update(batch_of(), [trace(batch_of().valid)])
