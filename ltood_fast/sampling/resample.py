"""One re-sampling: embeddings of the ID set and of the OOD pool in, the OOD images to train on out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

import ltood_fast

from ..ops import _check
from ..ops._shards import shards_of
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
    """What was sampled and why."""

    clusters: Clusters
    """Of the ID embeddings."""
    tailness: Tensor
    """[K], NaN for an empty cluster."""
    indices: Tensor
    """int64 [budget] of the OOD pool, no index twice."""
    index_clusters: Tensor
    """int64 [budget]: the cluster that each was taken for, -1 under the strategy "random"."""


def cluster_embeddings(
    embeddings: Tensor,
    n_clusters: int,
    *,
    refine_steps: int = 100,
    refine_lr: float = 0.1,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Clusters:
    """k-means on the unit sphere, its centroids then moved by KL refinement [source; DEC's form is ours].

    Args:
        embeddings: float [N, F], N >= n_clusters. They are L2-normalised here, as all similarities are cosines [ours].
        n_clusters: K.
        refine_steps, refine_lr: of `ltood_fast.refine_centroids`; 0 steps leaves k-means as it is.
        seed: of k-means.
        group: the embeddings are this rank's part of those of all its ranks.

    Raises:
        ValueError, TypeError: as `kmeans` and `refine_centroids`.
    """
    op = "cluster_embeddings"
    _check.embeddings(op, "embeddings", embeddings, allow_empty=group is not None)
    _check.count(op, "refine_steps", refine_steps, 0)
    z = F.normalize(embeddings.detach().float(), dim=1)
    centroids, assignments = kmeans(z, n_clusters, seed=seed, group=group)
    if refine_steps:
        centroids, assignments = ltood_fast.refine_centroids(
            z, centroids, steps=refine_steps, lr=refine_lr, group=group
        )
    return Clusters(centroids, assignments)


def choose_ood(
    id_embeddings: Tensor,
    ood_embeddings: Tensor | np.ndarray,
    clusters: Clusters,
    budget: int,
    *,
    tailness_k: int = 10,
    temperature: float = 1.0,
    strategy: str = "tailness",
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Sample:
    """Tailness of the clusters, then the budgeted choice of OOD images (SPEC sections 8 and 9).

    Args:
        id_embeddings: float [N, F], what `clusters` were made of.
        ood_embeddings: float [M, F], M >= budget; an array is read a block at a time, see `sample_ood`.
        clusters: of `cluster_embeddings`.
        budget: images to choose.
        tailness_k: neighbours of the density, cut to N - 1 on smaller sets.
        temperature: T_c, how evenly the budget is spread over the clusters.
        strategy: ``"tailness"``, or ``"random"``, the source's baseline.
        seed: of the random strategy.
        group: both sets of embeddings are this rank's part of those of all its ranks; the sample is of all.

    Raises:
        ValueError, TypeError: as `cluster_tailness` and `sample_ood`; fewer OOD rows than `budget` is a ValueError.
    """
    n_id = len(id_embeddings) if group is None else shards_of("choose_ood", group, id_embeddings).total
    tailness = ltood_fast.cluster_tailness(
        id_embeddings, clusters.assignments, len(clusters.centroids), k=min(tailness_k, n_id - 1), group=group
    )
    indices, index_clusters = ltood_fast.sample_ood(
        ood_embeddings,
        clusters.centroids,
        tailness,
        budget,
        temperature=temperature,
        strategy=strategy,
        generator=torch.Generator().manual_seed(seed),
        group=group,
    )
    return Sample(clusters, tailness, indices, index_clusters)


def density_weights(embeddings: Tensor, k: int = 10, *, group: ProcessGroup | None = None) -> Tensor:
    """[N] in [0, 1]: 1 for the densest row, 0 for the sparsest, by rank of the mean cosine distance to k neighbours.

    A weight for pseudo-positives [ours]: the nearest neighbour of a row in a dense place is more often of its class.
    Ranks, because the scale of the distances drifts through training. With a group N counts the rows of all its ranks,
    of which `embeddings` are this rank's, and all N weights are returned on every rank.
    """
    peers = None if group is None else shards_of("density_weights", group, embeddings)
    n = len(embeddings) if peers is None else peers.total
    sparsity = ltood_fast.knn_density(embeddings, min(k, n - 1), group=group)
    if peers is not None:
        sparsity = peers.gather(sparsity)
    rank = sparsity.argsort(stable=True).argsort(stable=True)
    return 1.0 - rank.float() / max(1, n - 1)
