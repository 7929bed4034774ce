"""One option at a time away from the preset: is the source's value the best one?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..train.config import Config
from .outcomes import Judged, Outcomes
from .pictures import difference_mark
from .spec import Comparison, Experiment, Setting, Summary, Variant
from .summaries import summary_of
from .variants import FULL, NO_DISTILLATION, NO_DOMAIN, ORACLE_GAINS, TAILNESS, guided

SHARED = {"alpha-0": NO_DOMAIN, "beta-0": NO_DISTILLATION}  # under another name


@dataclass(frozen=True)
class Option:
    """An option, the other values tried, and the variant that has the preset's."""

    name: str
    title: str
    key: str
    base: Variant
    own: float
    others: tuple[float, ...]
    claimed: bool
    """The source names this option's value as the best."""

    def variants(self) -> Iterator[tuple[float, Variant]]:
        """(value, variant) of all values in ascending order."""
        for value in sorted({self.own, *self.others}):
            name = f"{self.name}-{value:.10g}"
            if value == self.own:
                yield value, self.base
            elif name in SHARED:
                yield value, SHARED[name]
            elif self.base is FULL:
                yield value, guided(name, **{self.key.removeprefix("stage2."): f"{value:.10g}"})
            else:
                yield value, Variant(name, {**TAILNESS.overrides, self.key: f"{value:.10g}"})


def options(config: Config) -> list[Option]:
    """Sizes in proportion to the preset's, weights around the source's."""
    s1, pool = config.stage1, config.data.ood_size
    budgets = {s1.budget // 4, s1.budget // 2, min(2 * s1.budget, pool or 2 * s1.budget)} - {0}
    paces = {max(1, s1.resample_every // 2), 2 * s1.resample_every}
    clusters = {max(1, s1.clusters // 2), 2 * s1.clusters, 10 * s1.clusters}
    return [
        Option("budget", "N_b, OOD images", "stage1.budget", TAILNESS, s1.budget, tuple(budgets), True),
        Option("every", "T, epochs", "stage1.resample_every", TAILNESS, s1.resample_every, tuple(paces), True),
        Option("alpha", "alpha", "stage1.alpha", TAILNESS, s1.alpha, (0.0, 0.1, 1.0), True),
        Option("beta", "beta", "stage2.beta", FULL, config.stage2.beta, (0.0, 0.2, 0.8), True),
        Option("k", "k, pseudo-positives", "stage1.k", TAILNESS, s1.k, (1, 2, 5), False),
        Option("clusters", "clusters", "stage1.clusters", TAILNESS, s1.clusters, tuple(clusters), False),
    ]


def variants(setting: Setting) -> list[Variant]:
    listed = [variant for option in options(setting.config) for _, variant in option.variants()]
    return list({variant.name: variant for variant in [TAILNESS, FULL, *listed]}.values())


def figure(setting: Setting, judged: list[Judged]) -> Figure:
    """A panel an option: what the preset's value gains over each other one, overall; a line marks the preset's."""
    shown = options(setting.config)
    fig = Figure(figsize=(11.5, 6.2), layout="constrained")
    axes = fig.subplots(2, 3).flatten()
    for ax, option in zip(axes, shown, strict=True):
        values, tried = zip(*option.variants(), strict=True)
        _draw(ax, option.base.name, [variant.name for variant in tried], judged)
        ax.axvline(values.index(option.own), color="#B0B0B0", linestyle=":", linewidth=1.2, zorder=1)
        ax.set_xticks(range(len(values)), [f"{value:.10g}" for value in values])
        ax.set_xlabel(option.title + (" (stage 2)" if option.base is FULL else ""))
    for ax in axes[::3]:
        ax.set_ylabel("gain of the preset's value (points)")
    return fig


def _draw(ax: Axes, base: str, names: list[str], judged: list[Judged]) -> None:
    ax.axhline(0, color="#808080", linewidth=1, zorder=1)
    for one in judged:
        if one.comparison.better == base and one.comparison.worse in names:
            difference_mark(ax, names.index(one.comparison.worse), one, upright=True)


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    shown = options(setting.config)
    pairs = {
        option.name: [
            Comparison(option.base.name, variant.name) for _, variant in option.variants() if variant is not option.base
        ]
        for option in shown
    }
    claimed = [comparison for option in shown if option.claimed for comparison in pairs[option.name]]
    others = [comparison for option in shown if not option.claimed for comparison in pairs[option.name]]
    grid = {option.name: {f"{value:.10g}": variant.name for value, variant in option.variants()} for option in shown}
    return summary_of(outcomes, claimed, others, draw=lambda judged: figure(setting, judged), values={"options": grid})


SENSITIVITY = Experiment(
    "sensitivity",
    "are the source's N_b, T, alpha and beta the best, and what do k and the number of clusters change?",
    "N_b = 10,000, T = 25, alpha = 0.3 and beta = 0.4 are the best values [paper]; N_b and T "
    "in proportion to the preset.",
    variants,
    summarise,
    ORACLE_GAINS,
)
