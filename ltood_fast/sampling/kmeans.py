"""k-means through FAISS, and the same over rows that lie on several ranks."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .._faiss import FaissIndex, gpu_searches, load_faiss
from ..ops import _check
from ..ops._group import RankLayout
from ..ops._shards import add, fetch, shards_of
from ..reference._common import unit_rows

BLOCK_ROWS = 65536  # rows at a time that are added up in float64
SPLIT_SEED = 1234  # faiss/Clustering.cpp: split_clusters
SPLIT_STEP = 1 / 1024  # faiss/Clustering.cpp: EPS


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = True,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means with FAISS's random start and its splitting of empty clusters; the same seed, the same result.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16, finite; computed in float32. On a GPU, the rows stay there if
            FAISS can search on it (faiss-gpu); the steps are then those of a group. Otherwise it runs on the CPU.
        n_clusters: K, at most N.
        iterations: Lloyd's iterations.
        seed: of the start.
        spherical: cluster by cosine: rows and centroids are L2-normalised.
        group: x is this rank's rows of a matrix that lies on the ranks of the group, concatenated in rank order; a rank
            may hold none. FAISS then searches on each rank, and Lloyd's steps add up over the ranks. Start, number of
            steps and splits of empty clusters are those of one process, the sums are float64 where FAISS's are
            float32: the same centroids to rounding and the same assignments, unless a row lies so near the middle of
            two centroids that rounding decides. None: this process holds all rows.

    Returns:
        (centroids float32 [K, D], assignments int64 [N], of this rank's rows with a group) on the device of x;
        every row's assignment is its nearest returned centroid.

    Warns:
        UserWarning: fewer distinct rows than clusters (distinct directions, to 2^-20, if spherical): some clusters are
            empty. On rank 0 of a group.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or range, or a row that is not finite. With a group it is
            raised on every rank and names the rank, or the argument that differs between ranks.
        ImportError: FAISS is missing.
    """
    op = "kmeans"

    def check() -> dict[str, object]:
        _check.embeddings(op, "x", x, allow_empty=group is not None)
        _check.count(op, "n_clusters", n_clusters, 1, len(x) if group is None else None)
        _check.count(op, "iterations", iterations, 1)
        _check.count(op, "seed", seed, 0, 2**31 - 2)  # FAISS takes 32 bits
        _check.flag(op, "spherical", spherical)
        _check.finite_rows(op, "x", unit_rows(x.detach(), spherical).float())
        return {"n_clusters": n_clusters, "options": (iterations, seed, spherical)}

    layout = None if group is None else shards_of(op, group, x, check)
    if layout is None:
        check()
    else:
        _check.count(op, "n_clusters", n_clusters, 1, layout.total)
    faiss = load_faiss(op)
    rows = unit_rows(x.detach(), spherical).float().contiguous()
    if layout is not None or gpu_searches(faiss, rows):
        centroids, assignments, empty = _lloyd(faiss, rows, n_clusters, iterations, seed, spherical, layout)
    else:
        centroids, assignments = _by_faiss(faiss, rows, n_clusters, iterations, seed, spherical)
        empty = int(torch.bincount(assignments, minlength=n_clusters).min()) == 0
    if empty:
        _warn_of_few_distinct_rows(op, rows, n_clusters, spherical, layout)
    return centroids, assignments


def _by_faiss(
    faiss: ModuleType, x: Tensor, n_clusters: int, iterations: int, seed: int, spherical: bool
) -> tuple[Tensor, Tensor]:
    rows = x.cpu().numpy()
    clustering = faiss.Kmeans(
        rows.shape[1],
        n_clusters,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),  # no subsampling
    )
    clustering.train(rows)
    _, assignments = clustering.assign(rows)
    return torch.from_numpy(clustering.centroids).to(x.device), torch.from_numpy(assignments).long().to(x.device)


