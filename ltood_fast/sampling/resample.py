"""One re-sampling: embeddings of the ID set and of the OOD pool in, the OOD images to train on out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import ltood_fast

from ..ops import _check
from ..ops._shards import fetch, shards_of
from ..ops.knn import check_rho
from ..reference._common import unit_rows
from .kmeans import kmeans


@dataclass(frozen=True)
class Clusters:
    """Clusters of L2-normalised embeddings."""

    centroids: Tensor
    """[K, F]"""
    assignments: Tensor
    """int64 [N], of this rank's rows where they lie on several ranks"""


@dataclass(frozen=True)
class Sample:
    """The sampled images, and the reasons."""

    clusters: Clusters
    """Of the ID embeddings."""
    tailness: Tensor
    """[K], NaN for an empty cluster."""
    indices: Tensor
    """int64 [budget] of the OOD pool, no index twice."""
    index_clusters: Tensor
    """int64 [budget]: the cluster that each was taken for, -1 under the strategy "random"."""
    targets: Tensor | None = None
    """int64 [T] rows of all ID embeddings, where these are the centroids."""


@dataclass(frozen=True)
class Budget:
    """How many OOD images are chosen, and how."""

    images: int
    temperature: float = 1.0
    """T_c, how evenly the images are spread over the clusters."""
    strategy: str = "tailness"
    """Or "random", the paper's baseline."""
    seed: int = 0
    """Seed of the strategy "random"."""


