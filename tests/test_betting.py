"""Evidence by betting: against its definition, against the rate of false alarms, and what it names."""

import math

import numpy as np
import pytest

from cramlab.betting import EProcess, Watch, evidence_by_hand


@pytest.mark.parametrize("kind", ["coins", "graded", "changed"])
def test_evidence_is_that_of_the_definition(kind):
    generator = np.random.default_rng(3)
    outcomes = {
        "coins": (generator.random(60) < 0.1).astype(float),
        "graded": generator.beta(1, 12, 60),
        "changed": np.r_[np.zeros(30), generator.random(30) < 0.6].astype(float),
    }[kind]
    process, found = EProcess(0.08), []
    for outcome in outcomes:
        process.update(outcome)
        found.append(float(process.log_evidence))
    np.testing.assert_allclose(found, evidence_by_hand(outcomes.tolist(), 0.08), rtol=0, atol=1e-9)


def test_streams_do_not_know_each_other():
    generator = np.random.default_rng(4)
    outcomes, seen = generator.beta(1, 9, (40, 3, 2)), generator.random((40, 3, 2)) < 0.7
    together = EProcess(0.1, (3, 2))
    for one, known in zip(outcomes, seen, strict=True):
        together.update(one, known)
    for place in np.ndindex(3, 2):
        alone = EProcess(0.1)
        for outcome in outcomes[:, *place][seen[:, *place]]:
            alone.update(outcome)
        assert together.log_evidence[place] == pytest.approx(float(alone.log_evidence), abs=1e-12)


def test_no_more_false_alarms_than_alpha_where_the_promise_is_just_kept():
    """Outcomes sit at the promised mean, the hardest case; groups share the probability."""
    alpha, generator, n_streams = 0.1, np.random.default_rng(5), 600
    watch = Watch(alpha, 0.1, n_groups=5, n_streams=n_streams)
    for _ in range(300):
        watch.update((generator.random(n_streams) < 0.1).astype(float), generator.integers(5, size=n_streams))
    assert watch.alarms.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / n_streams)
    assert not (watch.stale.any(1) & ~watch.alarms).any()


def test_evidence_has_an_expectation_of_at_most_one():
    """All outcomes of a short stream, weighted by their probability: equality would need no rounding."""
    mean, n = 0.3, 9
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    process = EProcess(mean, (2**n,))
    for column in bits.T:
        process.update(column.astype(float))
    probability = np.prod(np.where(bits == 1, mean, 1 - mean), axis=1)
    assert probability @ np.exp(process.log_evidence) == pytest.approx(1.0, abs=1e-9)


def test_the_group_that_changed_is_named():
    generator, n_streams = np.random.default_rng(6), 100
    watch = Watch(0.05, 0.02, n_groups=10, n_streams=n_streams)
    for i in range(600):
        groups = generator.integers(10, size=n_streams)
        rate = np.where((groups == 7) & (i >= 200), 0.8, 0.005)
        watch.update((generator.random(n_streams) < rate).astype(float), groups)
    assert watch.stale[:, 7].mean() > 0.95
    assert np.delete(watch.stale, 7, axis=1).mean() < 0.01


def test_a_change_after_long_peace_is_noticed_as_soon_as_one_at_once():
    late, early = EProcess(0.05), EProcess(0.05)
    for _ in range(5000):
        late.update(0.0)
    for i in range(10):
        outcome = float(i % 2)
        late.update(outcome)
        early.update(outcome)
    assert abs(float(late.log_evidence) - float(early.log_evidence)) < 2.0
    assert float(late.log_evidence) > math.log(100)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"mean = 0 must be above 0"):
        EProcess(0)
    with pytest.raises(ValueError, match=r"from 0 to 1"):
        EProcess(0.1).update(1.5)
    with pytest.raises(ValueError, match=r"from 0 to 1"):
        EProcess(0.1).update(float("nan"))
    with pytest.raises(ValueError, match=r"alpha = 1 must be"):
        Watch(1, 0.1)
    with pytest.raises(ValueError, match=r"groups = 3 must be numbers of groups, from 0 to 2"):
        Watch(0.1, 0.1, n_groups=3).update(0.0, 3)
