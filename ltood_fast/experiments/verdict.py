"""Whether a claim held: differences paired by seed, Student's t, Holm's correction, and one stated rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HELD, REFUTED, UNDECIDED = "held", "refuted", "not decided"
ALPHA, POWER = 0.05, 0.8
MOST_SEEDS = 1000  # beyond which no number of seeds is named
RULE = (
    "Intervals are 95 % of Student's t over differences paired by seed, the spread over the seeds and the chance of "
    "the test images together. p is corrected by Holm's method for all differences of this table. A difference is held "
    "or refuted, by its sign, where the corrected p is below 0.05; everything else is not decided."
)


@dataclass(frozen=True)
class Estimate:
    """A mean of n values, one a seed, and what is not known of it."""

    mean: float
    error: float | None
    """Standard error of the mean over the seeds; None for a single one."""
    n: int
    test_error: float = 0.0
    """Standard error from the test images, which all seeds share; known, not estimated from the n values."""

    @property
    def total_error(self) -> float | None:
        return None if self.error is None else math.hypot(self.error, self.test_error)

    @property
    def df(self) -> float:
        """Degrees of freedom of the total error, by Satterthwaite: the test images' part takes none of the n - 1."""
        if not self.error:
            return math.inf
        return (self.n - 1) * (self.total_error / self.error) ** 4

    def half_width(self, alpha: float = ALPHA) -> float | None:
        """Half the interval that holds the mean in 1 - alpha of the cases: that of the seeds alone, t(n - 1), or that
        of seeds and test images, whichever is wider."""
        if self.error is None:
            return None
        return max(
            t_quantile(1 - alpha / 2, self.n - 1) * self.error,
            t_quantile(1 - alpha / 2, self.df) * self.total_error,
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        half = self.half_width()
        return None if half is None else (self.mean - half, self.mean + half)

    @property
    def p(self) -> float | None:
        """Two-sided, of the mean against zero: the larger of those that belong to the two intervals."""
        if self.error is None:
            return None
        return max(_p(self.mean, self.error, self.n - 1), _p(self.mean, self.total_error, self.df))


@dataclass(frozen=True)
class Verdict:
    decision: str
    """held, refuted or not decided"""
    sentence: str


def estimate(values: Sequence[float], test_error: float = 0.0) -> Estimate:
    """Of differences paired by seed; no standard error of a single one."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, None, 0, test_error)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.fmean(values), error, n, test_error)


def t_quantile(p: float, df: float) -> float:
    """Student's; t_quantile(0.975, 2) = 4.30, where the normal distribution has 1.96."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(p) if math.isinf(df) else stdtrit(df, p))


def _p(mean: float, error: float, df: float) -> float:
    from scipy.special import ndtr, stdtr

    if not error:
        return 1.0 if mean == 0 else 0.0
    t = -abs(mean) / error
    return float(2 * (ndtr(t) if math.isinf(df) else stdtr(df, t)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number [Holm 1979]: the chance that any true zero is called a difference stays below
    the level at which the corrected ones are judged. None stays None and counts as no test."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def decide(found: Estimate, p: float | None) -> str:
    """`HELD` where an estimate is above zero and its (corrected) p below 5 %, `REFUTED` where it is below."""
    if p is None or p >= ALPHA:
        return UNDECIDED
    return HELD if found.mean > 0 else REFUTED


def decide_all(found: Sequence[Estimate]) -> list[str]:
    """The decision on each of a family of estimates."""
    return [decide(one, p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def power(effect: float, deviation: float, n: int, alpha: float = ALPHA) -> float:
    """The chance that a paired t test of n seeds finds an effect, at a deviation of the differences over the seeds."""
    from scipy.special import nctdtr

    if n < 2:
        return 0.0
    if deviation == 0:
        return 1.0
    critical, shift = t_quantile(1 - alpha / 2, n - 1), effect / deviation * math.sqrt(n)
    missed = float(nctdtr(n - 1, shift, critical))
    return 1.0 if math.isnan(missed) else 1.0 - missed  # shifts beyond scipy's range are found


def seeds_needed(effect: float, deviation: float) -> int | None:
    """The fewest seeds that find an effect with 80 %; None beyond `MOST_SEEDS`."""
    few, many = 1, MOST_SEEDS
    if power(effect, deviation, many) < POWER:
        return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if power(effect, deviation, middle) >= POWER else (middle, many)
    return many


def smallest_effect(deviation: float, n: int) -> float | None:
    """The smallest effect that n seeds find with 80 %; None of a single seed."""
    if n < 2:
        return None
    low, high = 0.0, 1e-12
    while power(high, deviation, n) < POWER:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, deviation, n) >= POWER else (middle, high)
    return high


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


def points(fraction: float) -> str:
    """A difference of fractions in points (per cent), with its sign."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"  # no -0.00


def in_points(found: Estimate) -> str:
    """Mean and interval of a difference of fractions, in points."""
    if found.n == 0:
        return "-"
    if found.interval is None:
        return points(found.mean)
    low, high = found.interval
    return f"{points(found.mean)} [{points(low)}, {points(high)}]"
