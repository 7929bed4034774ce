"""From the outcomes of a grid to tables, picture and verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from .outcomes import TITLES, Outcomes
from .pictures import variants_figure
from .spec import Comparison, Setting, Summary, Table
from .tables import comparisons_table, variants_table
from .verdict import HELD, REFUTED, UNDECIDED, Verdict, all_of, in_points, say

MAX_FACTS = 4  # differences that the sentence names one by one; of more, those that are refuted


def compare(deciding: Sequence[Comparison], also: Sequence[Comparison] = ()) -> Callable[[Setting, Outcomes], Summary]:
    """How an experiment of accuracies alone is summarised, see `summary_of`."""
    return lambda setting, outcomes: summary_of(outcomes, deciding, also)


def summary_of(
    outcomes: Outcomes,
    deciding: Sequence[Comparison],
    also: Sequence[Comparison] = (),
    *,
    tables: Sequence[Table] = (),
    draw: Callable[[], Figure] | None = None,
    values: dict[str, Any] | None = None,
) -> Summary:
    """Accuracies with a verdict from the deciding differences; the others are shown beside them.

    Args:
        tables, values: what else was found.
        draw: the picture; by default that of the accuracies.
    """
    comparisons = [*deciding, *also]
    return Summary(
        tables=[variants_table(outcomes), comparisons_table(outcomes, comparisons), *tables],
        draw=draw or (lambda: variants_figure(outcomes)),
        verdict=judge(outcomes, deciding),
        values={"comparisons": [_values(outcomes, comparison) for comparison in comparisons], **(values or {})},
    )


def judge(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Verdict:
    """Of a claim that says each of them; the sentence gives them all."""
    found = [outcomes.compared(comparison) for comparison in comparisons]
    decisions = [outcomes.decided(comparison) for comparison in comparisons]
    facts = [
        f"{comparison.better} − {comparison.worse} ({TITLES[comparison.measure]}) "
        + (f"is {in_points(difference)} points" if difference.n else "has no pair of runs")
        for comparison, difference in zip(comparisons, found, strict=True)
    ]
    counts = ""
    if len(facts) > MAX_FACTS:
        numbers = (decisions.count(decision) for decision in (HELD, REFUTED, UNDECIDED))
        counts = "of {} differences {} held, {} refuted, {} not decided".format(len(facts), *numbers)
        facts = [fact for fact, decision in zip(facts, decisions, strict=True) if decision == REFUTED]
    least, most = min(d.n or math.inf for d in found), max(d.n for d in found)
    seeds = f"{least} to {most}" if least < most else str(most)
    said = "; ".join(filter(None, [counts, *facts]))
    return say(all_of(decisions), most, f"{said} (mean ± standard error, {seeds} seed{'s' * (most != 1)})")


def _values(outcomes: Outcomes, comparison: Comparison) -> dict[str, object]:
    found = outcomes.compared(comparison)
    return {
        **vars(comparison),
        "mean": found.mean if found.n else None,
        "standard_error": found.error,
        "n": found.n,
        "decision": outcomes.decided(comparison),
    }
