"""Planted laws are recovered; averages of steps look like what they are not."""

import numpy as np
import pytest
from scipy.special import xlog1py, xlogy

from cramlab.training.practice import encounter_bins
from reproduction.analysis.human import TABLES, fit_table
from reproduction.analysis.practice import (
    LAWS,
    Binomial,
    LogNormal,
    aic_weights,
    compare,
    fit,
    least_squares_exponent,
    line_exponent,
)

K = np.array(encounter_bins(2000), dtype=float)
PLANTED = {
    "power": {"height": 0.9, "exponent": 0.43},
    "exponential": {"height": 0.9, "scale": 120.0},
    "logistic": {"height": 0.95, "middle": 200.0, "scale": 60.0},
    "step": {"height": 0.9, "place": 220.0, "factor": 0.11},
    "weibull": {"height": 0.9, "scale": 150.0, "shape": 0.4},
}


def planted(law, seed=0, trials=800):
    logs = np.log([PLANTED[law][name] for name in LAWS[law].names])
    p = np.exp(LAWS[law].log_curve(K, logs, K[0]))
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
def test_no_curve_near_by_is_likelier_than_the_fit(law):
    errors = planted(law, seed=3)
    found = fit(law, K, errors)
    assert errors.nats(np.log(found.curve(K))) == pytest.approx(found.nats)
    rng = np.random.default_rng(0)
    best = np.log([found.parameters[name] for name in LAWS[law].names])
    for _ in range(300):
        other = best + 0.1 * rng.standard_normal(len(best))
        other[0] = min(other[0], 0.0)
        assert errors.nats(LAWS[law].log_curve(K, other, K[0])) >= found.nats - 1e-3


def too_steep(trials=1000):
    """All is read up to encounter 400 and nothing soon after: a power law that could would begin above 1."""
    n = np.full(len(K), float(trials))
    return Binomial(np.where(K < 100, n, np.round(n / (1 + np.exp((K - 400) / 60)))), n)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("trials", [20, 1000, 10**6])
def test_no_number_of_trials_drives_a_probability_above_1(law, trials):
    found = fit(law, K, too_steep(trials))
    assert found.curve(K).max() <= 1.0
    assert found.curve(K).min() >= 0.0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "errors", [too_steep(), planted("power"), planted("logistic")], ids=["steep", "power", "logistic"]
)
def test_the_same_runs_ten_times_over_leave_the_curve_as_it_is(law, errors):
    once, often = fit(law, K, errors), fit(law, K, Binomial(10 * errors.hits, 10 * errors.trials))
    assert often.curve(K) == pytest.approx(once.curve(K), abs=3e-3)
    assert often.nats == pytest.approx(10 * once.nats, rel=1e-5)
    if law == "power":
        assert often.parameters["exponent"] == pytest.approx(once.parameters["exponent"], abs=1e-4)


def test_the_exponent_under_the_bound_is_that_of_a_grid():
    errors = too_steep()
    height, exponent = np.meshgrid(np.linspace(0.5, 1.0, 101), np.linspace(0.001, 1.0, 500), indexing="ij")
    p = height[..., None] * K ** -exponent[..., None]
    nats = -(xlogy(errors.hits, p) + xlog1py(errors.trials - errors.hits, -p)).sum(axis=-1)
    best = np.unravel_index(nats.argmin(), nats.shape)
    found = fit("power", K, errors)
    assert found.nats <= nats.min()
    assert found.parameters["exponent"] == pytest.approx(exponent[best], abs=0.005)
    assert found.at_bounds == ("height",)
    assert fit("power", K, planted("power")).at_bounds == ()


def test_what_is_always_read_has_no_exponent_and_says_so():
    found = fit("power", K, Binomial(np.full(len(K), 50.0), np.full(len(K), 50.0)))
    assert found.parameters["exponent"] < 1e-3
    assert found.at_bounds == ("height", "exponent")
    assert found.nats == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("exponent", [0.1, 0.43, 0.9])
@pytest.mark.parametrize("height", [0.6, 1.0])
def test_simulated_power_laws_are_recovered_by_every_method(exponent, height):
    p = height * K**-exponent
    n = np.full(len(K), 10**5)
    hits = np.random.default_rng(1).binomial(n, p).astype(float)
    assert fit("power", K, Binomial(hits, n.astype(float))).parameters["exponent"] == pytest.approx(exponent, abs=0.01)
    assert least_squares_exponent(K, hits / n) == pytest.approx(exponent, abs=0.02)
    assert line_exponent(K, hits / n) == pytest.approx(exponent, abs=0.02)


def test_where_the_law_is_none_its_exponent_is_the_methods():
    errors = too_steep()
    shares = errors.hits / errors.trials
    likelihood = fit("power", K, errors).parameters["exponent"]
    least_squares = least_squares_exponent(K, shares)
    assert abs(np.log(least_squares / likelihood)) > 0.1
    assert line_exponent(K, shares) > 1.3 * max(least_squares, likelihood)
    assert np.isnan(line_exponent(K, np.zeros(len(K))))


def test_power_under_log_normal_errors_is_a_line_in_the_logs():
    rng = np.random.default_rng(0)
    values = 3 * K**-0.7 * np.exp(0.1 * rng.standard_normal(len(K)))
    slope, intercept = np.polyfit(np.log(K), np.log(values), 1)
    found = fit("power", K, LogNormal(values))
    assert found.parameters["exponent"] == pytest.approx(-slope, abs=1e-3)
    assert np.log(found.parameters["height"]) == pytest.approx(intercept, abs=1e-2)


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
