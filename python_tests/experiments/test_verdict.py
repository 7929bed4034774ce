import math

import pytest

from ltood_fast.experiments.verdict import HELD, REFUTED, UNDECIDED, all_of, decide, estimate, in_points, say


@pytest.mark.parametrize(
    ("values", "decision"),
    [
        ([0.01, 0.02, 0.03], HELD),  # mean 0.02, standard error 0.01/sqrt(3) = 0.0058
        ([-0.01, -0.02, -0.03], REFUTED),
        ([0.00, 0.02, 0.04], UNDECIDED),  # standard error 0.0115, twice that is more than the mean
        ([0.0, 0.0], UNDECIDED),
        ([0.01, 0.01], HELD),  # every seed says the same
        ([0.5], UNDECIDED),
        ([], UNDECIDED),
        ([1.0, 3.0], UNDECIDED),  # standard error 1: exactly two of them is not beyond
    ],
)
def test_the_rule(values, decision):
    assert decide(values) == decision


def test_estimate_is_that_of_the_mean():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert estimate([2.0]).error is None


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
    assert in_points(estimate([0.01, 0.02, 0.03])) == "+2.00 ± 0.58"
    assert in_points(estimate([-0.01])) == "-1.00"
    assert in_points(estimate([])) == "-"
    assert in_points(estimate([-1e-9])) == "+0.00"
