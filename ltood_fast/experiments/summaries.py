"""From the outcomes of a grid to tables, picture and verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from .outcomes import TITLES, Judged, Outcomes
from .pictures import forest_figure
from .spec import Comparison, Setting, Summary, Table
from .tables import CONTROL_TITLE, comparisons_table, variants_table
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
    draw: Callable[[list[Judged]], Figure] = forest_figure,
    values: dict[str, Any] | None = None,
) -> Summary:
    """Accuracies with a verdict from the deciding differences; the others are shown as well.

    Args:
        tables, values: what else was found.
        draw: the picture of the differences; by default a forest plot.
    """
    judged = outcomes.judged([*deciding, *also])
    return Summary(
        tables=[variants_table(outcomes), comparisons_table(judged), *tables],
        draw=lambda: draw(judged),
        verdict=verdict_of(judged[: len(deciding)]),
        values={"comparisons": [values_of(one) for one in judged], **(values or {})},
    )


def verdict_of(judged: Sequence[Judged]) -> Verdict:
    """Of a claim that says each of them; the sentence gives them all."""
    decisions = [one.decision for one in judged]
    facts = [
        f"{one.comparison.better} − {one.comparison.worse} ({TITLES[one.comparison.measure]}) "
        + (f"is {in_points(one.found)} points" if one.found.n else "has no pair of runs")
        for one in judged
    ]
    counts = ""
    if len(facts) > MAX_FACTS:
        numbers = (decisions.count(decision) for decision in (HELD, REFUTED, UNDECIDED))
        counts = "of {} differences {} held, {} refuted, {} not decided".format(len(facts), *numbers)
        facts = [fact for fact, decision in zip(facts, decisions, strict=True) if decision == REFUTED]
    least, most = min(one.found.n or math.inf for one in judged), max(one.found.n for one in judged)
    seeds = f"{least} to {most}" if least < most else str(most)
    said = "; ".join(filter(None, [counts, *facts]))
    return say(all_of(decisions), most, f"{said} (mean [95 % interval], {seeds} seed{'s' * (most != 1)})")


def under_control(verdict: Verdict, control: Judged) -> Verdict:
    """The verdict where the positive control gains; none where it does not."""
    comparison, found = control.comparison, control.found
    if control.decision == HELD:
        return verdict
    if found.n == 0:
        why = f"its positive control ({comparison.better} − {comparison.worse}) was not run"
    else:
        pair = f"{comparison.better} − {comparison.worse}"
        why = f"its positive control ({pair}) is {in_points(found)} points, no proven gain"
    facts = verdict.sentence.partition(": ")[2]
    return Verdict(UNDECIDED, f"This page concludes nothing, as {why}. Found: {facts}")


def control_table(control: Judged) -> Table:
    """The positive control: a single test of its own, not corrected."""
    return replace(
        comparisons_table([control]),
        title=CONTROL_TITLE,
        note="Positives are the nearest image of the same class, by the labels: what right neighbours could gain at "
        "most in runs of this size. Where that is no proven gain, runs of this size can show harm, not benefit.",
    )


def values_of(one: Judged) -> dict[str, object]:
    found, interval = one.found, one.found.interval
    return {
        **vars(one.comparison),
        "mean": found.mean if found.n else None,
        "standard_error": found.error,
        "test_images_error": found.test_error,
        "test_images_paired": one.paired_images,
        "low": None if interval is None else interval[0],
        "high": None if interval is None else interval[1],
        "p_holm": one.p,
        "n": found.n,
        "differences": one.differences,
        "decision": one.decision,
    }
