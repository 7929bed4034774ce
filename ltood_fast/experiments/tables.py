"""Tables in Markdown: variants in rows, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

from .outcomes import TITLES, Outcomes
from .spec import Comparison, Table
from .verdict import RULE, in_points


def variants_table(outcomes: Outcomes) -> Table:
    """What is known of each variant: mean ± sample standard deviation over its seeds."""
    measures = outcomes.known
    rows = []
    for variant in outcomes.variants:
        n, cells = len(outcomes.of(variant.name)), []
        for measure in measures:
            found = outcomes.spread(variant.name, measure.key)
            fewer = f" (n = {found.n})" if found and found.n < n else ""
            cells.append(found.text(measure) + fewer if found else "-")
        rows.append([variant.name, str(n), *cells])
    return Table(
        "Accuracy",
        ["variant", "seeds", *(measure.title for measure in measures)],
        rows,
        "Linear probe and kNN on the balanced test set in per cent, mean ± sample standard deviation over the seeds; "
        "std: how far Many, Medium and Few lie apart, in points.",
    )


def comparisons_table(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Table:
    """Paired differences in points, their standard error, and what the rule says of them."""
    rows = []
    for comparison in comparisons:
        found = outcomes.compared(comparison)
        pair = f"{comparison.better} − {comparison.worse}"
        measured = [TITLES[comparison.measure], str(found.n), in_points(found)]
        rows.append([pair, *measured, outcomes.decided(comparison)])
    header = ["difference", "of", "seeds", "mean ± standard error (points)", "the first is better"]
    return Table("Differences, paired by seed", header, rows, RULE + " A lower std is the better one.")


def to_markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", _row(table.header), _row(["---"] * len(table.header))]
    lines += [_row(row) for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
