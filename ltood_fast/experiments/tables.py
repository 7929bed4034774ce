"""Tables in Markdown: variants in rows, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

from .outcomes import TITLES, Judged, Outcomes
from .spec import Table
from .verdict import MOST_SEEDS, RULE, in_points, seeds_needed, smallest_effect

ACCURACY_TITLE, DIFFERENCES_TITLE, CONTROL_TITLE = "Accuracy", "Differences, paired by seed", "Positive control"


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
        ACCURACY_TITLE,
        ["variant", "seeds", *(measure.title for measure in measures)],
        rows,
        "Linear probe and kNN on the balanced test set in per cent, mean ± sample standard deviation over the seeds; "
        "std: how far Many, Medium and Few lie apart, in points.",
    )


def comparisons_table(judged: Sequence[Judged]) -> Table:
    """Paired differences in points with their interval, the decision, and what the seeds could have found."""
    rows = []
    for one in judged:
        comparison, found = one.comparison, one.found
        rows.append([
            f"{comparison.better} − {comparison.worse}",
            TITLES[comparison.measure],
            str(found.n),
            in_points(found),
            "-" if found.error is None else f"{100 * one.deviation:.2f}",
            _image_cell(one),
            "-" if one.p is None else f"{one.p:.3f}",
            one.decision,
            *_power_cells(one),
        ])  # fmt: skip
    header = [
        "difference", "of", "seeds", "mean [95 % interval] (points)", "deviation over seeds", "error from test images",
        "p (Holm)", "the first is better", "found with 80 %", "seeds for 1 point",
    ]  # fmt: skip
    note = (
        f"{RULE} A lower std is the better one. An error from test images with ≤ is the bound for unpaired answers, "
        "where runs do not say which images they got right; the true one is smaller. Found with 80 %: the smallest "
        "difference that a paired t test of so many seeds finds in 80 of 100 trials; seeds for 1 point: how many seeds "
        "find a difference of 1 point as often; both from the deviation over the seeds, without correction."
    )
    return Table(DIFFERENCES_TITLE, header, rows, note)


def _image_cell(one: Judged) -> str:
    """The test images' part of the error; 0 where paired answers show none beyond the spread over the seeds."""
    if one.paired_images:
        return f"{100 * one.found.test_error:.2f}"
    return f"≤ {100 * one.found.test_error:.2f}" if one.found.test_error else "-"


def _power_cells(one: Judged) -> list[str]:
    if one.deviation is None:
        return ["-", "-"]
    smallest, seeds = smallest_effect(one.deviation, one.found.n), seeds_needed(0.01, one.deviation)
    return [f"{100 * smallest:.2f}", f"> {MOST_SEEDS}" if seeds is None else str(seeds)]


def to_markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", _row(table.header), _row(["---"] * len(table.header))]
    lines += [_row(row) for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
