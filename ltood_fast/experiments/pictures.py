"""The pictures of experiments, in the colours of a run's report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.groups import GROUPS
from ..eval.plots import GROUP_COLORS, GROUP_MARKERS, STYLE
from ..eval.runs import spread
from .outcomes import Outcomes

OVERALL = {"color": "black", "marker": "D"}
SPREAD = {"color": "#7A4FA3", "marker": "o"}


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
    accuracy_panel(left, outcomes)
    points = [(row, outcomes.values(name, "std")) for row, name in enumerate(names)]
    errorbar(right, points, SPREAD, "std", horizontal=True)
    right.set_xlabel("std of groups (points)")
    right.tick_params(left=False)
    right.grid(axis="y", visible=False)
    legend_above(figure, left)
    return figure


def accuracy_panel(ax: Axes, outcomes: Outcomes) -> None:
    """A row a variant: accuracy overall and of the groups."""
    names = [variant.name for variant in outcomes.variants]
    marks = {"overall": OVERALL}
    marks |= {group: {"color": GROUP_COLORS[group], "marker": GROUP_MARKERS[group]} for group in GROUPS}
    for i, (measure, mark) in enumerate(marks.items()):
        points = [(row + 0.15 * (i - 1.5), outcomes.values(name, measure)) for row, name in enumerate(names)]
        errorbar(ax, points, mark, measure.capitalize(), horizontal=True)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("accuracy, linear probe (%)")
    ax.tick_params(left=False)
    ax.grid(axis="y", visible=False)


def errorbar(
    ax: Axes, points: Sequence[tuple[float, Sequence[float]]], mark: dict, label: str, *, horizontal: bool = False
) -> None:
    """Mean and sample standard deviation, in per cent, of the values at each place, and the values as pale dots."""
    for place, fractions in points:
        values = [100 * fraction for fraction in fractions]
        if (found := spread(values)) is None:
            continue
        x, y = (found.mean, place) if horizontal else (place, found.mean)
        bars = {"xerr" if horizontal else "yerr": found.std}
        ax.errorbar(x, y, **bars, fmt=mark["marker"], color=mark["color"], markersize=5.5, capsize=2.5,
                    elinewidth=1.2, label=label, zorder=3)  # fmt: skip
        if len(values) > 1:
            same = [place] * len(values)
            dots = (values, same) if horizontal else (same, values)
            ax.scatter(*dots, s=9, color=mark["color"], alpha=0.35, linewidths=0, zorder=2)


def legend_above(figure: Figure, ax: Axes) -> None:
    """Of one panel, each label once."""
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=len(once))