def _warn_of_few_distinct_rows(
    op: str, rows: Tensor, n_clusters: int, spherical: bool, layout: RankLayout | None
) -> None:
    """Counted only where a cluster is empty, as it always is then: equal rows have one nearest centroid."""
    found = _distinct(rows.mul(2.0**20).round() if spherical else rows, n_clusters)
    if layout is not None:
        of_ranks: list[Tensor | None] = [None] * len(layout.sizes)
        dist.all_gather_object(of_ranks, found.cpu(), group=layout.group)
        found = _distinct(torch.cat(of_ranks), n_clusters)
    if len(found) < n_clusters and (layout is None or layout.rank == 0):
        warnings.warn(
            f"{op}: x should hold at least as many distinct rows as n_clusters = {n_clusters}, got {len(found)}: the "
            "other clusters are empty; choose fewer clusters, or look for collapsed embeddings",
            stacklevel=3,
        )


def _distinct(rows: Tensor, enough: int) -> Tensor:
    """The distinct rows, looked for until there are enough of them."""
    found = rows[:0]
    for block in rows.split(max(BLOCK_ROWS // 16, enough)):
        found = torch.cat([found, block]).unique(dim=0)
        if len(found) >= enough:
            break
    return found


def _lloyd(
    faiss: ModuleType,
    rows: Tensor,
    n_clusters: int,
    iterations: int,
    seed: int,
    spherical: bool,
    layout: RankLayout | None,
) -> tuple[Tensor, Tensor, bool]:
    """faiss::Clustering::train where the rows lie: on a GPU, on several ranks, each taking the same steps from the same
    sums, or both.

    Returns:
        Centroids, assignments, and whether a cluster may be empty: the same on every rank, without another message.
    """
    total = len(rows) if layout is None else layout.total

    def rows_of_all(indices: Tensor) -> Tensor:
        return rows[indices] if layout is None else fetch(layout, rows, indices)

    def over_ranks(own: Tensor) -> Tensor:
        return own if layout is None else add(own, layout.group)

    index = FaissIndex(faiss, "Flat", rows, inner_product=spherical)

    def assign(centroids: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.empty(0, dtype=torch.int64, device=rows.device)
        index.faiss.reset()
        index.add(centroids)
        return index.search(rows, 1)[1][:, 0]

    def on_sphere(centroids: Tensor) -> Tensor:
        return torch.nn.functional.normalize(centroids, dim=1) if spherical else centroids

    if total == n_clusters:  # FAISS takes the rows unchanged
        centroids = rows_of_all(torch.arange(n_clusters, device=rows.device))
        return centroids, assign(centroids), True
    order = np.empty(total, dtype=np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), total, seed + 1)
    start = torch.from_numpy(order[:n_clusters]).long().to(rows.device)
    centroids = on_sphere(rows_of_all(start))
    for _ in range(iterations):
        assignments = assign(centroids)
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        for block, clusters in zip(rows.split(BLOCK_ROWS), assignments.split(BLOCK_ROWS), strict=True):
            sums.index_add_(0, clusters, block.double())
        counts = over_ranks(torch.bincount(assignments, minlength=n_clusters))
        centroids = (over_ranks(sums) / counts.clamp(min=1)[:, None]).float()
        centroids = on_sphere(_split_empty(faiss, centroids, counts, total))
    return centroids, assign(centroids), int(counts.min()) == 0


def _split_empty(faiss: ModuleType, centroids: Tensor, counts: Tensor, n_rows: int) -> Tensor:
    """An empty cluster takes half of another, drawn by size with FAISS's generator, from which it moves a little away.

    faiss::split_clusters, so that empty clusters get the same centroids with one process and with many."""
    sizes, k = counts.tolist(), len(centroids)
    draw = faiss.RandomGenerator(SPLIT_SEED).rand_float
    step = torch.full_like(centroids[0], SPLIT_STEP)
    step[1::2] *= -1
    for empty in (c for c in range(k) if sizes[c] == 0):
        other = 0
        while draw() >= (sizes[other] - 1) / (n_rows - k):
            other = (other + 1) % k
        centroids[empty] = centroids[other] * (1 + step)
        centroids[other] = centroids[other] * (1 - step)
        sizes[empty] = sizes[other] // 2
        sizes[other] -= sizes[empty]
    return centroids
