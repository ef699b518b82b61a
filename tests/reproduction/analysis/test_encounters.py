"""What runs read at the k-th encounter: run by run, together, and as averages of steps, which look like other laws."""

import numpy as np
import pytest

from cramlab.training.practice import encounter_bins
from reproduction.analysis.encounters import Encounters, summarise, threshold_gate
from reproduction.analysis.practice import aic_weights, fit

K = np.array(encounter_bins(2000), dtype=float)


def test_the_average_of_steps_is_smooth_while_every_pattern_steps():
    """The averaging artefact (Heathcote et al. 2000), planted."""
    runs = [threshold_gate(K, rate_spread=1.5, n_patterns=100, seed=s) for s in (0, 1)]
    summary = summarise(runs, n_patterns=10)
    assert summary.by_pattern["step"] > 0.9
    assert next(iter(summary.together)) != "step"
    assert "step" not in summary.best_by_run
    assert aic_weights(summary.together)["step"] < 0.01


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


def simulated(n_runs, exponent=0.43, spread=0.0, trials=20):
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(n_runs):
        p = np.minimum(0.9 * K ** -(exponent + spread * rng.standard_normal()), 1.0)
        n = np.full((50, len(K)), trials)
        runs.append(Encounters(K, rng.binomial(n, p).astype(float), n.astype(float)))
    return runs


def test_every_run_is_fitted_by_itself_and_runs_make_the_interval():
    summary = summarise(simulated(4, spread=0.05), n_patterns=0)
    for method, values in summary.exponents.items():
        assert len(values) == 4, method
        assert np.mean(values) == pytest.approx(0.43, abs=0.08), method
        assert 0.01 < np.std(values) < 0.15, method  # as runs differ, and not as their many trials do
    assert summary.exponents["likelihood"] == [fits["power"].parameters["exponent"] for fits in summary.by_run]
    assert summary.best_by_run == {"power": 1.0}


def test_the_same_runs_pooled_again_leave_the_exponent_as_it_is():
    runs = simulated(1)
    once, often = summarise(runs, n_patterns=0), summarise(runs * 4, n_patterns=0)
    for method, values in once.exponents.items():
        assert np.mean(often.exponents[method]) == pytest.approx(np.mean(values), abs=1e-9)
    pair = [s.together["power"].parameters["exponent"] for s in (once, often)]
    assert pair[1] == pytest.approx(pair[0], abs=1e-4)


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
