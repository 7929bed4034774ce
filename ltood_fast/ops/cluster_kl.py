"""Clustering by KL refinement: soft assignment, sharpened target, loss, and descent on the centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import clustering as reference
from ..reference._common import common_dtype, full_precision, unit_rows
from . import _check
from ._backend import use_kernel
from ._group import RankLayout
from ._schema import Arguments, call, differentiable, varying
from ._shards import add, fingerprint, shards_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._typing import ClusterOptions

# Distances that the CPU kernel keeps from its first pass for the later ones: those of the first rows, up to this much.
# With room for all rows a step costs three matrix products, without any five. The CUDA kernel computes all again.
CACHE_BYTES = 32 * 2**20
SHARD_ROWS = 65536  # rows at a time whose [rows, K] assignment is in memory, where z lies on several ranks


@overload
def cluster_kl(
    z: Tensor, centroids: Tensor, *, return_q: Literal[False] = False, **options: Unpack[ClusterOptions]
) -> Tensor: ...
@overload
def cluster_kl(
    z: Tensor, centroids: Tensor, *, return_q: Literal[True], **options: Unpack[ClusterOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def cluster_kl(
    z: Tensor, centroids: Tensor, *, return_q: bool, **options: Unpack[ClusterOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
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

    without an [N, K, D] array, and without an [N, K] array unless `return_q` asks for it: the CPU kernel keeps
    distances of the first rows from its first pass for the later ones, 32 MiB of them at most, and computes the others
    again; the CUDA kernel (not yet verified on hardware) computes all again, and its backward keeps 64 MiB of weights.

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
    nu = _check_inputs("cluster_kl", z, centroids, nu, normalize)
    _check.choice("cluster_kl", "reduction", reduction, _check.REDUCTIONS)
    _check.flag("cluster_kl", "return_q", return_q)
    if not use_kernel("cluster_kl", backend, z, centroids):
        return reference.cluster_kl(z, centroids, nu=nu, normalize=normalize, reduction=reduction, return_q=return_q)
    rows, _, _, _, q, _ = _run_kernel(z, centroids, nu, normalize, return_q=return_q)
    loss = {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()
    return (loss, q) if return_q else loss


def refine_centroids(
    z: Tensor,
    centroids: Tensor,
    *,
    nu: float = 1.0,
    normalize: bool = False,
    steps: int = 100,
    lr: float = 0.1,
    tol: float = 1e-3,
    group: dist.ProcessGroup | None = None,
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
        lr: step size, positive. The loss is a mean over rows, so a centroid's step also scales with its share of them,
            and a small `lr` may move so few assignments that `tol` ends the descent after its first step.
        tol: fraction of the N rows, non-negative; 0 takes every step.
        group: z is this rank's rows of a matrix that lies on the ranks of the group, which may be none; the centroids
            are the same on all. A step then exchanges the K masses and the gradient, runs in plain PyTorch (backend:
            "auto" or "reference"), and ends where one process would, to rounding. None: this process holds all rows.

    Returns:
        (centroids [K, D], assignments int64 [N]; of this rank's rows with a group): the refined centroids,
        float64 if an input is and float32 otherwise, and the most probable cluster of every row under them, ties to the
        lower index. Nothing carries a gradient.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range; the sentence names the argument. With a
            group it is raised on every rank and names the rank, or the argument that differs between ranks.
        RuntimeError: backend="cpu" or "cuda" in a build without that kernel.
    """

    op, options = "refine_centroids", _Descent(nu, normalize, steps, lr, tol)
    if group is not None:

        def check() -> dict[str, object]:
            _check_descent(op, z, centroids, options, allow_empty=True)
            _check.choice(op, "backend", backend, ("auto", "reference"))  # no kernel adds up over ranks
            return {"centroids": fingerprint(centroids), "options": tuple(options)}

        layout = shards_of(op, group, z, check)
        return _refine_shards(z.detach(), centroids.detach(), options, layout)
    _check_descent(op, z, centroids, options)
    if not use_kernel("refine_centroids", backend, z, centroids):
        return reference.refine_centroids(z, centroids, nu=nu, normalize=normalize, steps=steps, lr=lr, tol=tol)
    z = z.detach()

    def step(centroids: Tensor) -> tuple[Tensor, Tensor]:
        leaf = centroids.detach().requires_grad_()
        with torch.enable_grad():
            rows, _, _, _, _, assignments = _run_kernel(z, leaf, nu, normalize, return_assignments=True)
            return torch.autograd.grad(rows.mean(), leaf)[0], assignments

    with torch.no_grad():
        start = centroids.detach().to(common_dtype(z, centroids))
        refined = reference.descend(step, start, steps, lr, tol)
        return refined, _run_kernel(z, refined, nu, normalize, return_assignments=True)[5]


class _Descent(NamedTuple):
    """How `refine_centroids` descends."""

    nu: float
    normalize: bool
    steps: int
    lr: float
    tol: float


