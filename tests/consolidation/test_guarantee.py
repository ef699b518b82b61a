"""Bounds against another library and against simulations."""

import numpy as np
import pytest

from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.guarantee import Guarantee, betting_p, fixed_sequence, hoeffding_bentkus_p

GUARANTEE = Guarantee(increase=0.02, bound=0.1, delta=0.1)


def test_hoeffding_bentkus_is_that_of_mapie():
    mapie = pytest.importorskip("mapie.risk_control.methods")
    generator = np.random.default_rng(0)
    for n in (5, 30, 200):
        for risk in (0.05, 0.3, 0.6):
            losses = generator.beta(1, 4, n)
            theirs = mapie.compute_hoeffding_bentkus_p_value(np.array([losses.mean()]), n, risk)[0, 0]
            assert hoeffding_bentkus_p(losses, risk) == pytest.approx(min(1.0, theirs))


def draws(kind, mean, n, generator):
    """Increases of documents with a given mean, some of them with rare large ones."""
    if kind == "narrow":
        return generator.normal(mean, 0.01, n)
    if kind == "coins":  # all at one of the two ends
        return np.where(generator.random(n) < (mean + 0.1) / 0.2, 0.1, -0.1)
    return np.where(generator.random(n) < 0.1, mean + 0.045, mean - 0.005)


@pytest.mark.parametrize("kind", ["narrow", "coins", "rare"])
@pytest.mark.parametrize("rule", ["betting", "hoeffding-bentkus"])
def test_a_promise_that_does_not_hold_is_made_no_oftener_than_delta(kind, rule):
    """The mean sits at the promise exactly, the hardest case: a tenth may pass, and no more than chance above it."""
    generator = np.random.default_rng(1)
    passed = 0
    for _ in range(1000):
        increases = draws(kind, GUARANTEE.increase, 60, generator)
        if rule == "betting":
            passed += GUARANTEE.p_value(increases) <= GUARANTEE.delta
        else:
            losses = (np.clip(increases, -0.1, 0.1) + 0.1) / 0.2
            passed += hoeffding_bentkus_p(losses, 0.6) <= GUARANTEE.delta
    assert passed <= 1000 * GUARANTEE.delta + 3 * np.sqrt(1000 * 0.1 * 0.9)


def test_the_upper_bound_covers():
    generator = np.random.default_rng(2)
    covered = [GUARANTEE.upper_bound(draws("rare", 0.01, 60, generator)) >= 0.01 for _ in range(200)]
    assert np.mean(covered) >= 0.9 - 3 * np.sqrt(0.09 / 200)


def test_betting_promises_where_hoeffding_bentkus_cannot():
    increases = draws("narrow", 0.008, 60, np.random.default_rng(3))
    losses = (increases + 0.1) / 0.2
    assert betting_p(losses, 0.6, 0.1) <= 0.1 < hoeffding_bentkus_p(losses, 0.6)


def test_bound_and_p_value_agree():
    increases = list(draws("narrow", 0.01, 60, np.random.default_rng(4)))
    bound = GUARANTEE.upper_bound(increases)
    for increase, passes in ((bound + 1e-4, True), (bound - 1e-4, False)):
        guarantee = Guarantee(increase=increase, bound=0.1, delta=0.1)
        assert (guarantee.p_value(increases) <= 0.1) == passes


def test_too_few_documents_promise_nothing():
    n = GUARANTEE.fewest_documents()
    assert GUARANTEE.p_value([0.0] * n) <= 0.1 < GUARANTEE.p_value([0.0] * (n - 1))
    assert 5 < n < 20


@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("factor", [1.001, 1.5, 5, 12])
def test_the_fewest_documents_are_those_that_counting_up_finds(factor, delta):
    guarantee = Guarantee(increase=0.02, bound=factor * 0.02, delta=delta)
    n = 1
    while guarantee.p_value([0.0] * n) > delta:
        n += 1
    assert guarantee.fewest_documents() == n


@pytest.mark.parametrize(
    ("field", "value"),
    [("bound_factor", 1.0), ("bound_factor", 100.5), ("bound_factor", float("inf")), ("bound_factor", float("nan")),
     ("strengths", (0.1, float("nan"))), ("skipped_fracs", (0.1, float("nan"), 0.9)), ("temperature", float("inf"))],
)  # fmt: skip
def test_settings_that_are_no_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"consolidation\.{field} = "):
        ConsolidationConfig(**{field: value})


def test_the_sequence_stops_at_the_first_failure_and_its_error_is_controlled():
    """Candidates get worse; from the third on they break the guarantee. Passing the third is the only way to err."""
    generator = np.random.default_rng(5)
    means = [0.005, 0.01, 0.0201, 0.03, 0.001]
    wrong = 0
    for _ in range(150):
        tested = fixed_sequence(range(5), lambda i: list(draws("narrow", means[i], 60, generator)), GUARANTEE)
        assert all(t.p_value <= 0.1 for t in tested[:-1])
        assert len(tested) < 5  # the last is never reached past the failures
        passed = [t.candidate for t in tested if t.p_value <= 0.1]
        wrong += any(means[i] > GUARANTEE.increase for i in passed)
    assert wrong / 150 <= 0.1 + 3 * np.sqrt(0.09 / 150)


@pytest.mark.parametrize("kind", ["narrow", "coins", "rare", "far above"])
@pytest.mark.parametrize("n", [12, 30, 64])
def test_the_relaxed_guarantee_is_the_smallest_that_passes(kind, n):
    generator = np.random.default_rng(7)
    increases = generator.normal(0.3, 0.05, n) if kind == "far above" else draws(kind, 0.03, n, generator)
    relaxed = GUARANTEE.relaxed(increases)
    assert relaxed.bound == pytest.approx(5 * relaxed.increase)
    assert relaxed.p_value(increases) <= 0.1 < GUARANTEE.p_value(increases)
    assert float(f"{relaxed.increase:.3g}") == relaxed.increase  # as messages write it
    smaller = Guarantee(increase=0.98 * relaxed.increase, bound=0.98 * relaxed.bound, delta=0.1)
    assert smaller.p_value(increases) > 0.1


def test_what_is_named_is_not_below_the_mean_where_losses_are_above_the_cap():
    increases = [0.3] * 30
    assert GUARANTEE.upper_bound(increases) < np.mean(increases) < GUARANTEE.relaxed(increases).increase
    with pytest.raises(ValueError, match="11 documents guarantee nothing; use at least 12"):
        GUARANTEE.relaxed(increases[:11])


@pytest.mark.parametrize("n", [12, 30, 64])
def test_the_room_is_the_largest_increase_that_passes(n):
    room = GUARANTEE.room(n)
    assert GUARANTEE.p_value([room] * n) <= 0.1 < GUARANTEE.p_value([room + 1e-6] * n)
    assert GUARANTEE.room(2 * n) > room


def test_capped_documents_are_counted():
    tested = fixed_sequence([0], lambda _: [0.0] * 30 + [0.5], GUARANTEE)
    assert tested[0].n_capped == 1


@pytest.mark.parametrize(
    ("name", "value"), [("increase", 0.0), ("increase", 0.2), ("bound", float("inf")), ("delta", 1.0)]
)
def test_bad_promises_are_refused(name, value):
    with pytest.raises(ValueError, match=f"guarantee.{name} = {value}|guarantee.increase = 0.2 must be below"):
        Guarantee(**{"increase": 0.02, "bound": 0.1, "delta": 0.1} | {name: value})
