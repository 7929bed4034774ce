"""Clustering by KL refinement: soft assignment, sharpened target, loss, and descent on the centroids."""

from __future__ import annotations

from torch import Tensor

from ..reference import cluster_kl as reference
from . import _check
from ._backend import use_kernel


def cluster_kl(
    z: Tensor,
    centroids: Tensor,
    *,
    nu: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    return_q: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """KL divergence of the soft cluster assignment from its own sharpened form.

    The form of Deep Embedded Clustering (Xie, Girshick, Farhadi 2016, equations 1-3): a row belongs to a cluster by
    Student's t kernel of its distance to the centroid; the target squares the assignment and divides it by the
    cluster's mass, and is a constant to the gradient. Replaces

    ```
    squared = torch.cdist(z, centroids) ** 2                         # [N, K]
    q = (1 + squared / nu) ** (-(nu + 1) / 2)
    q = q / q.sum(1, keepdim=True)
    p = q.detach() ** 2 / q.detach().sum(0)
    p = p / p.sum(1, keepdim=True)
    loss = (p * (p / q).log()).sum(1).mean()
    ```

    without an [N, K, D] array, and without an [N, K] array unless `return_q` asks for it.

    Args:
        z: [N, D] float64, float32, bfloat16 or float16, one embedding a row.
        centroids: [K, D], one centroid a row; any of these dtypes.
        nu: degrees of freedom of the kernel, positive.
        normalize: L2-normalise the rows of z and of the centroids first (eps 1e-12); the gradient goes through it.
        reduction: "mean" over the rows (the loss of the paper), "sum", or "none" (a loss per row, in row order).
        return_q: also return the assignment q [N, K], which carries no gradient.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        The loss, float64 if an input is float64 and float32 otherwise: a scalar, or [N] for reduction="none". With
        `return_q`, (loss, q). Gradients go to z and to the centroids; a second derivative is refused.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range; the sentence names the argument.
        RuntimeError: backend="cpu" or "cuda" in a build without that kernel.
    """
    _check_inputs("cluster_kl", z, centroids, nu)
    _check.choice("cluster_kl", "reduction", reduction, _check.REDUCTIONS)
    use_kernel("cluster_kl", backend, z.device)
    return reference.cluster_kl(z, centroids, nu=nu, normalize=normalize, reduction=reduction, return_q=return_q)


def refine_centroids(
    z: Tensor,
    centroids: Tensor,
    *,
    nu: float = 1.0,
    normalize: bool = False,
    steps: int = 100,
    lr: float = 0.1,
    tol: float = 1e-3,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradient descent of `cluster_kl` on the centroids, from a k-means start: the refinement step of DEC (Xie 2016).

    Every step costs one pass over z; it stops after `steps` of them, or as soon as fewer than `tol` of the assignments
    moved since the step before. Replaces

    ```
    for _ in range(steps):
        loss = cluster_kl(z, centroids)
        centroids = centroids - lr * torch.autograd.grad(loss, centroids)[0]
    ```

    Args:
        z: [N, D] float64, float32, bfloat16 or float16; no gradient.
        centroids: [K, D], the start; left unchanged.
        nu, normalize, backend: as in `cluster_kl`. With `normalize` the centroids move as raw vectors and the gradient
            goes through their norm.
        steps: most steps to take.
        lr: step size, positive. The loss is a mean over rows, so a centroid's step also scales with its share of them.
        tol: fraction of the N rows, non-negative; 0 takes every step.

    Returns:
        (centroids [K, D], assignments int64 [N]): the refined centroids, float64 if an input is and float32 otherwise,
        and the most probable cluster of every row under them, ties to the lower index. Nothing carries a gradient.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range; the sentence names the argument.
        RuntimeError: backend="cpu" or "cuda" in a build without that kernel.
    """
    _check_inputs("refine_centroids", z, centroids, nu)
    _check.count("refine_centroids", "steps", steps, 1)
    _check.positive_number("refine_centroids", "lr", lr)
    _check.nonnegative_number("refine_centroids", "tol", tol)
    use_kernel("refine_centroids", backend, z.device)
    return reference.refine_centroids(z, centroids, nu=nu, normalize=normalize, steps=steps, lr=lr, tol=tol)


def _check_inputs(op: str, z: Tensor, centroids: Tensor, nu: float) -> None:
    _check.embeddings(op, "z", z)
    _check.same_width(op, "centroids", centroids, "z", z)
    _check.positive_number(op, "nu", nu)
