"""Does tailness still rank clusters and classes by rarity at extreme imbalance and in many dimensions?

Twice: on synthetic Gaussian classes, where imbalance and dimension are free, and on trained networks, where features
are what training makes of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import ltood_fast

from ..data.longtail import exponential_counts
from ..eval.plots import PART_COLORS
from ..eval.runs import spread
from ..sampling.resample import cluster_embeddings
from .outcomes import Outcome, Outcomes
from .paper_claims import balanced_source
from .pictures import legend_above
from .spec import Experiment, Setting, Summary, Table, Variant
from .tables import variants_table
from .variants import TAILNESS
from .verdict import HELD, all_of, decide_all, estimate, say

RATIOS = (100, 500, 1000)
FEATURES = (128, 512, 2048)
TRAINED_OUT = (128, 2048)  # widths of the projection that is clustered, at the first ratio
CLASSES, LARGEST, CLUSTERS = 10, 2000, 10
INTRINSIC = 16  # dimensions that a class varies in, where not in all
SPREAD = 1.0  # length of a row's way from its class's centre, whose length is 1
UNEVEN = 2.0  # kind "uneven": a class's spread is up to so many times as large or as small
KINDS = {
    "few": f"classes vary alike in {INTRINSIC} dimensions",
    "all": "classes vary alike in all dimensions",
    "uneven": f"they vary in {INTRINSIC}, not alike",
}


@dataclass(frozen=True)
class Cell:
    """A synthetic set."""

    ratio: int
    features: int
    kind: str

    @property
    def intrinsic(self) -> int:
        """Dimensions in which a class varies."""
        return self.features if self.kind == "all" else min(INTRINSIC, self.features)

    def __str__(self) -> str:
        return f"{self.kind}, ratio {self.ratio}, {self.features} features"


def gaussian_classes(cell: Cell, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Unit rows [N, D], labels [N] and class sizes: random centres and noise. Where it is of one strength for all
    classes, rarity alone makes a class sparse."""
    generator = torch.Generator().manual_seed(seed)
    counts = exponential_counts(LARGEST, CLASSES, cell.ratio)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    centres = F.normalize(torch.randn(CLASSES, cell.features, generator=generator), dim=1)
    spreads = torch.full((CLASSES, 1), SPREAD / math.sqrt(cell.intrinsic))
    if cell.kind == "uneven":
        spreads *= UNEVEN ** (2 * torch.rand(CLASSES, 1, generator=generator) - 1)
    noise = spreads[labels] * torch.randn(len(labels), cell.intrinsic, generator=generator)
    if cell.intrinsic < cell.features:  # each class in directions of its own
        axes = torch.randn(CLASSES, cell.features, cell.intrinsic, generator=generator)
        axes = torch.linalg.qr(axes).Q
        noise = torch.cat([noise[labels == c] @ axes[c].T for c in range(CLASSES)])
    return F.normalize(centres[labels] + noise, dim=1), labels, counts


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where one of them does not vary."""
    from scipy.stats import spearmanr

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def cluster_correlation(tailness: Tensor, cluster_classes: Tensor, class_counts: list[int]) -> float:
    """Between the tailness of clusters and the rarity of what is in them: the mean of -log(images of the class)."""
    rarity = -torch.tensor(class_counts, dtype=torch.float64).clamp(min=1).log()
    sizes = cluster_classes.sum(dim=1)
    known = (sizes > 0) & tailness.isfinite()
    return rank_correlation(tailness[known], (cluster_classes.double() @ rarity)[known] / sizes[known])


def synthetic(cell: Cell, seed: int) -> dict[str, float]:
    """Correlation of sparsity with rarity, a class at a time, and of tailness with rarity, a cluster at a time."""
    rows, labels, counts = gaussian_classes(cell, seed)
    sparsity = ltood_fast.knn_density(rows, 10).double()
    of_class = torch.stack([sparsity[labels == c].mean() for c in range(CLASSES)])
    rarity = -torch.tensor(counts, dtype=torch.float64).log()
    assignments = cluster_embeddings(rows, CLUSTERS, seed=seed).assignments
    sizes = torch.bincount(assignments, minlength=CLUSTERS)
    tailness = torch.bincount(assignments, weights=sparsity, minlength=CLUSTERS) / sizes
    cells = torch.bincount(assignments * CLASSES + labels, minlength=CLUSTERS * CLASSES).view(CLUSTERS, CLASSES)
    return {
        "classes": rank_correlation(of_class, rarity),
        "clusters": cluster_correlation(tailness, cells, counts),
    }


def cells() -> list[Cell]:
    return [Cell(ratio, D, kind) for kind in KINDS for ratio in RATIOS for D in FEATURES]


def trained_variants(setting: Setting) -> list[Variant]:
    """Stage 1 of the source at each ratio, made from a balanced set; and clustered in a wide projection."""

    def variant(name: str, ratio: int, **overrides: str) -> Variant:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        return Variant(name, {**TAILNESS.overrides, **balanced_source(setting), "data.imbalance": str(ratio), **keys})

    return [
        *(variant(f"ratio-{ratio}", ratio) for ratio in RATIOS),
        *(variant(f"ratio-{RATIOS[0]}-projection-{out}", RATIOS[0], model__out=str(out),
                  stage1__cluster_space="projection") for out in TRAINED_OUT),
    ]  # fmt: skip


def trained(outcome: Outcome) -> float:
    """The correlation over the clusters of the last re-sampling; NaN of a run without one."""
    samplings = [sample for sample in outcome.report.get("resamplings", ()) if sample.get("cluster_classes")]
    if not samplings:
        return math.nan
    tailness = torch.tensor([math.nan if t is None else t for t in samplings[-1]["tailness"]], dtype=torch.float64)
    return cluster_correlation(tailness, torch.tensor(samplings[-1]["cluster_classes"]), outcome.report["class_counts"])


def summarise(setting: Setting, outcomes: Outcomes) -> Summary:
    found = {cell: [synthetic(cell, seed) for seed in setting.seeds] for cell in cells()}
    networks = {v.name: [trained(outcome) for outcome in outcomes.of(v.name)] for v in outcomes.variants}
    by_cluster = {
        **{str(cell): [run["clusters"] for run in runs] for cell, runs in found.items()},
        **networks,
    }
    known = {name: estimate(_finite(values)) for name, values in by_cluster.items() if values}
    decisions = dict(zip(known, decide_all(list(known.values())), strict=True))
    means = [estimate(_finite(values)).mean for values in by_cluster.values() if _finite(values)]
    low, high = min(means, default=math.nan), max(means, default=math.nan)
    said = f"the rank correlation of tailness and rarity lies between {low:+.2f} and {high:+.2f}"
    n = max(len(values) for values in by_cluster.values())
    if n > 1:
        failing = [name for name, decision in decisions.items() if decision != HELD]
        said += f"; it is above zero in {len(decisions) - len(failing)} of {len(decisions)} cases"
        said += f", not so in {'; '.join(failing)}" if failing else ""
    return Summary(
        [_synthetic_table(found), _trained_table(outcomes, networks), variants_table(outcomes)],
        lambda: figure(found, networks),
        say(all_of(list(decisions.values())), n, f"{said} ({n} seed{'s' * (n != 1)})"),
        {
            "synthetic": [{**vars(cell), "runs": runs} for cell, runs in found.items()],
            "trained": networks,
            "decisions": decisions,
        },
    )


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: list[float]) -> str:
    found = estimate(_finite(values))
    return "-" if found.n == 0 else f"{found.mean:+.2f}" + ("" if found.error is None else f" ± {found.error:.2f}")


def _synthetic_table(found: dict[Cell, list[dict[str, float]]]) -> Table:
    rows = [
        [KINDS[cell.kind], str(cell.ratio), str(cell.features)]
        + [_mean([run[key] for run in runs]) for key in ("classes", "clusters")]
        for cell, runs in found.items()
    ]
    note = (
        "Spearman's rank correlation with rarity, mean ± standard error over the seeds: of a class's mean sparsity, "
        f"and of the tailness of {CLUSTERS} clusters (rarity of a cluster: the mean of -log(class size) of its rows). "
        f"{CLASSES} Gaussian classes of at most {LARGEST:,} rows."
    )
    return Table("Synthetic classes", ["kind", "ratio", "features", "classes", "clusters"], rows, note)


def _trained_table(outcomes: Outcomes, networks: dict[str, list[float]]) -> Table:
    rows = [[name, str(len(outcomes.of(name))), _mean(values)] for name, values in networks.items()]
    return Table("Trained networks", ["variant", "seeds", "clusters"], rows, "The same, of the last re-sampling.")


def figure(found: dict[Cell, list[dict[str, float]]], networks: dict[str, list[float]]) -> Figure:
    """Correlation over clusters: synthetic against the number of features, a line a ratio; and of trained networks."""
    fig = Figure(figsize=(15.0, 4.4), layout="constrained")
    *synthetic_axes, nets = fig.subplots(1, len(KINDS) + 1, sharey=True)
    for ax, (kind, title) in zip(synthetic_axes, KINDS.items(), strict=True):
        for i, ratio in enumerate(RATIOS):
            mine = [cell for cell in found if cell.ratio == ratio and cell.kind == kind]
            spreads = [spread(run["clusters"] for run in found[c]) for c in mine]
            points = [(c.features, s.mean, s.std or 0) for c, s in zip(mine, spreads, strict=True) if s]
            if points:
                x, y, bars = zip(*points, strict=True)
                ax.errorbar(x, y, yerr=bars, marker="o", markersize=4, color=PART_COLORS[i], capsize=2.5,
                            label=f"ratio {ratio}")  # fmt: skip
        ax.set(xscale="log", xlabel="features", title=title)
        ax.set_xticks(FEATURES, [str(D) for D in FEATURES])
        ax.minorticks_off()
    synthetic_axes[0].set(ylabel="rank correlation, tailness and rarity of clusters", ylim=(-1.05, 1.05))
    for i, values in enumerate(networks.values()):
        nets.scatter([i] * len(values), values, color="black", s=22, alpha=0.6, linewidths=0)
    nets.set_xticks(range(len(networks)), [name.replace("-projection", "\nprojection") for name in networks],
                    fontsize=8, rotation=20)  # fmt: skip
    nets.set_title("trained networks, a dot a seed")
    legend_above(fig, synthetic_axes[0])
    return fig


EXTREME_IMBALANCE = Experiment(
    "extreme-imbalance",
    "does tailness still rank clusters by rarity at ratios of 100 to 1,000 and 128 to 2,048 features?",
    "Tailness from the sparsity of neighbourhoods finds the rare clusters [paper], also beyond a ratio of 100 "
    "and in many dimensions (left open by the source).",
    trained_variants,
    summarise,
    "Classes that differ in nothing but their number are part of the trial: there rarity alone makes a class sparse.",
)
