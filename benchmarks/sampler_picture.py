"""The OOD sampler at work on made-up points of a plane: the tail's clusters take most of the budget."""

from __future__ import annotations

import matplotlib as mpl
import torch
from torch import Tensor

import ltood_fast
from ltood_fast.eval.plots import STYLE
from ltood_fast.sampling import kmeans

from .picture_style import figure_of, headline, png

SIZES = (700, 420, 250, 60, 36, 20)  # rows of a class
CENTERS = ((-1.4, 0.7), (0.3, 1.0), (1.6, 0.5), (-1.2, -1.0), (0.4, -0.9), (1.7, -1.1))
TAIL = 3  # of the classes, the last ones
WIDTH, POOL, BUDGET, CLUSTERS = 0.28, 3000, 300, 12
HEIGHT = 6.0  # of the plane above the origin: cosines of its points then order them as their distances do
ID, TAKEN, REST = "#0072B2", "#D55E00", "#D0D0D0"


def points() -> tuple[Tensor, Tensor]:
    """(ID rows [N, 2], pool [M, 2])"""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    rows = torch.tensor(CENTERS)[labels] + WIDTH * torch.randn(len(labels), 2, generator=generator)
    pool = torch.rand(POOL, 2, generator=generator) * torch.tensor([5.6, 4.0]) - torch.tensor([2.8, 2.0])
    return rows, pool


def embedded(plane: Tensor) -> Tensor:
    return torch.cat([plane, torch.full((len(plane), 1), HEIGHT)], dim=1)


def draw(source: str = "") -> bytes:
    rows, pool = points()
    centroids, clusters = kmeans(embedded(rows), CLUSTERS, seed=0)
    tailness = ltood_fast.cluster_tailness(embedded(rows), clusters, CLUSTERS)
    chosen, _ = ltood_fast.sample_ood(embedded(pool), centroids, tailness, BUDGET)
    centers = torch.tensor(CENTERS)
    taken = torch.bincount(torch.cdist(pool[chosen], centers).argmin(1), minlength=len(SIZES))
    with mpl.rc_context(STYLE):
        figure = figure_of(9.5, 3.9)
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        left.scatter(*rows.T, s=4, color=ID, alpha=0.5, linewidths=0)
        right.scatter(*pool.T, s=4, color=REST, linewidths=0)
        right.scatter(*pool[chosen].T, s=7, color=TAKEN, linewidths=0)
        for axes, counts in ((left, SIZES), (right, taken.tolist())):
            for (x, y), count in zip(CENTERS, counts, strict=True):
                axes.annotate(str(count), (x, y + 0.72), ha="center", fontsize=9, fontweight="bold",
                              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        left.set_title("ID rows of six classes", loc="left")
        right.set_title(f"pool of {POOL:,}, taken near each class", loc="left")
        share, of = 100 * taken[-TAIL:].sum() / BUDGET, 100 * sum(SIZES[-TAIL:]) / sum(SIZES)
        finding = f"Three tail classes have {of:.0f} % of the rows and get {share:.0f} % of the OOD budget"
        headline(figure, finding, f"made-up points of a plane, budget {BUDGET}, {CLUSTERS} clusters, k = 10, seed 0")
        return png(figure, source)
