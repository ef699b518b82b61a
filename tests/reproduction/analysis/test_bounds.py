"""The bounds as functions: simulated routers keep to them, and the counterexamples of docs/theory.md break them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramlab.tasks.srcd import SRCDConfig
from cramlab.tasks.srcd_oracles import floor
from reproduction.analysis.bounds import (
    consolidated_reads,
    consolidation_error,
    fall_by_cause,
    memoriser,
    separation_length,
    state_bits,
    static_reads,
    use_ratio,
)

shares = st.floats(0, 1)
counts = st.integers(1, 5000)


@given(n=counts, f=shares, eps=shares, guess=shares)
def test_theorem_1_asks_for_no_more_than_there_is(n, f, eps, guess):
    bound = static_reads(n, f=f, eps=eps, guess=guess)
    assert 0 <= bound <= f * n
    assert bound <= static_reads(n, f=f, eps=eps) + 1e-9  # guessing only helps
    assert static_reads(n, f=f, eps=0) == pytest.approx(f * n)
    assert static_reads(n, f=f, eps=eps, guess=1.0) == 0


@given(seed=st.integers(0, 10_000), n=st.integers(20, 300), f=st.floats(0.05, 1), rate=shares, guess=st.floats(0, 0.9))
def test_theorem_1_holds_for_any_router_whose_local_answers_fail(seed, n, f, rate, guess):
    """Answers are right where read and, elsewhere, with probability `guess`; expectations are taken exactly."""
    rng = np.random.default_rng(seed)
    needs = np.arange(n) < max(1, round(f * n))
    read = rng.random(n) < rate * (1 + needs) / 2  # looks at positions as it likes
    wrong = float(((~read) & needs).sum() * (1 - guess)) / needs.sum()
    assert read.sum() >= static_reads(n, f=needs.mean(), eps=min(wrong, 1.0), guess=guess) - 1e-6


def test_theorem_1_is_tight():
    n, f, eps = 1000, 0.1, 0.2
    assert static_reads(n, f=f, eps=eps) == pytest.approx(80)  # read 80 of the 100, err on the other 20


def test_the_memoriser_escapes_theorem_1():
    wrong, demanded = memoriser(recurring_frac=0.7, query_frac=0.05)
    assert demanded == pytest.approx(0.035)
    assert static_reads(2048, f=demanded, eps=wrong) > 71
    task = SRCDConfig()
    batch = task.dataset(seed=0, split="test", batch_size=2).batch(0)
    answers = floor("memoriser", task, batch, seed=0).logits.argmax(dim=-1)  # from keys and weights: it reads nothing
    recurring = batch.slices["recurring"]
    assert recurring.float().mean() == pytest.approx(demanded, rel=0.2)
    assert (answers != batch.retrieval_target)[recurring].float().mean() == wrong


@given(m=st.integers(1, 200), v=st.integers(2, 100), data=st.data())
def test_a_state_that_keeps_some_bindings_and_guesses_the_others_has_bits_enough(m, v, data):
    kept = data.draw(st.integers(0, m))
    assert state_bits(m, n_values=v, right=(kept + (m - kept) / v) / m) <= kept * math.log2(v) + 1e-6
    assert state_bits(m, n_values=v, right=1.0) == pytest.approx(m * math.log2(v))


@pytest.mark.parametrize("wanted", [2, 3])
def test_no_state_of_one_bit_answers_more_than_its_bits_allow(wanted):
    """All ways of answering three binary bindings from one bit: two answer sheets, the better one for each sequence."""
    sheets = np.array(list(itertools.product((0, 1), repeat=3)))
    hits = (sheets[:, None] == sheets[None]).sum(axis=-1)  # by what was written and what is answered
    best = max((np.maximum(hits[:, a], hits[:, b]) >= wanted).mean() for a in range(8) for b in range(8))
    assert state_bits(3, n_values=2, right=wanted / 3, chance=best) <= 1
    if wanted == 3:
        assert best == 0.25
        assert state_bits(3, n_values=2, right=1.0, chance=best) == pytest.approx(1)  # tight


def test_the_state_of_a_small_recurrence_could_hold_all_of_srcd():
    """At the paper's length: 205 bindings of 64 values are 1,230 bits, and 128 numbers of 32 bits are 4,096."""
    assert state_bits(205, n_values=64, right=1.0) == pytest.approx(1230)
    assert state_bits(205, n_values=64, right=1.0) < 128 * 32


@given(n=counts, f=shares, eps_cons=shares, delta=st.floats(1e-6, 1), k=st.integers(1, 1000))
def test_corollary_1_never_exceeds_reading_everything(n, f, eps_cons, delta, k):
    bound = consolidated_reads(n, f=f, eps_cons=eps_cons, delta=delta, n_patterns=k)
    assert eps_cons * f * n - 1e-9 <= bound <= f * n