@torch.no_grad()
def _refine_shards(z: Tensor, centroids: Tensor, options: _Descent, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """The reference's descent over shards of rows: the masses f_j of all ranks first, then loss and gradient."""
    nu, normalize, steps, lr, tol = options
    _check.require(layout.total > 0, "refine_centroids", "z", "non-empty on a rank at least", "0 rows")
    group, blocks = layout.group, [block for block in z.split(SHARD_ROWS) if len(block)]

    def assign(centroids: Tensor) -> tuple[Tensor, Tensor]:
        log_mass = centroids.new_full((len(centroids),), -torch.inf, dtype=torch.float64)
        assignments = [torch.empty(0, dtype=torch.int64, device=z.device)]
        for block in blocks:
            log_q = reference.log_soft_assignment(block, centroids, nu, normalize)
            log_mass = torch.logaddexp(log_mass, log_q.double().logsumexp(dim=0))
            assignments.append(log_q.argmax(dim=1))
        of_ranks = [torch.empty_like(log_mass) for _ in layout.sizes]
        dist.all_gather(of_ranks, log_mass, group=group)
        return torch.stack(of_ranks).logsumexp(dim=0), torch.cat(assignments)

    def step(centroids: Tensor) -> tuple[Tensor, Tensor]:
        log_mass, assignments = assign(centroids)
        leaf = centroids.detach().requires_grad_()
        gradient = torch.zeros_like(leaf, dtype=torch.float64)
        for block in blocks:
            with torch.enable_grad():
                log_q = reference.log_soft_assignment(block, leaf, nu, normalize)
                log_p = torch.log_softmax(2 * log_q.detach() - log_mass.to(log_q.dtype), dim=1)
                loss = (log_p.exp() * (log_p - log_q)).sum()
            gradient += torch.autograd.grad(loss, leaf)[0]
        return (add(gradient, group) / layout.total).to(leaf.dtype), assignments

    def count_moved(moved: Tensor) -> tuple[int, int]:
        return int(add(moved.sum(), group)), layout.total

    with full_precision(z):
        start = centroids.to(common_dtype(z, centroids))
        refined = reference.descend(step, start, steps, lr, tol, count_moved)
        return refined, assign(refined)[1]


def _check_inputs(
    op: str, z: Tensor, centroids: Tensor, nu: float, normalize: bool, *, allow_empty: bool = False
) -> float:
    """Returns nu as a float."""
    _check.embeddings(op, "z", z, allow_empty=allow_empty)
    _check.same_width(op, "centroids", centroids, "z", z)
    _check.flag(op, "normalize", normalize)
    return _check.positive_number(op, "nu", nu)


def _check_descent(op: str, z: Tensor, centroids: Tensor, options: _Descent, *, allow_empty: bool = False) -> None:
    _check_inputs(op, z, centroids, options.nu, options.normalize, allow_empty=allow_empty)
    _check.count(op, "steps", options.steps, 1)
    _check.positive_number(op, "lr", options.lr)
    _check.nonnegative_number(op, "tol", options.tol)


def _run_kernel(
    z: Tensor,
    centroids: Tensor,
    nu: float,
    normalize: bool,
    *,
    return_q: bool = False,
    return_assignments: bool = False,
) -> tuple[Tensor, ...]:
    """The operator's outputs: loss rows, mass, row statistics, kept distances, q, assignments."""
    if normalize:
        with full_precision(z):
            z, centroids = unit_rows(z), unit_rows(centroids)
    fitting = CACHE_BYTES // (centroids.shape[0] * common_dtype(z, centroids).itemsize)
    arguments = {
        "z": z,
        "centroids": centroids,
        "nu": float(nu),
        "cached_rows": 0 if z.is_cuda else min(z.shape[0], fitting),
        "return_q": return_q,
        "return_assignments": return_assignments,
    }
    return call("cluster_kl", "cluster_kl", **arguments)


@torch.library.register_fake("ltood_fast::cluster_kl")
def _(*args, **kwargs):
    given = Arguments("cluster_kl", args, kwargs)
    z, n, k = given.z, given.z.shape[0], given.centroids.shape[0]

    def wide(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=common_dtype(z, given.centroids))

    assignments = z.new_empty(n if given.return_assignments else 0, dtype=torch.int64)
    stats, q = wide(4 if z.is_cuda else 3, n), wide(n if given.return_q else 0, k)
    return wide(n), wide(k), stats, wide(given.cached_rows, k), q, assignments


@torch.library.register_fake("ltood_fast::cluster_kl_bwd")
def _(*args, **kwargs):
    given = Arguments("cluster_kl_bwd", args, kwargs)
    z, centroids, d = given.z, given.centroids, given.z.shape[1]
    rows, clusters = z.shape[0] if given.need_z else 0, centroids.shape[0] if given.need_centroids else 0
    return z.new_empty(rows, d), centroids.new_empty(clusters, d)


differentiable("cluster_kl")
varying("cluster_kl")