def cluster_embeddings(
    embeddings: Tensor,
    n_clusters: int,
    *,
    refine_steps: int = 100,
    refine_lr: float = 0.1,
    refine_batch: int = 0,
    refine_nu: float = 1.0,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Clusters:
    """k-means on the unit sphere, its centroids then moved by KL refinement [paper; in DEC's form, ltood_fast].

    Args:
        embeddings: float [N, F], N >= n_clusters. L2-normalised here, as all similarities are cosines [ltood_fast].
        n_clusters: K.
        refine_steps, refine_lr: of `ltood_fast.refine_centroids`; 0 steps leaves k-means as it is.
        refine_batch: rows of a step, see `refine_by_minibatches`; 0: all of them.
        refine_nu: the parameter in the denominator of q, nu of `ltood_fast.cluster_kl`.
        seed: of k-means and of the minibatches.
        group: the embeddings are this rank's part of those of all its ranks.

    Raises:
        ValueError, TypeError: as `kmeans` and `refine_centroids`.
    """
    op = "cluster_embeddings"
    _check.embeddings(op, "embeddings", embeddings, allow_empty=group is not None)
    _check.count(op, "refine_steps", refine_steps, 0)
    z = unit_rows(embeddings.detach()).float()
    centroids, assignments = kmeans(z, n_clusters, seed=seed, group=group)
    if refine_steps and refine_batch:
        allowed = "0 where the embeddings lie on several ranks"
        _check.require(group is None, op, "refine_batch", allowed, refine_batch)
        centroids, assignments = refine_by_minibatches(
            z, centroids, refine_batch, nu=refine_nu, steps=refine_steps, lr=refine_lr, seed=seed
        )
    elif refine_steps:
        centroids, assignments = ltood_fast.refine_centroids(
            z, centroids, nu=refine_nu, steps=refine_steps, lr=refine_lr, group=group
        )
    return Clusters(centroids, assignments)


def refine_by_minibatches(
    z: Tensor, centroids: Tensor, batch: int, *, nu: float, steps: int, lr: float, seed: int
) -> tuple[Tensor, Tensor]:
    """(centroids [K, F], assignments int64 [N]) after descent steps on `cluster_kl` of `batch` rows each [paper].

    f_j and with it the target are those of the minibatch. Rows are drawn in passes over all of them, each in an order
    of its own from `seed`; a pass ends where fewer than `batch` rows are left. With batch >= N it is `refine_centroids`
    with tol 0.
    """
    generator, batch = torch.Generator().manual_seed(seed), min(batch, len(z))
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(rows) < batch:
            rows = torch.randperm(len(z), generator=generator)
        drawn, rows = rows[:batch].to(z.device), rows[batch:]
        leaf = centroids.detach().requires_grad_()
        with torch.enable_grad():
            loss = ltood_fast.cluster_kl(z[drawn], leaf, nu=nu)
        centroids = centroids - lr * torch.autograd.grad(loss, leaf)[0]
    q = ltood_fast.cluster_kl(z, centroids, nu=nu, return_q=True)[1]
    return centroids, q.argmax(dim=1)


def choose_ood(
    id_embeddings: Tensor,
    ood_embeddings: Tensor | np.ndarray,
    clusters: Clusters,
    budget: Budget,
    *,
    tailness_k: int = 10,
    density: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Sample:
    """Tailness of the clusters, then the budgeted choice of OOD images.

    Args:
        id_embeddings: float [N, F], what `clusters` were made of.
        ood_embeddings: float [M, F], M >= budget.images; an array is read a block at a time, see `sample_ood`.
        clusters: of `cluster_embeddings`.
        budget: how many images to choose, and how.
        tailness_k: neighbours of the density, cut to N - 1 on smaller sets.
        density: [N] instead of `knn_density`, of this rank's rows with a group; high = tail.
        group: both sets of embeddings are this rank's part of those of all its ranks; the sample is of all.

    Raises:
        ValueError, TypeError: as `cluster_tailness` and `sample_ood`; fewer OOD rows than the budget is a ValueError.
    """
    n_id = _count_rows("choose_ood", id_embeddings, tailness_k, group)
    tailness = ltood_fast.cluster_tailness(
        id_embeddings,
        clusters.assignments,
        len(clusters.centroids),
        k=min(tailness_k, n_id - 1),
        density=density,
        group=group,
    )
    indices, index_clusters = ltood_fast.sample_ood(
        ood_embeddings,
        clusters.centroids,
        tailness,
        budget.images,
        temperature=budget.temperature,
        strategy=budget.strategy,
        generator=torch.Generator().manual_seed(budget.seed),
        group=group,
    )
    return Sample(clusters, tailness, indices, index_clusters)


def choose_for_samples(
    id_embeddings: Tensor,
    ood_embeddings: Tensor | np.ndarray,
    n_targets: int,
    budget: int,
    *,
    tailness_k: int = 10,
    density: Tensor | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Sample:
    """OOD images for the sparsest ID images themselves instead of for clusters [ltood_fast].

    The `n_targets` ID rows of highest `density` (ties to the lower row) are the centroids of `sample_ood`, each with
    the same budget (the rest of the division goes to the sparsest); the sparsest chooses first.

    Args:
        id_embeddings, ood_embeddings, tailness_k, group: as in `choose_ood`.
        budget: images to choose.
        seed: of `sample_ood`.
        n_targets: T, cut to the number of ID rows.
        density: [N] instead of `knn_density`, of this rank's rows with a group.

    Returns:
        The sample, whose clusters are the targets and the ID rows nearest to each, and whose tailness is the targets'
        density.

    Raises:
        ValueError, TypeError: as `knn_density` and `sample_ood`; fewer OOD rows than `budget` is a ValueError.
    """
    op = "choose_for_samples"

    def check() -> dict[str, object]:
        _check.embeddings(op, "id_embeddings", id_embeddings, allow_empty=group is not None)
        _check.count(op, "n_targets", n_targets, 1)
        _check.count(op, "tailness_k", tailness_k, 1)
        if density is not None:
            check_rho(op, id_embeddings, density)
        return {"n_targets": n_targets, "density": "none" if density is None else "a tensor"}

    layout = None if group is None else shards_of(op, group, id_embeddings, check)
    if layout is None:
        check()
    n = len(id_embeddings) if layout is None else layout.total
    if density is None:
        density = ltood_fast.knn_density(id_embeddings, min(tailness_k, n - 1), group=group)
    everyone = density if layout is None else layout.gather(density)
    order = everyone.sort(descending=True, stable=True).indices
    targets = order[: min(n_targets, n)]
    centroids = id_embeddings[targets] if layout is None else fetch(layout, id_embeddings, targets)
    indices, index_clusters = ltood_fast.sample_ood(
        ood_embeddings,
        centroids,
        torch.zeros(len(targets), device=centroids.device),  # equal tailness: equal shares
        budget,
        generator=torch.Generator().manual_seed(seed),
        group=group,
    )
    nearest = ltood_fast.knn(id_embeddings, 1, y=centroids)[1][:, 0]
    return Sample(Clusters(centroids, nearest), everyone[targets], indices, index_clusters, targets)


def density_weights(embeddings: Tensor, k: int = 10, *, group: ProcessGroup | None = None) -> Tensor:
    """[N] in [0, 1]: 1 for the densest row, 0 for the sparsest, by rank of the mean cosine distance to k neighbours.

    A weight for pseudo-positives [ltood_fast]: in a dense place the nearest neighbour is more often of the row's class.
    Ranks, because the scale of the distances drifts through training. With a group N counts the rows of all its ranks,
    of which `embeddings` are this rank's, and all N weights are returned on every rank.
    """
    rank = _sparsity_rank(embeddings, k, group)
    return 1.0 - rank.float() / max(1, len(rank) - 1)


def gate_weights(embeddings: Tensor, share: float = 0.4, k: int = 10, *, group: ProcessGroup | None = None) -> Tensor:
    """[N]: 1 for the round(share N) densest rows, 0 for the others [ltood_fast]; the rest as `density_weights`."""
    rank = _sparsity_rank(embeddings, k, group)
    return (rank < round(share * len(rank))).float()


def mutual_weights(embeddings: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """[N]: 1 for a row that is the nearest one of its own nearest row, else 0 [ltood_fast]; group as above."""
    layout = None if group is None else shards_of("mutual_weights", group, embeddings)
    nearest = ltood_fast.knn(embeddings, 1, group=group)[1][:, 0]
    if layout is not None:
        nearest = layout.gather(nearest)
    return (nearest[nearest] == torch.arange(len(nearest), device=nearest.device)).float()


def _count_rows(op: str, id_embeddings: Tensor, tailness_k: int, group: ProcessGroup | None) -> int:
    """Checks both and counts the rows of all ranks."""

    def check() -> dict[str, object]:
        _check.embeddings(op, "id_embeddings", id_embeddings, allow_empty=group is not None)
        _check.count(op, "tailness_k", tailness_k, 1)
        return {"tailness_k": tailness_k}

    if group is not None:
        return shards_of(op, group, id_embeddings, check).total
    check()
    return len(id_embeddings)


def _sparsity_rank(embeddings: Tensor, k: int, group: ProcessGroup | None) -> Tensor:
    """int64 [N] of all ranks: 0 for the densest row."""
    layout = None if group is None else shards_of("density_weights", group, embeddings)
    n = len(embeddings) if layout is None else layout.total
    sparsity = ltood_fast.knn_density(embeddings, min(k, n - 1), group=group)
    if layout is not None:
        sparsity = layout.gather(sparsity)
    return sparsity.argsort(stable=True).argsort(stable=True)
