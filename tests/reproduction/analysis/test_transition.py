"""Planted truth: steps of known place, width and fold are found; flat and gradual courses are not."""

import numpy as np
import pytest

from reproduction.analysis.transition import DetectorConfig, crossing, detect, level_at

STEPS = np.arange(10, 1210, 10)


def noise(seed, size=0.05, correlation=0.0):
    rng = np.random.default_rng(seed)
    e = rng.standard_normal(len(STEPS)) * size
    for i in range(1, len(e)):
        e[i] = correlation * e[i - 1] + np.sqrt(1 - correlation**2) * e[i]
    return e


def planted(middle, width, before, after, seed=0, **kinds):
    s = 1 / (1 + np.exp(-(STEPS - middle) * 2 * np.log(9) / width))
    return np.exp(np.log(before) * (1 - s) + np.log(after) * s + noise(seed, **kinds))


@pytest.mark.parametrize(("middle", "width", "after"), [(300, 5, 0.05), (600, 80, 0.1), (905, 90, 0.4)])
def test_planted_steps_are_found(middle, width, after):
    found = detect(STEPS, planted(middle, width, 1.0, after))
    assert found.step_low <= middle <= found.step_high
    assert found.step == pytest.approx(middle, abs=12)
    assert found.fold == pytest.approx(1 / after, rel=0.1)
    assert found.width <= max(1.6 * width, 20)
    assert found.width >= width / 2


def test_intervals_cover_as_often_as_they_say():
    hits = 0
    for seed in range(60):
        found = detect(STEPS, planted(603, 80, 0.05, 0.015, seed, size=0.1), DetectorConfig(n_resamples=150))
        hits += found.step_low <= 603 <= found.step_high
    assert hits >= 52  # of 60, at 95%


COURSES = {
    "flat": np.full(len(STEPS), 0.05),
    "linear": 0.05 * np.exp(-STEPS / 800),
    "power": STEPS**-0.43,
    "steep power": STEPS**-1.3,
    "relaxation": 0.015 * np.exp(1.2 * np.exp(-STEPS / 400)),
    "share falling in a line": 0.05 - 0.03 * STEPS / 1200,
    "slow logistic": 0.015 + 0.035 / (1 + np.exp((STEPS - 600) / 90)),
}


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_flat_and_gradual_courses_have_none(name, seed, correlation):
    assert detect(STEPS, COURSES[name] * np.exp(noise(seed, 0.1, correlation))) is None


def test_a_step_is_found_on_a_gradual_course():
    """As when an encoding phase ends and consolidation follows."""
    shares = planted(305, 5, 1.0, 0.05) * np.exp(-1.2 * np.maximum(STEPS - 305, 0) / 900)
    found = detect(STEPS, shares)
    assert found.step_low <= 305 <= found.step_high
    late = STEPS > 320
    assert detect(STEPS[late], shares[late]) is None


def test_a_rise_is_no_fall():
    assert detect(STEPS, planted(600, 20, 0.02, 1.0)) is None


def test_zero_shares_are_raised_to_the_resolution():
    shares = np.where(STEPS < 400, 0.1, 0.0)
    found = detect(STEPS, shares, DetectorConfig(resolution=1e-3))
    assert found.fold == pytest.approx(100, rel=0.01)


def test_short_series_have_none():
    assert detect([1, 2, 3, 4], [1.0, 1.0, 0.1, 0.1]) is None


@pytest.mark.parametrize(
    ("steps", "shares", "message"),
    [
        ([1, 2], [0.1], "one length"),
        ([1, 1], [0.1, 0.1], "do not increase"),
        ([1, 2], [0.1, np.nan], "no finite number"),
    ],
)
def test_bad_series_are_refused(steps, shares, message):
    with pytest.raises(ValueError, match=message):
        detect(steps, shares)


@pytest.mark.parametrize(
    ("field", "value"), [("min_fold", 1.0), ("max_width_frac", 1.0), ("min_side", 0), ("resolution", 0.0)]
)
def test_bad_thresholds_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        DetectorConfig(**{field: value})


def test_level_and_crossing():
    steps, values = [0, 10, 20, 30, 40], [None, 0.2, 0.6, 0.5, 0.8]
    assert level_at(steps, values, 15) == pytest.approx(0.4)
    assert level_at(steps, values, 5) is None
    assert crossing(steps, values, 0.55) == 40  # at 20 it is there, but does not stay
    assert crossing(steps, values, 0.9) is None
    assert crossing(steps, values, 0.1) == 10


def test_levels_beside_a_step_are_those_observed_and_no_trends():
    """A trend is one line for both sides; a share above 1 or a fold that nobody saw must not come out of it."""
    shares = np.where(STEPS <= 300, 1.0, 0.05 * np.exp(-1.2 * np.maximum(STEPS - 500, 0) / 900))
    found = detect(STEPS, shares)
    assert found.before == pytest.approx(1.0)
    assert found.after == pytest.approx(0.05, rel=0.02)
    assert found.fold == pytest.approx(20, rel=0.02)
    assert found.unresolved
    assert not found.floored


def test_a_fall_to_nothing_is_a_lower_bound_and_a_wide_one_is_resolved():
    gone = detect(STEPS, np.where(STEPS < 400, 0.1, 0.0), DetectorConfig(resolution=1e-3))
    assert gone.floored
    wide = detect(STEPS, planted(600, 80, 1.0, 0.1))
    assert not wide.unresolved
    assert wide.before <= 1.2
