"""FAISS and scikit-learn for exact neighbours and for k-means. The inputs' device is theirs too, or a copy is timed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from .base import Implementation, unit


def _faiss():
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _faiss_knn() -> Callable:
    faiss = _faiss()

    def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = unit(x).numpy()
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        cosines, columns = index.search(rows, k + 1)
        return torch.from_numpy(cosines[:, 1:]), torch.from_numpy(columns[:, 1:])

    return knn


def _faiss_kmeans(gpu: bool) -> Callable:
    faiss = _faiss()
    if gpu:
        faiss.StandardGpuResources  # noqa: B018  the CPU build has no such name: its message is the row's

    def kmeans(x: Tensor, start: Tensor, steps: int) -> Tensor:
        rows, first = x.cpu().numpy(), start.cpu().numpy()
        clustering = faiss.Kmeans(
            rows.shape[1],
            len(first),
            niter=steps,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
            gpu=gpu,
        )
        clustering.train(rows, init_centroids=first)
        return torch.from_numpy(clustering.centroids).to(x.device)

    return kmeans


def _faiss_gpu_knn() -> Callable:
    faiss = _faiss()
    import_module("faiss.contrib.torch_utils")  # knn_gpu then takes tensors
    resources = faiss.StandardGpuResources()

    def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = unit(x)
        cosines, columns = faiss.knn_gpu(resources, rows, rows, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
        return cosines[:, 1:], columns[:, 1:]

    return knn


def _sklearn_knn() -> Callable:
    from sklearn.neighbors import NearestNeighbors

    def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # On unit rows the Euclidean order is the cosine order, and the fused search of scikit-learn serves it.
        search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(unit(x).numpy())
        distances, columns = search.kneighbors()
        return 1 - torch.from_numpy(distances).square() / 2, torch.from_numpy(columns)

    return knn


def _sklearn_kmeans() -> Callable:
    from sklearn.cluster import KMeans

    def kmeans(x: Tensor, start: Tensor, steps: int) -> Tensor:
        clustering = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
        return torch.from_numpy(clustering.fit(x.numpy()).cluster_centers_)

    return kmeans


IMPLEMENTATIONS = (
    Implementation(
        "faiss",
        {"knn": _faiss_knn, "kmeans": lambda: _faiss_kmeans(gpu=False)},
        "faiss-cpu: IndexFlatIP on unit rows, k + 1 as a row finds itself; Kmeans with the given start, no subsampling",
        package="faiss-cpu",
        devices=("cpu",),
        dtypes=("float32",),
    ),
    Implementation(
        "faiss-gpu",
        {"knn": _faiss_gpu_knn, "kmeans": lambda: _faiss_kmeans(gpu=True)},
        "faiss.knn_gpu on unit rows in GPU memory, k + 1 as a row finds itself; Kmeans(gpu=True), rows copied",
        package="faiss-gpu",
        devices=("cuda",),
        dtypes=("float32",),
        tested_on="nowhere",
    ),
    Implementation(
        "scikit-learn",
        {"knn": _sklearn_knn, "kmeans": _sklearn_kmeans},
        "NearestNeighbors(algorithm='brute') by Euclidean distance of unit rows, which it fuses, unlike cosine; "
        "KMeans(init=start, n_init=1, tol=0, algorithm='lloyd')",
        package="scikit-learn",
        devices=("cpu",),
        dtypes=("float32",),
    ),
)
