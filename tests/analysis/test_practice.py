"""Planted laws are recovered; averages of steps look like what they are not."""

import numpy as np
import pytest

from cramlab.analysis.human import TABLES, fit_table
from cramlab.analysis.practice import (
    LAWS,
    Binomial,
    Encounters,
    LogNormal,
    aic_weights,
    compare,
    fit,
    summarise,
    threshold_gate,
)
from cramlab.training.practice import encounter_bins

K = np.array(encounter_bins(2000), dtype=float)
PLANTED = {
    "power": {"a": 0.9, "exponent": 0.43},
    "exponential": {"a": 0.9, "scale": 120.0},
    "logistic": {"a": 0.95, "middle": 200.0, "scale": 60.0},
    "step": {"a": 0.9, "place": 220.0, "b": 0.1},
    "weibull": {"a": 0.9, "scale": 150.0, "shape": 0.4},
}


def planted(law, seed=0, trials=800):
    parameters = PLANTED[law]
    p = LAWS[law].curve(K, np.log([parameters[name] for name in LAWS[law].names]))
    n = np.full(len(K), trials)
    return Binomial(np.random.default_rng(seed).binomial(n, p).astype(float), n.astype(float))


@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_wins_and_its_parameters_are_found(law):
    fits = compare(K, planted(law))
    assert next(iter(fits)) == law
    weights = aic_weights(fits)
    assert weights[law] > 0.5
    assert sum(weights.values()) == pytest.approx(1)
    for name, value in PLANTED[law].items():
        tolerance = 0.35 if name == "place" else 0.15  # a step may lie anywhere between two bins
        assert fits[law].parameters[name] == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("law", LAWS)
def test_no_curve_of_a_grid_is_likelier_than_the_fit(law):
    errors = planted(law, seed=3)
    found = fit(law, K, errors)
    assert errors.nats(found.curve(K)) == pytest.approx(found.nats)
    rng = np.random.default_rng(0)
    best = np.log([found.parameters[name] for name in LAWS[law].names])
    for _ in range(300):
        assert errors.nats(LAWS[law].curve(K, best + 0.1 * rng.standard_normal(len(best)))) >= found.nats - 1e-3


def test_power_under_log_normal_errors_is_a_line_in_the_logs():
    rng = np.random.default_rng(0)
    values = 3 * K**-0.7 * np.exp(0.1 * rng.standard_normal(len(K)))
    slope, intercept = np.polyfit(np.log(K), np.log(values), 1)
    found = fit("power", K, LogNormal(values))
    assert found.parameters["exponent"] == pytest.approx(-slope, abs=1e-3)
    assert np.log(found.parameters["a"]) == pytest.approx(intercept, abs=1e-2)


def test_the_average_of_steps_is_smooth_while_every_pattern_steps():
    """The averaging artefact (Heathcote et al. 2000), planted."""
    runs = [threshold_gate(K, rate_spread=1.5, n_patterns=100, seed=s) for s in (0, 1)]
    summary = summarise(runs, n_resamples=3, n_patterns=20)
    assert summary.by_pattern["step"] > 0.9
    assert next(iter(summary.averaged)) != "step"
    assert summary.weights["step"] < 0.01


def test_the_exponent_of_the_null_is_a_matter_of_its_rates():
    """A threshold gate over exponential learning gives whatever exponent one likes, the paper's included."""

    def exponent(rate, spread):
        null = threshold_gate(K, rate_spread=spread, n_patterns=500, rate=rate)
        return fit("power", *null.pooled()).parameters["exponent"]

    by_rate = [exponent(rate, 1.0) for rate in (0.02, 0.2, 1.0)]
    by_spread = [exponent(0.2, spread) for spread in (0.5, 2.0, 4.0)]
    assert by_rate == sorted(by_rate)
    assert by_spread == sorted(by_spread, reverse=True)
    assert by_rate[0] < 0.2 < 0.43 < by_rate[1] < 0.5 < 0.71 < by_rate[2]


def test_intervals_over_seeds_and_patterns_hold_the_planted_exponent():
    rng = np.random.default_rng(0)
    p = np.minimum(0.9 * K**-0.43, 1.0)
    trials = np.full((50, len(K)), 20)
    runs = [Encounters(K, rng.binomial(trials, p).astype(float), trials.astype(float)) for _ in range(3)]
    summary = summarise(runs, n_resamples=40, n_patterns=5)
    value, low, high = summary.exponent
    assert low < 0.43 < high
    assert value == pytest.approx(0.43, rel=0.1)
    assert high - low < 0.1


def test_a_record_without_practice_has_no_encounters():
    assert Encounters.of_record({"practice": None}) is None
    assert Encounters.of_record({}) is None
    found = Encounters.of_record(
        {"practice": {"first_encounter": [1, 2, 3, 4, 6], "n": [[1] * 5], "read": [[1.0] * 5]}}
    )
    assert found.k == pytest.approx([1, 2, 3, np.sqrt(20), np.sqrt(48)])
    assert len(found.after(3).k) == 2
    with pytest.raises(ValueError, match="no run"):
        summarise([])


def test_too_few_encounters_are_refused():
    with pytest.raises(ValueError, match="four different"):
        compare(np.array([1.0, 2.0, 3.0]), LogNormal(np.ones(3)))
    with pytest.raises(ValueError, match="counted from 1"):
        compare(np.arange(5.0), LogNormal(np.ones(5)))


@pytest.mark.parametrize(
    ("name", "exponent"),
    [("savings", 0.126), ("relearning, 12 syllables", 0.92), ("relearning, 24 syllables", 1.304)],
)
def test_human_exponents_are_those_of_least_squares_in_the_logs(name, exponent):
    """And not the .4 to .5 that the paper gives for people."""
    table = TABLES[name]
    slope = np.polyfit(np.log(table.x), np.log(table.y), 1)[0]
    found = fit_table(table, n_resamples=60)
    assert -slope == pytest.approx(exponent, abs=0.01)
    assert found.exponent[0] == pytest.approx(exponent, abs=0.01)
    low, high = found.exponent[1:]
    assert not (low < 0.5 and high > 0.4)
