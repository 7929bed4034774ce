"""k-means through FAISS."""

from __future__ import annotations

import torch
from torch import Tensor

from .._faiss import load_faiss
from ..ops import _check


def kmeans(
    x: Tensor, n_clusters: int, *, iterations: int = 20, seed: int = 0, spherical: bool = True
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means with FAISS's random start and its splitting of empty clusters; the same seed, the same result.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16, finite; computed in float32 on the CPU.
        n_clusters: K, at most N.
        iterations: Lloyd's iterations.
        seed: of the start.
        spherical: cluster by cosine: rows and centroids are L2-normalised.

    Returns:
        (centroids float32 [K, D], assignments int64 [N]) on the device of x; every row's assignment is its nearest
        returned centroid.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or range, or a row that is not finite.
        ImportError: FAISS is missing.
    """
    op = "kmeans"
    _check.embeddings(op, "x", x)
    _check.count(op, "n_clusters", n_clusters, 1, len(x))
    _check.count(op, "iterations", iterations, 1)
    _check.count(op, "seed", seed, 0)
    rows = x.detach().float()
    _check.finite_rows(op, "x", rows)
    faiss = load_faiss(op)
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=1)
    rows = rows.cpu().contiguous().numpy()
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
