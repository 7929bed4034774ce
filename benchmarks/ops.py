"""What every op of the benchmark is: its inputs from a seed, its definition, what of its result is compared, its work.

Legend: N rows, D features, K clusters, k neighbours, u = one product of N×N×D, 2 N² D FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ltood_fast.reference import clustering, contrastive, guided

if TYPE_CHECKING:
    from .cases import Case

NEIGHBORS = 7  # positives of a row in the guide's space
KMEANS_STEPS = 10
ROWS = 2048  # rows of a similarity matrix at a time, where it is too large to be in memory


@dataclass(frozen=True)
class Work:
    """The least arithmetic known for an op among the schemes that never store an N×N matrix, forward and backward.

    A similarity matrix of one set of rows is symmetric: 0.5 u each time it is needed, and it is needed in both
    directions. The gradient of a self-similarity loss is one product, G u with G = P + Pᵀ: 1 u.
    """

    products: tuple[float, float]
    """In u; for ops with `by_clusters` in products of N×K×D."""
    exps: tuple[float, float]
    """Exponentials or logarithms, in N² (N K)."""
    passes: tuple[float, float]
    """Inputs read and gradients written, in N D elements."""
    by_clusters: bool = False

    def amounts(self, case: Case) -> tuple[float, float, float]:
        """(FLOP, exponentials, bytes) of a case in its direction."""
        both = case.direction == "forward+backward"
        products, exps, passes = (value[0] + value[1] * both for value in (self.products, self.exps, self.passes))
        pairs = case.N * (case.K if self.by_clusters else case.N)
        return products * 2 * pairs * case.D, exps * pairs, passes * case.N * case.D * case.torch_dtype.itemsize


@dataclass(frozen=True)
class Op:
    """An op of the benchmark. All its implementations take the keyword arguments that `inputs` makes."""

    inputs: Callable[[Case, torch.Generator], dict]
    definition: Callable
    """Plain PyTorch; in float64 it is what implementations are compared with."""
    work: Work
    outcome: Callable[[object, dict], Tensor] | None = None
    """What of a search's result is compared. None: a loss, compared together with its gradients."""


def _rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator)


