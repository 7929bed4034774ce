"""The pictures of experiments, in the colours of a run's report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.plots import STYLE
from .outcomes import TITLES, Judged
from .verdict import HELD, REFUTED, UNDECIDED

OVERALL = {"color": "black", "marker": "D"}
DECIDED = {HELD: "#1B7837", REFUTED: "#B2182B", UNDECIDED: "#606060"}


def to_png(draw: Callable[[], Figure]) -> bytes:
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png")
    return buffer.getvalue()


def forest_figure(judged: Sequence[Judged]) -> Figure:
    """A row a comparison: its mean and 95 % interval, the seeds as pale dots, a line at no difference."""
    figure = Figure(figsize=(8.5, 1.4 + 0.42 * len(judged)), layout="constrained")
    ax = figure.subplots()
    forest_panel(ax, judged)
    ax.set_title(finding(judged), loc="left")
    return figure


def forest_panel(ax: Axes, judged: Sequence[Judged]) -> None:
    """Differences paired by seed; those that are decided in colour."""
    names = []
    for row, one in enumerate(judged):
        comparison = one.comparison
        note = ", lower is better" if comparison.sign < 0 else ""
        names.append(f"{comparison.better} − {comparison.worse} ({TITLES[comparison.measure]}{note})")
        difference_mark(ax, row, one)
    ax.axvline(0, color="#808080", linewidth=1, zorder=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("difference (points), mean and 95 % interval, a dot a seed")
    ax.tick_params(left=False)
    ax.grid(axis="y", visible=False)


def difference_mark(ax: Axes, place: float, one: Judged, *, upright: bool = False) -> None:
    """A difference at a row, or at a column where it is upright."""
    found = one.found
    if found.n == 0:
        return
    color = DECIDED[one.decision]
    values = [100 * value for value in one.differences]
    half = 100 * (found.half_width() or 0.0)
    same, dots = [place + 0.2] * len(values), {"s": 10, "color": color, "alpha": 0.4, "linewidths": 0, "zorder": 2}
    mark = {"fmt": "D", "color": color, "markersize": 5, "capsize": 3, "elinewidth": 1.4, "zorder": 3}
    if upright:
        ax.scatter(same, values, **dots)
        ax.errorbar(place, 100 * found.mean, yerr=half, **mark)
    else:
        ax.scatter(values, same, **dots)
        ax.errorbar(100 * found.mean, place, xerr=half, **mark)


def finding(judged: Sequence[Judged]) -> str:
    """The title: how many of the differences are decided."""
    decided = sum(one.decision != UNDECIDED for one in judged)
    return f"{decided} of {len(judged)} difference{'s' * (len(judged) != 1)} decided"


def legend_above(figure: Figure, ax: Axes) -> None:
    """Of one panel, each label once."""
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=len(once))
