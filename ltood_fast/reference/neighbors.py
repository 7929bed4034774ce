"""Plain PyTorch: exact nearest neighbours by cosine, sparsity of a row, tailness of a cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import best_k, common_dtype, full_precision, inner_products, unit_rows

ROWS = 1024  # rows of the similarity matrix at a time


@torch.no_grad()
def knn(x: Tensor, k: int = 10, *, y: Tensor | None = None, normalize: bool = True) -> tuple[Tensor, Tensor]:
    x, y = x.detach(), None if y is None else y.detach()  # torch.no_grad does not stop forward mode
    with full_precision(x):
        dtype = x.dtype if y is None else common_dtype(x, y)
        queries = unit_rows(x, normalize).to(common_dtype(x, x) if y is None else dtype)
        base = queries if y is None else unit_rows(y, normalize).to(dtype)
        columns = torch.arange(len(base), device=x.device)
        found = []
        for start in range(0, len(queries), ROWS):
            rows = torch.arange(start, min(start + ROWS, len(queries)), device=x.device)
            admissible = (rows[:, None] != columns) if y is None else torch.ones_like(rows[:, None] == columns)
            found.append(best_k(inner_products(queries[rows], base), admissible, k))
        cosines, indices = zip(*found, strict=True)
        return torch.cat(cosines), torch.cat(indices)


def knn_density(x: Tensor, k: int = 10) -> Tensor:
    cosines, _ = knn(x, k)
    return (1 - cosines).mean(dim=1)


@torch.no_grad()
def cluster_tailness(
    x: Tensor, assignments: Tensor, n_clusters: int, *, k: int = 10, density: Tensor | None = None
) -> Tensor:
    rho = knn_density(x, k) if density is None else density
    of_cluster = (assignments.long(),)

    def total(x: Tensor) -> Tensor:
        zeros = torch.zeros(n_clusters, dtype=torch.float64, device=x.device)
        return zeros.index_put(of_cluster, x.double(), accumulate=True)  # in one order, on CUDA too

    return (total(rho) / total(torch.ones_like(rho))).to(rho.dtype)  # 0 / 0: an empty cluster is NaN
