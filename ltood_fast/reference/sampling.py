"""Plain PyTorch: budgets of clusters, and the OOD rows that they take."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import common_dtype, inner_products, unit_rows


def cluster_budgets(tailness: Tensor, budget: int, temperature: float = 1.0) -> Tensor:
    """int64 [K]: softmax(zscore(tailness) / temperature) * budget, rounded by largest remainder to sum to `budget`.

    The standard deviation is that of the population. A cluster without tailness (NaN: it is empty) gets nothing;
    equal tailness everywhere gives equal shares; ties of the remainder go to the lower cluster.
    """
    t = tailness.double()
    known = ~t.isnan()
    mean = t[known].mean()
    std = (t[known] - mean).square().mean().sqrt()
    equal = t[known].max() == t[known].min()  # std of equal numbers need not be 0 in floating point
    z = torch.zeros_like(t) if equal else (t - mean) / std
    share = torch.softmax((z / temperature).masked_fill(~known, -torch.inf), dim=0) * budget
    budgets = share.floor().long()
    order = (share - budgets).sort(descending=True, stable=True).indices
    budgets[order[: budget - int(budgets.sum())]] += 1
    return budgets


def descending_tailness(tailness: Tensor) -> Tensor:
    """Clusters in the order in which they choose: high tailness first, ties to the lower index, empty ones last."""
    return tailness.nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices


def sample_ood(
    candidates: Tensor,
    centroids: Tensor,
    tailness: Tensor,
    budget: int,
    *,
    temperature: float = 1.0,
    strategy: str = "tailness",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    if strategy == "random":
        device = "cpu" if generator is None else generator.device
        indices = torch.randperm(len(candidates), generator=generator, device=device)[:budget].to(centroids.device)
        return indices, torch.full_like(indices, -1)
    dtype = common_dtype(candidates, centroids)
    cosines = inner_products(unit_rows(centroids).to(dtype), unit_rows(candidates).to(dtype))
    budgets = cluster_budgets(tailness, budget, temperature)
    taken = torch.zeros(len(candidates), dtype=torch.bool, device=centroids.device)
    indices, clusters = [], []
    for cluster in descending_tailness(tailness).tolist():
        ranked = cosines[cluster].sort(descending=True, stable=True).indices
        chosen = ranked[~taken[ranked]][: budgets[cluster]]
        taken[chosen] = True
        indices.append(chosen)
        clusters.append(torch.full_like(chosen, cluster))
    return torch.cat(indices), torch.cat(clusters)
