"""Which OOD images join the training set: the nearest to the centroids of high tailness, within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import _check
from ..ops._group import RankLayout
from ..ops._shards import agree, fingerprint
from ..reference._common import common_dtype, unit_rows
from ..reference.sampling import cluster_budgets, descending_tailness

STRATEGIES = ("tailness", "random")
ROWS = 16384  # candidates a block by default


def sample_ood(
    candidates: Tensor | np.ndarray | Iterable[Tensor],
    centroids: Tensor,
    tailness: Tensor,
    budget: int,
    *,
    temperature: float = 1.0,
    strategy: str = "tailness",
    generator: torch.Generator | None = None,
    block_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
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

    Candidates are read once, a block at a time, and any cut into chunks gives the same bits (docs/numerics.md).

    Args:
        candidates: [M, D] float64, float32, bfloat16 or float16, or an iterable of such chunks [m, D] in row
            order, or a NumPy array, of which a block at a time is read: `np.load(path, mmap_mode="r")` streams a file.
            They may be on another device than the centroids: each block is moved there.
        centroids: [K, D] of the in-distribution clusters.
        tailness: float [K] from `cluster_tailness`; NaN (an empty cluster) gets no budget.
        budget: rows to choose, at most M.
        temperature: positive; high = equal shares, low = all to the cluster of highest tailness.
        strategy: "tailness", or "random": uniformly among all candidates, without replacement.
        generator: random state for "random"; torch's global one by default. With a group rank 0's decides.
        block_rows: candidates whose cosines to the K centroids are in memory at a time; 16384 by default.
        group: the candidates are this rank's part of those of all ranks of the group, concatenated in rank order; a
            rank may hold none. Centroids, tailness and options are the same on all ranks. Each rank keeps its best
            rows, and all ranks merge them, a cluster at a time. None: this process holds all candidates.

    Returns:
        (indices int64 [budget], cluster int64 [budget]) on the device of the centroids: rows of the candidates, grouped
        by cluster in the order of choice and nearest first, and the cluster that took each; -1 for "random". With a
        group the same on every rank, rows of the concatenation: those of one process, up to cosines that rounding ties.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or range; fewer candidates than the budget; a candidate,
            centroid or tailness that is not finite. With a group the error of one rank is raised on all ranks.
    """
    op = "sample_ood"
    plan: dict[str, Any] = {}

    def read() -> tuple[int, dict[str, object]]:
        """This rank's candidates, once; their number, and what must be the same on all ranks."""
        _check.embeddings(op, "centroids", centroids)
        _check.finite_rows(op, "centroids", centroids)
        _check_tailness(op, tailness, centroids)
        _check.count(op, "budget", budget, 1)
        _check.positive_number(op, "temperature", temperature)
        _check.choice(op, "strategy", strategy, STRATEGIES)
        given = generator is None or isinstance(generator, torch.Generator)
        _check.require_type(given, op, "generator", "a torch.Generator or None", type(generator).__name__)
        rows = ROWS if block_rows is None else block_rows
        _check.count(op, "block_rows", rows, 1)
        chunks = _checked_chunks(op, candidates, centroids, rows, allow_empty=group is not None)
        if strategy == "random":
            plan["count"] = sum(len(chunk) for chunk in chunks)
        else:
            order = descending_tailness(tailness)
            shares = cluster_budgets(tailness, budget, temperature)[order]
            plan["order"], plan["shares"] = order[shares > 0], shares[shares > 0].tolist()
            plan["keep"] = list(itertools.accumulate(plan["shares"]))
            plan["best"], plan["count"] = _best_candidates(chunks, centroids[plan["order"]], plan["keep"], rows)
        if group is None:  # none to compare them with
            return plan["count"], {}
        same = {"centroids": fingerprint(centroids), "tailness": fingerprint(tailness)}
        return plan["count"], {**same, "options": (budget, temperature, strategy)}

    layout = None if group is None else agree(op, group, read)
    count = read()[0] if layout is None else layout.total
    _check.require(count >= budget, op, "candidates", f"at least as many rows as the budget {budget}", f"{count} rows")
    if strategy == "random":
        device = "cpu" if generator is None else generator.device
        indices = torch.randperm(count, generator=generator, device=device)[:budget].to(centroids.device)
        if group is not None:
            dist.broadcast(indices, group=group, group_src=0)
        return indices, torch.full_like(indices, -1)
    best = plan["best"] if layout is None else _merge_ranks(plan["best"], plan["keep"], layout)
    return _take(best, plan["order"], plan["shares"])


def _check_tailness(op: str, tailness: Tensor, centroids: Tensor) -> None:
    _check.require_type(isinstance(tailness, Tensor), op, "tailness", "a float tensor", type(tailness).__name__)
    _check.require_type(tailness.dtype.is_floating_point, op, "tailness", "a float tensor", tailness.dtype)
    k = len(centroids)
    _check.require(tailness.shape == (k,), op, "tailness", f"of shape [{k}]", _check.shape_of(tailness))
    _check.same_device(op, "tailness", tailness, "centroids", centroids)
    _check.require(not bool(tailness.isinf().any()), op, "tailness", "finite, or NaN for an empty cluster", "inf")
    _check.require(not bool(tailness.isnan().all()), op, "tailness", "known for a cluster at least", "NaN for all")


