import math

import numpy as np
import pytest
from scipy import stats

from ltood_fast.experiments.verdict import (
    HELD,
    REFUTED,
    UNDECIDED,
    Estimate,
    all_of,
    decide_all,
    estimate,
    holm,
    in_points,
    power,
    say,
    seeds_needed,
    smallest_effect,
)


@pytest.mark.parametrize(
    ("values", "decision"),
    [
        ([0.01, 0.02, 0.03], UNDECIDED),  # t = 3.46 = 2 * 1.73, where 3 seeds need 4.30
        ([0.02, 0.025, 0.03], HELD),  # t = 8.66
        ([-0.02, -0.025, -0.03], REFUTED),
        ([0.01, 0.02, 0.03, 0.01, 0.02, 0.03], HELD),  # t = 5.5, where 6 seeds need 2.57
        ([0.0, 0.0], UNDECIDED),
        ([0.01, 0.01], HELD),  # every seed says the same
        ([0.5], UNDECIDED),
        ([], UNDECIDED),
    ],
)
def test_the_rule(values, decision):
    assert decide_all([estimate(values)]) == [decision]


def test_estimate_is_that_of_the_mean():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert estimate([2.0]).error is None


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_interval_and_p_are_those_of_a_paired_t_test(n):
    values = np.random.default_rng(n).normal(0.3, 1.0, n)
    found, truth = estimate(values.tolist()), stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(truth.pvalue)
    assert found.interval == pytest.approx(tuple(truth.confidence_interval(0.95)))


def test_the_test_images_widen_the_interval():
    values = [0.02, 0.025, 0.03]
    alone, known = estimate(values), estimate(values, test_error=0.02)
    assert known.interval[0] < alone.interval[0] < alone.interval[1] < known.interval[1]
    assert known.p > alone.p
    assert decide_all([known]) == [UNDECIDED]
    # of little chance among images: the interval of the seeds stays, although more degrees of freedom would narrow it
    assert estimate(values, test_error=1e-4).half_width() >= alone.half_width()
    # of little chance among seeds: that of a normal distribution
    assert Estimate(1.0, 1e-9, 3, 1.0).half_width() == pytest.approx(1.959964, rel=1e-6)
    # errors 3 and 4: total 5, Satterthwaite's degrees of freedom 5^4 / (3^4 / 2)
    assert Estimate(0.0, 3.0, 3, 4.0).df == pytest.approx(2 * 625 / 81)


def test_holm_against_a_worked_example():
    # in order 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never less than the one before
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_of_many_comparisons_each_is_judged_more_strictly():
    clear = estimate([0.010, 0.025, 0.020, 0.015])  # p = 0.013
    assert decide_all([clear]) == [HELD]
    assert decide_all([clear] + [estimate([0.01, -0.01])] * 4) == [UNDECIDED] * 5


def test_power_against_simulation():
    generator = np.random.default_rng(0)
    draws = generator.normal(0.8, 1.0, (20_000, 10))
    found = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05) & (draws.mean(axis=1) > 0)
    assert power(0.8, 1.0, 10) == pytest.approx(found.mean(), abs=0.01)


def test_seeds_and_effects_belong_together():
    assert seeds_needed(1.0, 1.0) == 10  # the textbook's: d = 1, 80 % of 10 pairs
    assert power(1.0, 1.0, 9) < 0.8 <= power(1.0, 1.0, 10)
    smallest = smallest_effect(1.0, 10)
    assert power(smallest, 1.0, 10) == pytest.approx(0.8, abs=1e-6)
    assert smallest_effect(1.0, 1) is None
    assert seeds_needed(0.01, 1.0) is None
    assert seeds_needed(1.0, 0.0) == 2


def test_a_claim_of_several_parts():
    assert all_of([HELD, HELD]) == HELD
    assert all_of([HELD, UNDECIDED]) == UNDECIDED
    assert all_of([UNDECIDED, REFUTED, HELD]) == REFUTED
    assert all_of([]) == UNDECIDED


def test_the_sentence():
    assert say(HELD, 3, "a beats b").sentence == "The claim held here: a beats b."
    assert say(REFUTED, 3, "b beats a").sentence == "The claim is refuted here: b beats a."
    assert say(UNDECIDED, 3, "a is as b").sentence == "Not decided here: a is as b."
    assert say(UNDECIDED, 1, "a is b").sentence == "One seed decides nothing: a is b."
    assert say(UNDECIDED, 0, "").sentence.startswith("Not decided here: no two finished runs")


def test_points():
    assert in_points(estimate([0.01, 0.02, 0.03])) == "+2.00 [-0.48, +4.48]"  # 4.303 * 0.577
    assert in_points(estimate([-0.01])) == "-1.00"
    assert in_points(estimate([])) == "-"
    assert in_points(estimate([-1e-9])) == "+0.00"
