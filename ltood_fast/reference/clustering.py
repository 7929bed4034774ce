"""Plain PyTorch: clustering by KL refinement, in the form of DEC (Xie 2016, equations 1-3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._common import LONG_DOUBLE, LONG_FLOAT, common_dtype, full_precision, unit_rows


def log_soft_assignment(z: Tensor, centroids: Tensor, nu: float, normalize: bool) -> Tensor:
    """log q [N, K]: Student's t kernel of the distances, rows normalised."""
    dtype = common_dtype(z, centroids)
    z, centroids = unit_rows(z, normalize).to(dtype), unit_rows(centroids, normalize).to(dtype)
    origin = centroids.detach().median(dim=0).values  # distances stay; a common offset no longer cancels in them
    z, centroids = z - origin, centroids - origin
    # Far rows are scaled by the largest element c, as their squares would overflow:
    # log(1 + d / nu) = log(d / c^2 + nu / c^2) + 2 log c - log nu.
    largest = torch.maximum(z.detach().abs().amax(), centroids.detach().abs().amax())
    long = largest > (LONG_DOUBLE if dtype == torch.float64 else LONG_FLOAT)
    scale = largest.where(long, 1)
    z, centroids = z / scale, centroids / scale
    squared = z.square().sum(1)[:, None] + centroids.square().sum(1)[None, :] - 2 * z @ centroids.T
    squared = squared.clamp(min=0)
    tiny = torch.finfo(dtype).tiny
    far = torch.log((squared + nu / scale / scale).clamp(min=tiny)) + 2 * scale.log() - math.log(nu)
    return torch.log_softmax(-(nu + 1) / 2 * far.where(long, torch.log1p(squared / nu)), dim=1)


def cluster_kl(
    z: Tensor,
    centroids: Tensor,
    *,
    nu: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    return_q: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    with full_precision(z):
        log_q = log_soft_assignment(z, centroids, nu, normalize)
        constant = log_q.detach()  # in forward mode too, which torch.no_grad does not stop
        log_f = constant.logsumexp(dim=0)  # log of f_j = sum_i q_ij
        log_p = torch.log_softmax(2 * constant - log_f, dim=1)
        rows = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        loss = {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()
        return (loss, log_q.detach().exp()) if return_q else loss


def descend(
    step: Callable[[Tensor], tuple[Tensor, Tensor]],
    centroids: Tensor,
    steps: int,
    lr: float,
    tol: float,
    count_moved: Callable[[Tensor], tuple[int, int]] = lambda moved: (int(moved.sum()), len(moved)),
) -> Tensor:
    """Gradient descent on the centroids until fewer than `tol` of the assignments move from one step to the next.

    `step(centroids)` gives (gradient [K, D], assignments [N]) at the given centroids; `count_moved` turns which of them
    moved into (how many, of how many).
    """
    previous = None
    for _ in range(steps):
        gradient, assignments = step(centroids)
        if previous is not None:
            moved, rows = count_moved(assignments != previous)
            if moved < tol * rows:
                break
        centroids, previous = centroids - lr * gradient, assignments
    return centroids


def refine_centroids(
    z: Tensor,
    centroids: Tensor,
    *,
    nu: float = 1.0,
    normalize: bool = False,
    steps: int = 100,
    lr: float = 0.1,
    tol: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    z = z.detach()

    def assign(centroids: Tensor) -> Tensor:
        return log_soft_assignment(z, centroids, nu, normalize).argmax(dim=1)

    def step(centroids: Tensor) -> tuple[Tensor, Tensor]:
        leaf = centroids.detach().requires_grad_()
        with torch.enable_grad():
            loss = cluster_kl(z, leaf, nu=nu, normalize=normalize)
        return torch.autograd.grad(loss, leaf)[0], assign(leaf.detach())

    with full_precision(z), torch.no_grad():
        start = centroids.detach().to(common_dtype(z, centroids))
        refined = descend(step, start, steps, lr, tol)
        return refined, assign(refined)
