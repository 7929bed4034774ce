"""The pictures of experiments, in the colours of a run's report."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.groups import GROUPS
from ..eval.plots import GROUP_COLORS, GROUP_MARKERS, STYLE
from ..eval.runs import spread
from .outcomes import Outcomes

OVERALL = {"color": "black", "marker": "D"}
SPREAD_COLOR = "#7A4FA3"


def to_png(draw: Callable[[], Figure]) -> bytes:
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png")
    return buffer.getvalue()


def variants_figure(outcomes: Outcomes) -> Figure:
    """A row a variant: accuracy overall and of the groups on the left, their spread on the right; bars are the sample
    standard deviation over the seeds, pale dots the seeds."""
    names = [variant.name for variant in outcomes.variants]
    figure = Figure(figsize=(9.5, 1.5 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    marks = [("overall", OVERALL)]
    marks += [(group, {"color": GROUP_COLORS[group], "marker": GROUP_MARKERS[group]}) for group in GROUPS]
    for i, (measure, mark) in enumerate(marks):
        draw_rows(left, outcomes, names, measure, mark, shift=0.15 * (i - 1.5))
    draw_rows(right, outcomes, names, "std", {"color": SPREAD_COLOR, "marker": "o"}, shift=0.0)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("accuracy, linear probe (%)")
    right.set_xlabel("std of groups (points)")
    for ax in (left, right):
        ax.tick_params(left=False)
        ax.grid(axis="y", visible=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def draw_rows(ax: Axes, outcomes: Outcomes, names: list[str], measure: str, mark: dict, shift: float) -> None:
    """Mean and standard deviation of a measure, in per cent, at the row of each variant."""
    label: str | None = measure.capitalize()
    for row, name in enumerate(names):
        values = [100 * value for value in outcomes.values(name, measure)]
        if (found := spread(values)) is None:
            continue
        ax.errorbar(found.mean, row + shift, xerr=found.std, fmt=mark["marker"], color=mark["color"], markersize=5.5,
                    capsize=2.5, elinewidth=1.2, label=label, zorder=3)  # fmt: skip
        if len(values) > 1:
            ax.scatter(
                values, [row + shift] * len(values), s=9, color=mark["color"], alpha=0.35, linewidths=0, zorder=2
            )
        label = None
