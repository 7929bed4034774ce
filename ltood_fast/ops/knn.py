"""Exact nearest neighbours by cosine, and what follows from them: sparsity of a row, tailness of a cluster."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .._faiss import FaissIndex, load_faiss
from ..reference import neighbors as reference
from ..reference._common import common_dtype, unit_rows
from . import _check
from ._backend import BACKENDS, use_kernel
from ._schema import Arguments, constant, overload, wide_dtype
from ._shards import add, passing, shards_of

METHODS = ("exact", "ivf")


def knn(
    x: Tensor,
    k: int = 10,
    *,
    y: Tensor | None = None,
    normalize: bool = True,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of y for every row of x; without y, of x itself, where no row is its own neighbour.

    Replaces

    ```
    x, y = F.normalize(x), F.normalize(y)
    cosines, indices = (x @ y.T).topk(k)                             # [N, Q] in memory
    ```

    without the [N, Q] array, and with ties going to the lower index. The CUDA kernel is not yet verified on hardware.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16, the queries.
        k: neighbours per row, at least 1 and fewer than N, or at most Q with y.
        y: [Q, D], the rows that are searched; any of these dtypes.
        normalize: L2-normalise the rows first (eps 1e-12); without it the similarity is the plain inner product.
        group: x (and y) are this rank's rows of matrices that lie on the ranks of the group, concatenated in rank
            order; a rank may hold none. N and Q above then count the rows of all ranks. Shards are broadcast one after
            another, two in memory at a time. None: this process holds all rows.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        (cosines [N, k], indices int64 [N, k]), best first; with a group for this rank's rows, the indices into the
        concatenation, the same as those of one process but for cosines that are equal to rounding. Cosines are float64
        if an input is float64 and float32 otherwise. Neither carries a gradient. A NaN similarity ranks before every
        number, as in torch.sort, so that a broken row shows; a similarity of -inf is no neighbour: its index is -1.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range; the sentence names the argument. With a
            group it is raised on every rank and names the rank, or the argument that differs between ranks.
        RuntimeError: backend="cpu" or "cuda" in a build without that kernel.
    """
    if group is not None:
        return _knn_shards("knn", x, k, y, normalize, group, backend)
    _check_knn("knn", x, k, y)
    _check.flag("knn", "normalize", normalize)
    if not use_kernel("knn", backend, x, y):
        return reference.knn(x, k, y=y, normalize=normalize)
    return overload("knn")(x=x, y=y, k=k, normalize=normalize)


