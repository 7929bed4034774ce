"""Which OOD images join the training set: the nearest to the centroids of high tailness, within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..ops import _check
from ..reference._common import common_dtype, unit_rows
from ..reference.sampling import cluster_budgets, descending_tailness

STRATEGIES = ("tailness", "random")
ROWS = 16384  # candidates a block: their cosines to K centroids are in memory at a time


def sample_ood(
    candidates: Tensor | Iterable[Tensor],
    centroids: Tensor,
    tailness: Tensor,
    budget: int,
    *,
    temperature: float = 1.0,
    strategy: str = "tailness",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `budget` candidates, more of them for clusters of higher tailness.

    Cluster c may take softmax(zscore(tailness) / temperature)_c * budget rows, rounded by largest remainder to sum to
    the budget exactly (the form of COLT, Bai et al. 2023; population standard deviation). Clusters choose in descending
    tailness, each its nearest candidates by cosine that no cluster before it took; ties go to the lower index. Every
    candidate is open to every cluster, so none runs out before the candidates do. Replaces

    ```
    cosines = F.normalize(centroids) @ F.normalize(candidates).T     # [K, M] in memory
    for c in tailness.argsort(descending=True):
        rows = cosines[c].argsort(descending=True)
        rows = rows[~taken[rows]][:budgets[c]]
        taken[rows] = True
    ```

    Candidates are read once, block by block. The cluster that chooses p-th loses at most the rows that the p - 1 before
    it take, so its best budget_1 + ... + budget_p rows are all that must be kept: memory is O(K budget) whatever the
    number of candidates, and a tensor and any cut of it into chunks give the same bits.

    Args:
        candidates: [M, D] float64, float32, bfloat16 or float16, or an iterable of such chunks [m, D] in row
            order. They may be on another device than the centroids: each block is moved there.
        centroids: [K, D] of the in-distribution clusters.
        tailness: float [K] from `cluster_tailness`; NaN (an empty cluster) gets no budget.
        budget: rows to choose, at most M.
        temperature: positive; high = equal shares, low = all to the cluster of highest tailness.
        strategy: "tailness", or "random": uniformly among all candidates, without replacement.
        generator: random state for "random"; torch's global one by default.

    Returns:
        (indices int64 [budget], cluster int64 [budget]) on the device of the centroids: rows of the candidates, grouped
        by cluster in the order of choice and nearest first, and the cluster that took each; -1 for "random".

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or range; fewer candidates than the budget; a candidate,
            centroid or tailness that is not finite. The sentence names the argument.
    """
    op = "sample_ood"
    _check.embeddings(op, "centroids", centroids)
    _check.finite_rows(op, "centroids", centroids)
    _check_tailness(op, tailness, centroids)
    _check.count(op, "budget", budget, 1)
    _check.positive_number(op, "temperature", temperature)
    _check.choice(op, "strategy", strategy, STRATEGIES)
    chunks = _checked_chunks(op, candidates, centroids)
    if strategy == "random":
        count = sum(len(chunk) for chunk in chunks)
        _check_count(op, count, budget)
        device = "cpu" if generator is None else generator.device
        indices = torch.randperm(count, generator=generator, device=device)[:budget].to(centroids.device)
        return indices, torch.full_like(indices, -1)
    order = descending_tailness(tailness)
    shares = cluster_budgets(tailness, budget, temperature)[order]
    order, shares = order[shares > 0], shares[shares > 0]
    ranked, count = _best_candidates(chunks, centroids[order], shares.cumsum(0).tolist())
    _check_count(op, count, budget)
    return _take(ranked, order, shares.tolist(), count)


def _check_tailness(op: str, tailness: Tensor, centroids: Tensor) -> None:
    _check.require_type(isinstance(tailness, Tensor), op, "tailness", "a float tensor", type(tailness).__name__)
    _check.require_type(tailness.dtype.is_floating_point, op, "tailness", "a float tensor", tailness.dtype)
    k = len(centroids)
    _check.require(tailness.shape == (k,), op, "tailness", f"of shape [{k}]", f"shape {tuple(tailness.shape)}")
    _check.same_device(op, "tailness", tailness, "centroids", centroids)
    _check.require(not bool(tailness.isinf().any()), op, "tailness", "finite, or NaN for an empty cluster", "inf")
    _check.require(not bool(tailness.isnan().all()), op, "tailness", "known for a cluster at least", "NaN for all")


def _check_count(op: str, count: int, budget: int) -> None:
    _check.require(count >= budget, op, "candidates", f"at least as many rows as the budget {budget}", f"{count} rows")


def _checked_chunks(op: str, candidates: Tensor | Iterable[Tensor], centroids: Tensor) -> Iterator[Tensor]:
    chunks = candidates.split(ROWS) if isinstance(candidates, Tensor) else candidates
    allowed = "a tensor or an iterable of tensors"
    _check.require_type(isinstance(chunks, Iterable), op, "candidates", allowed, type(candidates).__name__)
    width, seen = centroids.shape[1], 0
    for chunk in chunks:
        _check.embeddings(op, "candidates", chunk)
        allowed = f"{width} wide as centroids is"
        _check.require(chunk.shape[1] == width, op, "candidates", allowed, f"shape {tuple(chunk.shape)}")
        _check.finite_rows(op, "candidates", chunk, first=seen)
        seen += len(chunk)
        yield chunk.detach()


def _blocks(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in blocks of ROWS: products over equal blocks have equal bits, however the rows came."""
    pending = None
    for chunk in chunks:
        pending = chunk if pending is None else torch.cat([pending, chunk])
        while len(pending) >= ROWS:
            yield pending[:ROWS]
            pending = pending[ROWS:]
    if pending is not None and len(pending):
        yield pending


def _best_candidates(
    chunks: Iterable[Tensor], centroids: Tensor, keep: list[int]
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """For every centroid (cosines, rows) of its best `keep` candidates, best first; and the number of candidates."""
    device = centroids.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    best = [(none.to(common_dtype(centroids, centroids)), none) for _ in keep]
    count = 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for block in _blocks(chunks):
            block = block.to(device)
            dtype = common_dtype(block, centroids)
            cosines = unit_rows(centroids).to(dtype) @ unit_rows(block).to(dtype).T
            best = [_merge(*best[p], cosines[p], count, keep[p]) for p in range(len(keep))]
            count += len(block)
    return best, count


def _merge(cosines: Tensor, rows: Tensor, block: Tensor, first: int, keep: int) -> tuple[Tensor, Tensor]:
    """Merge the cosines of a block, whose rows begin at `first`, into the ranked ones; ties go to the lower row."""
    if len(rows) == keep:
        (new,) = (block > cosines[-1]).nonzero(as_tuple=True)
    else:
        new = torch.arange(len(block), device=block.device)
    cosines, rows = torch.cat([cosines, block[new]]), torch.cat([rows, first + new])
    cosines, order = cosines.sort(descending=True, stable=True)
    return cosines[:keep], rows[order[:keep]]


def _take(ranked: list[tuple[Tensor, Tensor]], order: Tensor, shares: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Let the clusters choose one after another."""
    taken = torch.zeros(count, dtype=torch.bool, device=order.device)
    indices = []
    for (_, rows), share in zip(ranked, shares, strict=True):
        chosen = rows[~taken[rows]][:share]
        taken[chosen] = True
        indices.append(chosen)
    return torch.cat(indices), order.repeat_interleave(torch.tensor(shares, device=order.device))
