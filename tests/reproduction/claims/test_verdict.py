"""The rules by which a figure of the paper's is judged."""

import pytest

from cramlab.report.intervals import Interval
from reproduction.claims.verdict import Figure, Verdict, at_least, at_most, every, judge, most, run_share

PAPER = Figure(value=1.05, without=1.0)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (None, Verdict.NOT_RUN),
        (Interval(mean=1.05), Verdict.UNDECIDED),
        (Interval(mean=1.05, low=1.04, high=1.06), Verdict.REPRODUCED),
        (Interval(mean=1.042, low=1.04, high=1.046), Verdict.REPRODUCED),  # a tenth of .05 beside it
        (Interval(mean=1.042, low=1.04, high=1.044), Verdict.NOT_REPRODUCED),
        (Interval(mean=1.0, low=1.0, high=1.0), Verdict.NOT_REPRODUCED),  # what there is without the effect
        (Interval(mean=1.03, low=0.99, high=1.07), Verdict.UNDECIDED),
    ],
)
def test_a_figure_is_judged_by_its_interval_and_what_it_claims(ours, verdict):
    assert judge(ours, PAPER) is verdict


@pytest.mark.parametrize("value", [0.016, 0.83, 37.8, 1.05, 0.0])
@pytest.mark.parametrize("without", [0.0155, 0.05, 1.0, 20.0])
def test_what_there_is_without_the_effect_never_reproduces_it(value, without):
    assert judge(Interval(mean=without, low=without, high=without), Figure(value=value, without=without)) is (
        Verdict.NOT_REPRODUCED
    )
    assert judge(Interval(mean=value, low=value, high=value), Figure(value=value, without=without)) is (
        Verdict.REPRODUCED
    )


def test_levels_are_reached_by_whole_intervals():
    wide = Interval(mean=0.5, low=0.4, high=0.6)
    assert at_least(wide, 0.4) is at_most(wide, 0.6) is Verdict.REPRODUCED
    assert at_least(wide, 0.61) is at_most(wide, 0.39) is Verdict.NOT_REPRODUCED
    assert at_least(wide, 0.5) is at_most(wide, 0.5) is Verdict.UNDECIDED
    assert at_least(None, 0.5) is at_most(None, 0.5) is Verdict.NOT_RUN
    assert at_least(Interval(mean=0.9), 0.5) is at_most(Interval(mean=0.1), 0.5) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("hits", "n", "verdict"),
    [(0, 0, Verdict.NOT_RUN), (1, 1, Verdict.UNDECIDED), (5, 5, Verdict.UNDECIDED), (6, 6, Verdict.REPRODUCED),
     (0, 6, Verdict.NOT_REPRODUCED), (12, 18, Verdict.UNDECIDED), (15, 18, Verdict.REPRODUCED)],
)  # fmt: skip
def test_most_runs_are_more_than_half_beyond_chance(hits, n, verdict):
    assert most(hits, n) is verdict


def test_share_of_runs_has_the_exact_interval():
    share = run_share(0, 6)
    assert share.low == 0
    assert (1 - share.high) ** 6 == pytest.approx(0.025)


def test_a_claim_in_parts_falls_with_one_of_them():
    yes, no, open_, not_run = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.UNDECIDED, Verdict.NOT_RUN
    assert every([yes, yes]) is yes
    assert every([yes, open_]) is open_
    assert every([open_, no]) is no
    assert every([yes, not_run]) is not_run
    assert every([]) is not_run