@pytest.mark.parametrize("eps_cons", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("n", [100, 2000])
def test_corollary_1_holds_for_dependent_reads(n, eps_cons):
    """Reads whose chance, given the past, wanders below eps_cons: broken in no more than delta of the streams."""
    f, delta, rng = 0.2, 0.1, np.random.default_rng(0)
    m, streams = round(f * n), 4000
    count = np.zeros(streams)
    chance = np.full(streams, eps_cons)
    for _ in range(m):
        read = rng.random(streams) < chance
        count += read
        chance = np.where(read, eps_cons, rng.uniform(0.5, 1.0, streams) * eps_cons)
    bound = consolidated_reads(n, f=f, eps_cons=eps_cons, delta=delta)
    assert (count > bound).mean() <= delta


def test_corollary_1_holds_for_the_worst_of_many_routers():
    """All K streams of reads at once keep to the bound with K in it, but not to that of a single one."""
    f, n, delta, k, rng = 0.2, 1000, 0.1, 50, np.random.default_rng(0)
    worst = rng.binomial(round(f * n), 0.3, size=(2000, k)).max(axis=1)
    asked = {"f": f, "eps_cons": 0.3, "delta": delta}
    assert (worst > consolidated_reads(n, **asked, n_patterns=k)).mean() <= delta
    assert (worst > consolidated_reads(n, **asked)).mean() > delta


@given(eps=shares, f=st.floats(0.01, 1), n=counts)
def test_where_local_answers_fail_few_reads_are_many_errors(eps, f, n):
    """Of one model both bounds together ask for eps + eps_cons >= 1."""
    eps_cons = static_reads(n, f=f, eps=eps) / (f * n)
    assert eps + eps_cons == pytest.approx(1)
    assert separation_length(f=f, eps=eps, eps_cons=min(eps_cons + 1e-9, 1.0), delta=0.05) > 1e9


def test_corollary_1_says_nothing_about_short_sequences():
    """At the paper's own length and K = 100, delta = .05, its second term alone exceeds the static bound."""
    n, f = 2048, 0.05 * 0.7
    assert math.sqrt(n * math.log(100 / 0.05)) > static_reads(n, f=f, eps=0)  # as the paper writes it
    assert consolidated_reads(64, f=f, eps_cons=0.0, delta=0.05, n_patterns=100) == f * 64  # and ours, at 64 tokens


@given(f=st.floats(0.01, 1), eps=st.floats(0, 0.4), eps_cons=st.floats(0, 0.4), k=st.integers(1, 200))
def test_from_the_separation_length_on_the_bounds_are_apart(f, eps, eps_cons, k):
    n = separation_length(f=f, eps=eps, eps_cons=eps_cons, delta=0.05, n_patterns=k)
    above, below = math.ceil(n * 1.01) + 1, math.floor(n * 0.99)
    asked = {"f": f, "eps_cons": eps_cons, "delta": 0.05, "n_patterns": k}
    assert consolidated_reads(above, **asked) <= static_reads(above, f=f, eps=eps)
    if below >= 1:
        assert consolidated_reads(below, **asked) >= static_reads(below, f=f, eps=eps) * (1 - 1e-9)


def test_separation_is_never_reached_when_errors_add_up_to_one():
    assert separation_length(f=0.05, eps=0.5, eps_cons=0.5, delta=0.05) == math.inf
    assert separation_length(f=0.0, eps=0.0, eps_cons=0.0, delta=0.05) == math.inf


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_steps", [1, 10, 300])
def test_gradient_descent_keeps_to_the_convergence_bound(seed, n_steps):
    """A linear semantic memory on fixed features and targets, full batches, rate 1 / L."""
    rng = np.random.default_rng(seed)
    x, r = rng.standard_normal((200, 16)), rng.standard_normal((200, 4))
    best = np.linalg.lstsq(x, r, rcond=None)[0]
    rate = 1 / (2 * np.linalg.eigvalsh(x.T @ x / len(x)).max())
    w = rng.standard_normal(best.shape)
    distance = float(np.linalg.norm(w - best))
    for _ in range(n_steps):
        w = w - rate * 2 * x.T @ (x @ w - r) / len(x)
    least = float(((x @ best - r) ** 2).sum(axis=1).mean())
    bound = consolidation_error(eps_approx=math.sqrt(least), distance=distance, n_steps=n_steps, rate=rate)
    assert ((x @ w - r) ** 2).sum(axis=1).mean() <= bound + 1e-9


def test_three_ways_out_of_the_convergence_bound():
    """Noisy gradients, moving targets and dead units: the error does not go to eps_approx^2 = 0 as 1 / T."""
    rng = np.random.default_rng(0)
    rate, n_steps = 0.1, 20_000
    bound = consolidation_error(eps_approx=0.0, distance=1.0, n_steps=n_steps, rate=rate)
    w, late = 1.0, []
    for t in range(n_steps):  # the expected loss is w^2, its gradient 2 w; what is seen has noise
        w -= rate * (2 * w + rng.standard_normal())
        late += [w * w] if t > n_steps / 2 else []
    assert np.mean(late) > 50 * bound
    assert np.mean(late) == pytest.approx(rate / (4 - 4 * rate), rel=0.1)
    w, angle = np.zeros(2), 0.0
    for _ in range(n_steps):  # every target can be reached exactly, and each is gone by the next step
        target = np.array([np.cos(angle), np.sin(angle)])
        error = float(((w - target) ** 2).sum())
        w, angle = w - rate * 2 * (w - target), angle + 0.5
    assert error > 1000 * bound
    assert error == pytest.approx((2 * math.sin(0.25)) ** 2 / abs(np.exp(0.5j) - 1 + 2 * rate) ** 2)
    down, up, x = np.array(-1.0), np.array(1.0), 1.0  # f = up relu(down x) and target 0.5: no gradient at all
    for _ in range(10):
        hidden = max(down * x, 0.0)
        slope = 2 * (up * hidden - 0.5)
        up, down = up - rate * slope * hidden, down - rate * slope * up * x * (hidden > 0)
    assert (up * max(down * x, 0.0) - 0.5) ** 2 == 0.25


@given(rho=shares, eps=shares)
def test_use_ratio_is_a_share(rho, eps):
    assert 1 - rho - 1e-9 <= use_ratio(recurring_frac=rho, eps=eps) <= 1


@given(before=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_use_keeps_to_its_ratio_and_falls_no_further_than_what_recurs(before):
    """Any positions read before: does each ask for something recurring, and is it still read after?"""
    recurring, still = np.array(before).T
    rho, eps = recurring.mean(), (recurring & still).mean()
    assert still.mean() <= use_ratio(recurring_frac=rho, eps=eps) + 1e-9
    others_still_read = still | ~recurring
    assert others_still_read.mean() >= use_ratio(recurring_frac=rho, eps=0.0) - 1e-9


@given(before=st.floats(0.01, 1), asked=shares, after=st.floats(1e-4, 1))
def test_the_causes_of_a_fall_multiply_to_it(before, asked, after):
    query_frac = before * max(asked, 1e-3)
    unasked, consolidated = fall_by_cause(before=before, query_frac=query_frac, after=after)
    assert unasked * consolidated == pytest.approx(before / after)
    assert unasked >= 1


def test_most_of_the_fall_needs_no_memory():
    """On SRCD, from all tokens to .0155: a factor 20 is the reads that nobody asked for."""
    unasked, consolidated = fall_by_cause(before=1.0, query_frac=0.05, after=0.0155)
    assert unasked == pytest.approx(20)
    assert consolidated == pytest.approx(1 / use_ratio(recurring_frac=0.7, eps=0.01))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: static_reads(0, f=0.1, eps=0), "n = 0"),
        (lambda: static_reads(1, f=1.1, eps=0), "f = 1.1 is not a share"),
        (lambda: consolidated_reads(1, f=0.1, eps_cons=0, delta=0), "delta = 0"),
        (lambda: consolidated_reads(1, f=0.1, eps_cons=0, delta=0.1, n_patterns=0), "n_patterns = 0"),
        (lambda: consolidation_error(eps_approx=0, distance=1, n_steps=0, rate=1), "n_steps = 0"),
        (lambda: state_bits(3, n_values=1, right=1.0), "n_values = 1"),
        (lambda: state_bits(3, n_values=2, right=1.0, chance=0), "chance = 0"),
        (lambda: memoriser(recurring_frac=0.7, query_frac=1.5), "query_frac = 1.5 is not a share"),
        (lambda: separation_length(f=0.1, eps=0, eps_cons=0, delta=0), "delta = 0"),
        (lambda: separation_length(f=0.1, eps=0, eps_cons=0, delta=0.1, n_patterns=0), "n_patterns = 0"),
        (lambda: consolidation_error(eps_approx=-1, distance=1, n_steps=1, rate=1), "eps_approx = -1"),
        (lambda: fall_by_cause(before=0.01, query_frac=0.05, after=0.01), "shares have to be positive"),
    ],
)
def test_values_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
