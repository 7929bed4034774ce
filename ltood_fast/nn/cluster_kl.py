"""`ltood_fast.cluster_kl` as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _check as check
from ..ops._backend import BACKENDS
from ..ops.cluster_kl import cluster_kl


class ClusterKL(nn.Module):
    """`ltood_fast.cluster_kl` with the centroids as a parameter [K, D], started from the given ones."""

    def __init__(
        self,
        centroids: Tensor,
        *,
        nu: float = 1.0,
        normalize: bool = False,
        reduction: str = "mean",
        return_q: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check.embeddings("ClusterKL", "centroids", centroids)
        check.positive_number("ClusterKL", "nu", nu)
        check.choice("ClusterKL", "reduction", reduction, check.REDUCTIONS)
        check.choice("ClusterKL", "backend", backend, BACKENDS)
        check.flag("ClusterKL", "normalize", normalize)
        check.flag("ClusterKL", "return_q", return_q)
        self.centroids = nn.Parameter(centroids.detach().clone(memory_format=torch.contiguous_format))
        self.nu = nu
        self.normalize = normalize
        self.reduction = reduction
        self.return_q = return_q
        self.backend = backend

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return cluster_kl(
            z,
            self.centroids,
            nu=self.nu,
            normalize=self.normalize,
            reduction=self.reduction,
            return_q=self.return_q,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        k, d = self.centroids.shape
        return f"n_clusters={k}, dim={d}, nu={self.nu}, normalize={self.normalize}, reduction={self.reduction!r}"
