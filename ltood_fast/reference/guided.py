"""Stage 2 in plain PyTorch, N×N on purpose: guided contrastive loss, distillation, farthest clusters.

Legend: N rows, D features, K clusters. z student [N, D], e guide [N, Dg] with unit rows and no gradient, c = clusters,
s_ij = <z_i, z_j> / tau, cos_ij = <e_i, e_j>.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    best_k,
    common_dtype,
    full_precision,
    inner_products,
    not_negative,
    reduce_rows,
    rows_as_given_in_double,
    unit_rows,
    view_mask,
    wide,
)
from .options import Distill


class Stage2Result(NamedTuple):
    """The result of stage2_loss: total = guided + beta * distill."""

    total: Tensor
    guided: Tensor
    distill: Tensor


def guide_cosines(guide: Tensor, like: Tensor) -> Tensor:
    """[N, N] cosines of the guide in the dtype of `like`, without gradient."""
    e = unit_rows(guide.detach().to(common_dtype(guide, like))).to(like.dtype)
    return inner_products(e, e)


def positive_mask(cosines: Tensor, k: int, pos_idx: Tensor | None, instance_ids: Tensor | None) -> Tensor:
    """[N, N] bool, j in P(i) = V(i) + M_k(i), a set: what is named twice counts once, and i is never in it."""
    n = cosines.shape[0]
    myself = torch.eye(n, dtype=torch.bool, device=cosines.device)
    views = view_mask(n, instance_ids, cosines.device)
    if pos_idx is None:
        pos_idx = best_k(cosines, ~views & ~myself, k)[1]
    chosen = torch.zeros(n, n + 1, dtype=torch.bool, device=cosines.device)
    chosen = chosen.scatter(1, pos_idx.long() % (n + 1), True)[:, :n]  # -1, no neighbour, falls into the column n
    return (views | chosen) & ~myself


def negative_mask(positive: Tensor, clusters: Tensor, far: Tensor) -> Tensor:
    """[N, N] bool, j in N(i): the farthest cluster except P(i) and i; all rows but P(i) and i where that is empty."""
    others = ~positive & ~torch.eye(len(positive), dtype=torch.bool, device=positive.device)
    farthest = (clusters[None, :] == far.long()[clusters.long()][:, None]) & others
    return torch.where(farthest.any(dim=1, keepdim=True), farthest, others)


@rows_as_given_in_double
def guided_contrastive(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    k: int = 5,
    pos_idx: Tensor | None = None,
    weighted: bool = True,
    gamma: float = 1.0,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = lse_i - sum_{p in P(i)} w+_ip s_ip / sum_{p in P(i)} w+_ip, where
    lse_i = log( sum_{q in P(i)} exp(s_iq) + sum_{n in N(i)} w-_in exp(s_in) )."""
    with full_precision(z):
        z = unit_rows(z, normalize)
        s = z @ z.T / temperature
        cosines = guide_cosines(guide, z)
        positive = positive_mask(cosines, k, pos_idx, instance_ids)
        negative = negative_mask(positive, clusters, far)
        if weighted:
            attract = ((1 + cosines) / 2).clamp(min=0) ** gamma
            repel = ((1 - cosines) / 2).clamp(min=0) ** gamma
        else:
            attract = repel = torch.ones_like(cosines)

        terms = torch.where(positive, s, s + repel.log()).masked_fill(~(positive | negative), -torch.inf)
        alone = (terms == -torch.inf).all(dim=1)  # no term at all: N = 1, or no positive and no force
        lse = terms.masked_fill(alone[:, None], 0).logsumexp(dim=1).masked_fill(alone, -torch.inf)

        if pos_idx is None:  # a cosine that is NaN leaves open who is near
            others = ~view_mask(len(s), instance_ids, s.device) & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
            unknown = (cosines.isnan() & others).any(dim=1)
            lse, attract = lse.masked_fill(unknown, torch.nan), attract.masked_fill(unknown[:, None], torch.nan)

        attract = torch.where(positive, attract, 0)
        total_weight = attract.sum(dim=1)
        has_positive = total_weight != 0  # true for NaN, which has to reach the loss
        mean_positive = torch.where(positive, attract * s, 0).sum(dim=1) / torch.where(has_positive, total_weight, 1)
        rows = not_negative(torch.where(has_positive, lse - mean_positive, 0))
        loss = reduce_rows(rows, has_positive, reduction)
        return (loss, lse) if return_lse else loss


def off_diagonal(x: Tensor) -> Tensor:
    """[N, N] -> [N, N - 1]: the rows without their diagonal entry."""
    n = x.shape[0]
    return x.flatten()[1:].reshape(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


@rows_as_given_in_double
def relational_distill(
    z: Tensor,
    guide: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    teacher_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = KL( softmax_{j != i}(cos_ij / tau_t) || softmax_{j != i}(s_ij) ). The teacher's side has no gradient."""
    with full_precision(z):
        z = unit_rows(z, normalize)
        if teacher_temperature is None:
            teacher_temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
        s = off_diagonal(z @ z.T / temperature)
        log_p = off_diagonal(guide_cosines(guide, z) / teacher_temperature).log_softmax(dim=1)
        rows = not_negative((log_p.exp() * (log_p - s.log_softmax(dim=1))).sum(dim=1))
        loss = reduce_rows(rows, torch.ones_like(rows, dtype=torch.bool), reduction)
        return (loss, s.logsumexp(dim=1)) if return_lse else loss


def feature_distill(z: Tensor, guide: Tensor, *, reduction: str = "mean") -> Tensor:
    """l_i = 1 - cos(z_i, e_i)."""
    with full_precision(z):
        z = unit_rows(z)
        e = unit_rows(guide.detach().to(common_dtype(guide, z))).to(z.dtype)
        rows = not_negative(1 - (z * e).sum(dim=1))
        return reduce_rows(rows, torch.ones_like(rows, dtype=torch.bool), reduction)


@rows_as_given_in_double
def stage2_loss(
    z: Tensor,
    guide: Tensor,
    clusters: Tensor,
    far: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    beta: float = 0.4,
    distill: Distill | str = "relational",
    k: int = 5,
    pos_idx: Tensor | None = None,
    weighted: bool = True,
    gamma: float = 1.0,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Stage2Result | tuple[Stage2Result, Tensor]:
    """guided + beta * distill; the log-sum-exp is that of the guided loss."""
    guided, lse = guided_contrastive(
        z,
        guide,
        clusters,
        far,
        temperature,
        k=k,
        pos_idx=pos_idx,
        weighted=weighted,
        gamma=gamma,
        instance_ids=instance_ids,
        normalize=normalize,
        reduction=reduction,
        return_lse=True,
    )
    distill = Distill.of(distill)
    if distill.kind == "relational":
        options = {"teacher_temperature": distill.teacher_temperature, "normalize": normalize}
        distilled = relational_distill(z, guide, temperature, reduction=reduction, **options)
    else:
        distilled = feature_distill(z, guide, reduction=reduction)
    losses = Stage2Result(guided + beta * distilled, guided, distilled)
    return (losses, lse) if return_lse else losses


def farthest_cluster(centroids: Tensor) -> Tensor:
    """far [K] int64: the other cluster of least centroid cosine, ties to the lower index; [0] when K = 1."""
    c = unit_rows(wide(centroids.detach()))
    return inner_products(c, c).fill_diagonal_(torch.inf).argmin(dim=1)
