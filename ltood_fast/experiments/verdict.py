"""Whether a claim held: differences paired by seed, and one stated rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HELD, REFUTED, UNDECIDED = "held", "refuted", "not decided"
RULE = (
    "A difference counts when its mean over the paired seeds is more than two standard errors from zero: held or "
    "refuted by its sign, otherwise not decided. That is a rule of thumb: chance alone passes it in 30 of 100 cases "
    "with two seeds, in 18 with three, in 8 with ten. One seed decides nothing."
)


@dataclass(frozen=True)
class Estimate:
    """Mean, standard error of the mean, and how many there were."""

    mean: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Verdict:
    decision: str
    """held, refuted or not decided"""
    sentence: str


def estimate(values: Sequence[float]) -> Estimate:
    """Of differences paired by seed; no standard error of a single one."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, None, 0)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.fmean(values), error, n)


def decide(values: Sequence[float]) -> str:
    """`HELD` where the values, one a seed, are above zero beyond two standard errors of their mean, `REFUTED` below."""
    found = estimate(values)
    if found.error is None or abs(found.mean) <= 2 * found.error:
        return UNDECIDED
    return HELD if found.mean > 0 else REFUTED


def all_of(decisions: Sequence[str]) -> str:
    """A claim of several parts holds if each does, and falls with the first that is refuted."""
    if REFUTED in decisions:
        return REFUTED
    return HELD if decisions and all(decision == HELD for decision in decisions) else UNDECIDED


def say(decision: str, n: int, facts: str) -> Verdict:
    """The one sentence: the decision, then the numbers it comes from."""
    if n == 0:
        return Verdict(UNDECIDED, "Not decided here: no two finished runs of one seed can be compared.")
    opening = {
        HELD: "The claim held here",
        REFUTED: "The claim is refuted here",
        UNDECIDED: "One seed decides nothing" if n == 1 else "Not decided here",
    }[decision]
    return Verdict(decision, f"{opening}: {facts}.")


def in_points(found: Estimate) -> str:
    """A difference of fractions in points (per cent): mean ± standard error."""
    if found.n == 0:
        return "-"
    error = "" if found.error is None else f" ± {100 * found.error:.2f}"
    return f"{round(100 * found.mean, 2) + 0.0:+.2f}{error}"  # no -0.00
