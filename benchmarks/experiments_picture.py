"""One forest plot of all committed experiments: differences paired by seed, with their intervals."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl

from ltood_fast.eval.plots import STYLE

from .picture_style import figure_of, headline, png

COLORS = {"held": "#009E73", "refuted": "#D55E00"}
UNDECIDED = "#7F7F7F"
MEASURES = ("overall", "few")


def draw(experiments: dict[str, dict[str, Any]], source: str = "") -> bytes:
    """Differences in accuracy, overall and of Few, an experiment after the other."""
    rows = [
        (name, difference)
        for name, result in experiments.items()
        for difference in result["comparisons"]
        if difference["measure"] in MEASURES
    ]
    with mpl.rc_context(STYLE):
        figure = figure_of(9.5, 1.5 + 0.36 * len(rows))
        axes = figure.subplots()
        ticks = []
        for i, (name, difference) in enumerate(rows):
            mean, decision = difference["mean"], difference["decision"]
            color = COLORS.get(decision, UNDECIDED)
            axes.errorbar(100 * mean, i, xerr=_bar(difference), fmt="o", color=color, capsize=3, markersize=6)
            said = f"{100 * mean:+.2f}  {decision}, {difference['n']} seeds"
            axes.annotate(said, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=color)
            measure = "Few" if difference["measure"] == "few" else difference["measure"]
            ticks.append(f"{name}: {difference['better']} − {difference['worse']}, {measure}")
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), ticks, fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference in accuracy, points, paired by seed")
        decided = sum(difference["decision"] in COLORS for _, difference in rows)
        headline(
            figure,
            f"{decided or 'None'} of {len(rows)} differences between variants {'is' if decided < 2 else 'are'} decided",
            "CIFAR-10-LT, the preset cifar10_lt_hour of these runs, on a CPU; linear probe; 95 % intervals",
        )
        return png(figure, source)


def _bar(difference: dict[str, Any]) -> list[list[float]]:
    """Below and above the mean in points: the interval that the verdict uses."""
    mean = difference["mean"]
    return [[100 * (mean - difference["low"])], [100 * (difference["high"] - mean)]]