def _groups(n: int, d: int, members: int, generator: torch.Generator) -> Tensor:
    """[n, d], each `members` rows in turn around one centre: a row's nearest `members` - 1 are certain, so that the
    rounding of a 16-bit input cannot choose others than the reference does."""
    centres = _rows(-(-n // members), d, generator).repeat_interleave(members, 0)[:n]
    return centres + 0.5 * _rows(n, d, generator)


def _pair_inputs(case: Case, generator: torch.Generator) -> dict:
    return {"z": _rows(case.N, case.D, generator), "temperature": case.temperature}


def _neighbor_inputs(case: Case, generator: torch.Generator) -> dict:
    """Two views of N/2 images, the images in pairs of neighbours, nearest in the same view."""
    views = [_groups(case.N // 2, case.D, 2, generator) for _ in range(2)]
    shared = _rows(case.N // 2, case.D, generator)
    return {"z": torch.cat([0.3 * shared + view for view in views]), "temperature": case.temperature}


def _stage1_inputs(case: Case, generator: torch.Generator) -> dict:
    domain = torch.randint(0, 2, (case.N // 4,), generator=generator).repeat_interleave(2).repeat(2)
    return {**_neighbor_inputs(case, generator), "domain": domain}


def _supcon_inputs(case: Case, generator: torch.Generator) -> dict:
    labels = torch.randint(0, case.K, (case.N,), generator=generator)
    return {**_pair_inputs(case, generator), "labels": labels}


def _distill_inputs(case: Case, generator: torch.Generator) -> dict:
    guide = torch.cat([_groups(case.N // 2, case.D, NEIGHBORS + 1, generator) for _ in range(2)])
    return {"z": guide + 0.5 * _rows(case.N, case.D, generator), "guide": guide, "temperature": case.temperature}


def _guided_inputs(case: Case, generator: torch.Generator) -> dict:
    centroids = _rows(case.K, case.D, generator)
    clusters = torch.randint(0, case.K, (case.N // 2,), generator=generator).repeat(2)
    far = guided.farthest_cluster(centroids)
    return {**_distill_inputs(case, generator), "clusters": clusters, "far": far, "k": NEIGHBORS}


def _cluster_inputs(case: Case, generator: torch.Generator) -> dict:
    centroids = _rows(case.K, case.D, generator)
    z = centroids[torch.randint(0, case.K, (case.N,), generator=generator)] + _rows(case.N, case.D, generator)
    return {"z": z, "centroids": centroids}


def _kmeans_inputs(case: Case, generator: torch.Generator) -> dict:
    x = _rows(case.N, case.D, generator)  # without clusters: nobody converges, and stops, before the last step
    return {"x": x, "start": x[: case.K].clone(), "steps": KMEANS_STEPS}


def _clip_inputs(case: Case, generator: torch.Generator) -> dict:
    x = _rows(case.N, case.D, generator)
    return {"x": x, "y": x + _rows(case.N, case.D, generator), "temperature": case.temperature}


def clip(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Radford 2021: row i of x and row i of y are a pair, cross-entropy in both directions, averaged."""
    x, y = (F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1) for rows in (x, y))
    s = x @ y.T / temperature
    targets = torch.arange(len(s), device=s.device)
    return (F.cross_entropy(s, targets) + F.cross_entropy(s.T, targets)) / 2


def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The plain PyTorch way that fits in memory: blocks of rows against all columns, then topk."""
    x = F.normalize(x, dim=1)
    found = []
    for start in range(0, len(x), ROWS):
        cosines = x[start : start + ROWS] @ x.T
        rows = torch.arange(len(cosines), device=x.device)
        cosines[rows, rows + start] = -torch.inf
        found.append(cosines.topk(k, dim=1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """[N] the nearest centroid of every row, by Euclidean distance."""
    return (centroids.square().sum(1) - 2 * x @ centroids.T).argmin(1)


def kmeans(x: Tensor, start: Tensor, steps: int) -> Tensor:
    """Lloyd's algorithm: `steps` times assign and average; an empty cluster stays where it is."""
    centroids = start
    for _ in range(steps):
        assigned = nearest(x, centroids)
        counts = torch.bincount(assigned, minlength=len(centroids))[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, assigned, x)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _inertia(centroids: Tensor, inputs: dict) -> Tensor:
    """The mean squared distance to the nearest centroid: what k-means minimises."""
    x, centroids = inputs["x"].double(), centroids.double()
    return (x - centroids[nearest(x, centroids)]).square().sum(1).mean()


SELF = Work(products=(0.5, 1.5), exps=(0.5, 0.5), passes=(1, 2))
# The guide's N×N cosines give the K nearest; the forces are on N N / K pairs, taken here for the usual K = 10.
GUIDED = Work(products=(0.6, 0.4), exps=(0.1, 0.1), passes=(2, 3))
DISTILL = Work(products=(1, 2), exps=(1, 1), passes=(2, 3))

OPS: dict[str, Op] = {
    "nt_xent": Op(_pair_inputs, contrastive.nt_xent, SELF),
    "supcon": Op(_supcon_inputs, contrastive.supcon, SELF),
    "psd_loss": Op(_neighbor_inputs, contrastive.psd_loss, SELF),
    "stage1_loss": Op(_stage1_inputs, contrastive.stage1_loss, SELF),
    "guided_contrastive": Op(_guided_inputs, guided.guided_contrastive, GUIDED),
    "relational_distill": Op(_distill_inputs, guided.relational_distill, DISTILL),
    "stage2_loss": Op(_guided_inputs, guided.stage2_loss, DISTILL),
    "clip": Op(_clip_inputs, clip, Work(products=(1, 3), exps=(1, 1), passes=(2, 4))),
    "cluster_kl": Op(
        _cluster_inputs,
        clustering.cluster_kl,
        Work(products=(1, 2), exps=(2, 0), passes=(1, 2), by_clusters=True),
    ),
    "knn": Op(
        lambda case, generator: {"x": _rows(case.N, case.D, generator), "k": case.k},
        knn,
        Work(products=(0.5, 0), exps=(0, 0), passes=(1, 0)),
        outcome=lambda result, inputs: result[0],
    ),
    "kmeans": Op(
        _kmeans_inputs,
        kmeans,
        Work(products=(KMEANS_STEPS, 0), exps=(0, 0), passes=(KMEANS_STEPS, 0), by_clusters=True),
        outcome=_inertia,
    ),
}
LEAVES = {"z", "centroids", "x", "y"}  # inputs whose gradients a loss is asked for


def make_inputs(case: Case, seed: int) -> dict:
    """The keyword arguments of every implementation of a case: the same values on every device."""
    op = OPS[case.op]
    inputs = op.inputs(case, torch.Generator().manual_seed(seed))
    made = {}
    for name, value in inputs.items():
        if torch.is_tensor(value):
            value = value.to(case.device, case.torch_dtype if value.is_floating_point() else value.dtype)
            if op.outcome is None and name in LEAVES:
                value.requires_grad_()
        made[name] = value
    return made
