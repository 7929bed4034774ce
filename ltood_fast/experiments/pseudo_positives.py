"""Which nearest neighbours may be positives, from where, and at what weight."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..eval.plots import PART_COLORS
from .outcomes import Judged, Outcomes
from .pictures import finding, forest_panel
from .spec import Comparison, Experiment, Setting, Summary, Table, Variant
from .summaries import summary_of
from .variants import NO_NEIGHBORS, ORACLE_GAINS, TAILNESS, unless_same

PURITIES = {"neighbor_purity": "all rows", "neighbor_purity_few": "rows of few classes"}
SMALL_WEIGHT = "0.25"
LINES = ("-", "--", ":")


def variants(setting: Setting) -> list[Variant]:
    """Off, full weight, weights, places; every one but the first and its own with full weights from the batch."""
    plain = {"neighbors": "in_batch", "neighbor_weight": "1", "neighbor_weighting": "none"}

    def with_neighbors(name: str, **options: str) -> Variant:
        return Variant(name, {f"stage1.{key}": value for key, value in {**plain, **options}.items()})

    return [
        NO_NEIGHBORS,
        unless_same(setting, with_neighbors("full-weight"), TAILNESS),
        with_neighbors("small-weight", neighbor_weight=SMALL_WEIGHT),
        *(with_neighbors(f"{weighting}-weight", neighbor_weighting=weighting)
          for weighting in ("density", "gate", "mutual")),
        *(with_neighbors(f"from-{place}", neighbors=place) for place in ("queue", "dataset")),
    ]  # fmt: skip


def purity(outcomes: Outcomes, variant: str, key: str) -> list[tuple[int, float]]:
    """(epoch, mean over the seeds) of the epochs that know it."""
    by_epoch: dict[int, list[float]] = {}
    for outcome in outcomes.of(variant):
        for line in outcome.history:
            if line.get(key) is not None:
                by_epoch.setdefault(line["epoch"], []).append(line[key])
    return [(epoch, statistics.fmean(values)) for epoch, values in sorted(by_epoch.items())]


def purity_table(outcomes: Outcomes) -> Table:
    """Share of the nearest neighbours that are of the row's own class, at the first, middle and last epoch."""
    rows = []
    for variant in outcomes.variants:
        cells = []
        for key in PURITIES:
            found = purity(outcomes, variant.name, key)
            shown = [found[0], found[len(found) // 2], found[-1]] if found else []
            cells += [f"{100 * share:.1f}" for _, share in shown] or ["-"] * 3
        rows.append([variant.name, *cells])
    header = [f"{when}, {rows_of}" for rows_of in PURITIES.values() for when in ("first", "middle", "last")]
    note = (
        "Share of the nearest neighbours that are of the row's own class (for the log: no label is trained on), in per "
        "cent, mean over the seeds, at the first, middle and last epoch that has pseudo-positives. All neighbours "
        "count, whatever their weight."
    )
    return Table("Purity of the neighbours", ["variant", *header], rows, note)


def figure(outcomes: Outcomes, judged: list[Judged]) -> Figure:
    """Differences on the left; purity over training on the right, overall and for the few classes."""
    fig = Figure(figsize=(15.0, 1.5 + 0.5 * len(outcomes.variants)), layout="constrained")
    left, *rest = fig.subplots(1, 3, width_ratios=(2, 1.3, 1.3))
    forest_panel(left, judged)
    left.set_title(finding(judged), loc="left")
    for ax, (key, rows_of) in zip(rest, PURITIES.items(), strict=True):
        _draw_purity(ax, outcomes, key)
        ax.set(title=f"purity, {rows_of}", xlabel="epoch", ylabel="own class (%)", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    rest[0].legend(fontsize=8, loc="lower right")
    return fig


def _draw_purity(ax: Axes, outcomes: Outcomes, key: str) -> None:
    for i, variant in enumerate(outcomes.variants):
        if found := purity(outcomes, variant.name, key):
            epochs, shares = zip(*found, strict=True)
            style = {"color": PART_COLORS[i % len(PART_COLORS)], "linestyle": LINES[i // len(PART_COLORS)]}
            ax.plot(epochs, [100 * share for share in shares], label=variant.name, linewidth=1.5, **style)


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    off, full, *others = [variant.name for variant in outcomes.variants]
    shares = {
        variant.name: {key: dict(purity(outcomes, variant.name, key)) for key in PURITIES}
        for variant in outcomes.variants
    }
    return summary_of(
        outcomes,
        [Comparison(full, off)],
        [Comparison(full, off, "few"), *(Comparison(other, off) for other in others)],
        tables=[purity_table(outcomes)],
        draw=lambda judged: figure(outcomes, judged),
        values={"purity": shares},
    )


PSEUDO_POSITIVES = Experiment(
    "pseudo-positives",
    "do nearest neighbours help as positives, at which weight, from where?",
    "Nearest neighbours as positives encode semantic similarity without labels and separate classes better [paper].",
    variants,
    summarise,
    ORACLE_GAINS,
)