def knn_density(
    x: Tensor,
    k: int = 10,
    *,
    method: str = "exact",
    n_lists: int | None = None,
    n_probes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sparsity of every row's neighbourhood: the mean of 1 - cosine over its k nearest other rows. High = tail.

    Replaces

    ```
    x = F.normalize(x)
    similarity = (x @ x.T).fill_diagonal_(-torch.inf)                # [N, N] in memory
    rho = (1 - similarity.topk(k).values).mean(1)
    ```

    Args:
        x: [N, D] float64, float32, bfloat16 or float16.
        k: neighbours per row, at least 1 and fewer than N.
        method: "exact", or "ivf": an inverted file of FAISS, approximate, for sets too large to compare pair by pair.
        n_lists: "ivf" only: lists that the rows are filed into, 4 sqrt(N) by default.
        n_probes: "ivf" only: lists that are searched for a row, an eighth of them by default. A row for which they hold
            fewer than k others is searched in all lists.
        group: as in `knn`. With "ivf" each rank files its own rows and searches all ranks' rows in its file, and the
            best of all files are combined; n_lists and n_probes are of each file, cut to what it has.
        backend: "auto", "reference", "cpu" or "cuda"; "ivf" always runs in FAISS on the CPU.

    Returns:
        rho [N] (of this rank's rows with a group), no unit, in [0, 2]: float64 if x is float64 and float32 otherwise.
        No gradient.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or range, or a row with NaN or infinity; the sentence
            names the argument and the row.
        ImportError: method="ivf" without FAISS.
        RuntimeError: backend="cpu" or "cuda" in a build without that kernel.
    """
    if group is not None and method == "ivf":
        return _ivf_shards(x, k, n_lists, n_probes, group)
    if group is not None:
        cosines, _ = _knn_shards("knn_density", x, k, None, True, group, backend, method)
        return (1 - cosines).mean(dim=1)
    _check_density("knn_density", x, k, method, backend)
    if method == "ivf":
        return _ivf_density(x, k, n_lists, n_probes)
    return _exact_density("knn_density", x, k, backend)


def _exact_density(op: str, x: Tensor, k: int, backend: str) -> Tensor:
    if not use_kernel(op, backend, x):
        return reference.knn_density(x, k)
    cosines, _ = overload("knn")(x=x, k=k)
    return (1 - cosines).mean(dim=1)


def cluster_tailness(
    x: Tensor,
    assignments: Tensor,
    n_clusters: int,
    *,
    k: int = 10,
    method: str = "exact",
    density: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Tailness of every cluster: the mean of `knn_density` over its rows. High = tail.

    Replaces `torch.stack([knn_density(x, k)[assignments == c].mean() for c in range(n_clusters)])`.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16. Neighbours are searched in all of x, not in the cluster alone.
        assignments: int [N], the cluster of every row, in [0, n_clusters).
        n_clusters: K.
        k, method, backend: as in `knn_density`.
        density: [N] from `knn_density`, where it is at hand; `k`, `method` and `backend` then do nothing.
        group: as in `knn`; x, assignments and density are of this rank's rows.

    Returns:
        t [K], NaN for an empty cluster: float64 if x is float64 and float32 otherwise. No gradient. With a group the
        same on every rank.

    Raises:
        As `knn_density`.
    """
    op = "cluster_tailness"
    if group is not None:
        return _tailness_shards(op, x, assignments, n_clusters, k, method, density, group, backend)
    if density is None:
        _check_density(op, x, k, method, backend)
    else:
        _check.embeddings(op, "x", x)
        check_rho(op, x, density)
    _check_assignments(op, x, assignments, n_clusters)
    if density is None and method == "ivf":
        density = _ivf_density(x, k, None, None)
    elif density is None:
        density = _exact_density(op, x, k, backend)
    tailness = reference.cluster_tailness(x, assignments, n_clusters, k=k, density=density)
    return tailness.to(wide_dtype(x.dtype))


def _knn_shards(
    op: str,
    x: Tensor,
    k: int,
    y: Tensor | None,
    normalize: bool,
    group: ProcessGroup,
    backend: str,
    method: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Every rank's rows against the shards that pass by, each shard's best combined with the best of those before.

    Earlier shards hold the lower indices, so a stable sort of (best so far, new) leaves ties to the lower index."""
    searched = x if y is None else y
    layout = shards_of(op, group, searched, lambda: _check_shard(op, x, k, y, method, backend, normalize))
    _check.count(op, "k", k, 1, layout.total - (y is None))
    dtype = common_dtype(x, searched)
    best = x.new_full((len(x), k), -torch.inf, dtype=dtype), x.new_full((len(x), k), -1, dtype=torch.int64)
    for first, rows in passing(layout, searched.detach()):
        own = y is None and first == layout.first
        found = min(k, len(rows) - own)
        if len(x) == 0 or found == 0:
            continue
        cosines, indices = knn(x, found, y=None if own else rows, normalize=normalize, backend=backend)
        indices = torch.where(indices < 0, indices, indices + first)
        cosines, order = torch.cat([best[0], cosines], dim=1).sort(dim=1, descending=True, stable=True)
        best = cosines[:, :k], torch.cat([best[1], indices], dim=1).gather(1, order[:, :k])
    return best


def _check_shard(
    op: str, x: Tensor, k: int, y: Tensor | None, method: str, backend: str, normalize: bool
) -> dict[str, object]:
    """Checks one rank; returns what must be the same on all."""
    _check.embeddings(op, "x", x, allow_empty=True)
    if op != "knn":  # whose NaN shows in its cosines
        _check.finite_rows(op, "x", x)
    if y is not None:
        _check.same_width(op, "y", y, "x", x, allow_empty=True)
    _check.flag(op, "normalize", normalize)
    _check.count(op, "k", k, 1)
    _check.choice(op, "method", method, METHODS)
    use_kernel("knn", backend, x, y)
    return {"k": k, "method": method, "normalize": normalize, "y": "none" if y is None else "a tensor"}


def _tailness_shards(
    op: str,
    x: Tensor,
    assignments: Tensor,
    n_clusters: int,
    k: int,
    method: str,
    density: Tensor | None,
    group: ProcessGroup,
    backend: str,
) -> Tensor:
    def check() -> dict[str, object]:
        if density is None:
            same = _check_shard(op, x, k, None, method, backend, True)
        else:
            _check.embeddings(op, "x", x, allow_empty=True)
            check_rho(op, x, density)
            same = {}
        _check_assignments(op, x, assignments, n_clusters)
        return {**same, "n_clusters": n_clusters, "density": "none" if density is None else "a tensor"}

    shards_of(op, group, x, check)
    if density is None:
        density = knn_density(x, k, method=method, group=group, backend=backend)
    sums = density.new_zeros(2, n_clusters, dtype=torch.float64)
    sums[0].index_add_(0, assignments.long(), density.double())
    sums[1].index_add_(0, assignments.long(), torch.ones_like(density, dtype=torch.float64))
    total, count = add(sums, group)
    return (total / count).to(wide_dtype(x.dtype))


def _check_assignments(op: str, x: Tensor, assignments: Tensor, n_clusters: int) -> None:
    _check.count(op, "n_clusters", n_clusters, 1)
    _check.integers(op, "assignments", assignments, x.shape[0], x)
    _check.index_range(op, "assignments", assignments, 0, n_clusters, classes=True)


def check_rho(op: str, x: Tensor, density: Tensor) -> None:
    """A value of `knn_density` for every row of x."""
    allowed = "a float tensor, as knn_density returns"
    _check.require_type(isinstance(density, Tensor), op, "density", allowed, type(density).__name__)
    _check.require_type(density.dtype in _check.FLOAT_DTYPES, op, "density", allowed, density.dtype)
    right = density.dim() == 1 and density.shape[0] == x.shape[0]
    _check.require(right, op, "density", lambda: f"of shape [{x.shape[0]}]", lambda: _check.shape_of(density))
    _check.same_device(op, "density", density, "x", x)


def _check_knn(op: str, x: Tensor, k: int, y: Tensor | None) -> None:
    _check.embeddings(op, "x", x)
    if y is None:
        _check.require(x.shape[0] > 1, op, "x", "at least 2 rows when no y is given", lambda: _check.shape_of(x))
        _check.count(op, "k", k, 1, x.shape[0] - 1)
    else:
        _check.same_width(op, "y", y, "x", x)
        _check.count(op, "k", k, 1, y.shape[0])


def _check_density(op: str, x: Tensor, k: int, method: str, backend: str) -> None:
    _check_knn(op, x, k, None)
    _check.choice(op, "method", method, METHODS)
    _check.choice(op, "backend", backend, BACKENDS)
    if _check.concrete(x):
        _check.finite_rows(op, "x", x)  # NaN ranks first: one such row would be everyone's neighbour


def _ivf_density(x: Tensor, k: int, n_lists: int | None, n_probes: int | None) -> Tensor:
    """FAISS searches k + 1 rows, since a row finds itself; its own entry, or the last one, is dropped."""
    rows = _unit_rows(x)
    index = _ivf_index(rows, k + 1, n_lists, n_probes)
    cosines, indices = _ivf_search(index, rows, rows, k + 1)
    own = indices == torch.arange(len(x), device=x.device)[:, None]
    own[:, -1] |= ~own.any(dim=1)
    rho = (1 - cosines[~own].view(len(x), k)).mean(dim=1)
    return rho.to(wide_dtype(x.dtype))


def _ivf_shards(x: Tensor, k: int, n_lists: int | None, n_probes: int | None, group: ProcessGroup) -> Tensor:
    """The rows of one rank after another pass by; what each rank's file holds for them goes back to their rank."""
    op = "knn_density"

    def check() -> dict[str, object]:
        for name, value in (("n_lists", n_lists), ("n_probes", n_probes)):
            if value is not None:
                _check.count(op, name, value, 1)
        return {**_check_shard(op, x, k, None, "ivf", "auto", True), "n_lists": n_lists, "n_probes": n_probes}

    layout = shards_of(op, group, x, check)
    _check.count(op, "k", k, 1, layout.total - 1)
    rows, index = _unit_rows(x), None
    if len(x):
        n_lists = min(len(x), n_lists or int(4 * len(x) ** 0.5))
        index = _ivf_index(rows, k + 1, n_lists, min(n_lists, n_probes or max(1, n_lists // 8)))
    rho = x.new_empty(0, dtype=wide_dtype(x.dtype))
    for first, passed in passing(layout, rows):
        owner = next(rank for rank, size in enumerate(layout.sizes) if size and layout.offset(rank) == first)
        best = torch.full((len(passed), k), -torch.inf, device=x.device)
        if index is not None:
            cosines, indices = _ivf_search(index, rows, passed, min(k + 1, len(x)))
            if owner == layout.rank:
                cosines[indices == torch.arange(len(x), device=x.device)[:, None]] = -torch.inf
            best = torch.cat([best, cosines], dim=1).topk(k, dim=1).values
        of_ranks = [torch.empty_like(best) for _ in layout.sizes] if owner == layout.rank else None
        dist.gather(best, of_ranks, group=group, group_dst=owner)
        if of_ranks is not None:
            rho = (1 - torch.cat(of_ranks, dim=1).topk(k, dim=1).values).mean(dim=1).to(rho.dtype)
    return rho


def _unit_rows(x: Tensor) -> Tensor:
    return unit_rows(x.detach()).float().contiguous()


def _ivf_index(rows: Tensor, k: int, n_lists: int | None, n_probes: int | None) -> FaissIndex:
    op, n = "knn_density", len(rows)
    n_lists = min(n, int(4 * n**0.5)) if n_lists is None else n_lists
    _check.count(op, "n_lists", n_lists, 1, n)
    n_probes = max(1, n_lists // 8) if n_probes is None else n_probes
    _check.count(op, "n_probes", n_probes, 1, n_lists)
    kind = f"IVF{n_lists},Flat"
    index = FaissIndex(load_faiss(op), kind, rows, inner_product=True, selects=max(k, n_probes))
    index.faiss.cp.min_points_per_centroid = 1
    index.train(rows)
    index.add(rows)
    index.faiss.nprobe = n_probes
    return index


def _ivf_search(index: FaissIndex, base: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosines, indices); rows for which the probed lists hold fewer than k are searched exactly."""
    cosines, indices = index.search(rows, k)
    short = (indices < 0).any(dim=1)
    if short.any():
        cosines[short], indices[short] = knn(rows[short], k, y=base, normalize=False)
    return cosines, indices


@torch.library.register_fake("ltood_fast::knn")
def _(*args, **kwargs):
    call = Arguments("knn", args, kwargs)
    n, dtype = call.x.shape[0], common_dtype(call.x, call.x if call.y is None else call.y)
    return call.x.new_empty(n, call.k, dtype=dtype), call.x.new_empty(n, call.k, dtype=torch.int64)


constant("knn")