def _read(array: np.ndarray, rows: int) -> Iterator[Tensor]:
    for first in range(0, len(array), rows):
        yield torch.from_numpy(np.array(array[first : first + rows]))  # a copy: a memory map need not be writable


def _checked_chunks(
    op: str, candidates: Tensor | np.ndarray | Iterable[Tensor], centroids: Tensor, rows: int, *, allow_empty: bool
) -> Iterator[Tensor]:
    if isinstance(candidates, Tensor):
        _check.embeddings(op, "candidates", candidates, allow_empty=True)
    if isinstance(candidates, np.ndarray):
        right = candidates.dtype in (np.float64, np.float32, np.float16) and candidates.dtype.isnative
        allowed = "float64, float32 or float16 in this machine's byte order"
        _check.require_type(right, op, "candidates", allowed, candidates.dtype)
        _check.require(candidates.ndim == 2, op, "candidates", "a matrix [M, D]", f"shape {candidates.shape}")
        chunks = _read(candidates, rows)
    else:
        chunks = candidates.split(rows) if isinstance(candidates, Tensor) else candidates
    allowed = "a tensor or an iterable of tensors"
    _check.require_type(isinstance(chunks, Iterable), op, "candidates", allowed, type(candidates).__name__)
    width, seen = centroids.shape[1], 0
    for chunk in chunks:
        _check.embeddings(op, "candidates", chunk, allow_empty=allow_empty)
        allowed = f"{width} wide as centroids is"
        _check.require(chunk.shape[1] == width, op, "candidates", allowed, _check.shape_of(chunk))
        _check.finite_rows(op, "candidates", chunk, first=seen)
        seen += len(chunk)
        yield chunk.detach()


def _blocks(chunks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same candidates in equal blocks: products over equal blocks have equal bits, however the rows came."""
    pending = None
    for chunk in chunks:
        pending = chunk if pending is None else torch.cat([pending, chunk])
        while len(pending) >= rows:
            yield pending[:rows]
            pending = pending[rows:]
    if pending is not None and len(pending):
        yield pending


def _best_candidates(
    chunks: Iterable[Tensor], centroids: Tensor, keep: list[int], rows: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """For every centroid (cosines, rows) of its best `keep` candidates, best first; and the number of candidates."""
    device = centroids.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    best = [(none.to(common_dtype(centroids, centroids)), none) for _ in keep]
    count = 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for block in _blocks(chunks, rows):
            block = block.to(device)
            dtype = common_dtype(block, centroids)
            c, x = unit_rows(centroids).to(dtype), unit_rows(block).to(dtype)
            cosines = c @ x.T
            for p, (ranked, found) in enumerate(best):
                new = _contenders(cosines[p], ranked, keep[p], x.shape[1])
                exact = (x[new].double() * c[p].double()).sum(dim=1).to(dtype)
                best[p] = _merge(ranked, found, exact, count + new, keep[p])
            count += len(block)
    return best, count


def _contenders(cosines: Tensor, ranked: Tensor, keep: int, width: int) -> Tensor:
    """The rows of a block that may be among the best `keep`, given the ranked cosines of the rows before. The cosines
    of the block come from a matrix product, which rounds equal rows differently: hence the margin."""
    worst = ranked[-1] if len(ranked) == keep else -torch.inf
    if len(cosines) > keep:
        worst = max(worst, cosines.topk(keep).values[-1])
    margin = 4 * width * torch.finfo(cosines.dtype).eps
    return (cosines >= worst - margin).nonzero()[:, 0]


def _merge(ranked: Tensor, found: Tensor, cosines: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Merge further rows into the ranked ones; ties go to the lower row. Cosines are sums row by row, the same for
    equal rows wherever they stand."""
    cosines, rows = torch.cat([ranked, cosines]), torch.cat([found, rows])
    cosines, order = cosines.sort(descending=True, stable=True)
    return cosines[:keep], rows[order[:keep]]


def _merge_ranks(
    ranked: list[tuple[Tensor, Tensor]], keep: list[int], layout: RankLayout
) -> list[tuple[Tensor, Tensor]]:
    """Every centroid's best of the bests of all ranks. Ranks follow each other by row number, so a stable sort leaves
    ties to the lower row. Cosines and rows travel as float64, which holds both exactly."""
    merged = []
    for (cosines, rows), most in zip(ranked, keep, strict=True):
        mine = cosines.new_zeros(2, most, dtype=torch.float64)
        mine[:, : len(rows)] = torch.stack([cosines.double(), (rows + layout.first).double()])
        of_ranks = [torch.empty_like(mine) for _ in layout.sizes]
        dist.all_gather(of_ranks, mine, group=layout.group)
        found = torch.cat([best[:, :count] for best, count in zip(of_ranks, layout.sizes, strict=True)], dim=1)
        cosines, order = found[0].sort(descending=True, stable=True)
        merged.append((cosines[:most], found[1, order[:most]].long()))
    return merged


def _take(ranked: list[tuple[Tensor, Tensor]], order: Tensor, shares: list[int]) -> tuple[Tensor, Tensor]:
    """Let the clusters choose one after another."""
    indices = order.new_empty(0)
    for (_, rows), share in zip(ranked, shares, strict=True):
        indices = torch.cat([indices, rows[~torch.isin(rows, indices)][:share]])
    return indices, order.repeat_interleave(torch.tensor(shares, device=order.device))
