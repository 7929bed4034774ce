"""Contrastive losses of one set of embeddings, straight from their formulas: N×N, slow and obvious.

Notation: u_i = rows of z (L2-normalised on request), s_ij = <u_i, u_j> / tau, lse_i = log sum_{j != i} exp(s_ij).
Every loss is l_i = lse_i - (weighted mean of s_ij over the positives of i); a row without positives has loss 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import best_k, common_dtype, full_precision, inner_products, reduce_rows, unit_rows, view_mask
from .options import Bank


class Stage1Result(NamedTuple):
    """The stage-1 loss and its parts: total = psd + alpha * domain."""

    total: Tensor
    psd: Tensor
    domain: Tensor


def _diagonal(s: Tensor) -> Tensor:
    return torch.eye(len(s), dtype=torch.bool, device=s.device)


def _logsumexp(s: Tensor, kept: Tensor) -> Tensor:
    """log sum exp of the entries that are kept; -inf, without gradient, where a row has none."""
    empty = ~kept.any(dim=1)
    lse = s.masked_fill(~kept, -torch.inf).masked_fill(empty[:, None], 0).logsumexp(dim=1)
    return lse.masked_fill(empty, -torch.inf)


def _similarities(u: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(s [N, N], lse [N]); lse leaves the diagonal out and is -inf where a row has no other."""
    s = u @ u.T / temperature
    return s, _logsumexp(s, ~_diagonal(s))


def _row_losses(
    s: Tensor, lse: Tensor, positive: Tensor, neighbors: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(l_i = lse_i - weighted mean of s over the positives of i, which rows have one); rows without one hold 0.

    positive: [N, N] bool. neighbors: (lam_i times the sum of s over M_k(i), lam_i |M_k(i)|, the lone neighbours as
    [N, N] bool). A row with one positive p is log(1 + exp(rest_i - s_ip)), rest_i = log-sum-exp over all rows but i and
    p, which keeps the digits of a small loss.
    """
    count, view_sum = positive.sum(dim=1), s.masked_fill(~positive, 0).sum(dim=1)
    neighbor_sum, neighbor_weight = (0, 0) if neighbors is None else neighbors[:2]
    weight = count + neighbor_weight
    has_positive = weight > 0
    divisor = weight.where(has_positive, 1)

    sole = positive & (count == 1)[:, None]
    if neighbors is not None:
        sole = sole | (neighbors[2] & (count == 0)[:, None])
    s_sole = s.masked_fill(~sole, 0).sum(dim=1)
    excess = (count * s_sole - view_sum + (neighbor_weight * s_sole - neighbor_sum)) / divisor
    small = F.softplus(_logsumexp(s, ~sole & ~_diagonal(s)) - s_sole) + excess
    rows = small.where(sole.any(dim=1), lse - (view_sum + neighbor_sum) / divisor)
    return rows.masked_fill(~has_positive, 0), has_positive


def _class_losses(s: Tensor, lse: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """SupCon's rows: the positives are all other rows of the same label."""
    return _row_losses(s, lse, (labels[:, None] == labels[None, :]) & ~_diagonal(s))


def _neighbors(
    u: Tensor,  # [N, D]
    k: int,
    instance_ids: Tensor | None,
    domain: Tensor | None,
    bank: Bank | None,  # rows as u's
) -> tuple[Tensor, Tensor]:
    """(cosines [N, k], columns [N, k]) of M_k(i): in the batch, or in the bank. No gradient."""
    n = u.shape[0]
    if bank is None:
        admissible = ~view_mask(n, instance_ids, u.device) & ~torch.eye(n, dtype=torch.bool, device=u.device)
        column_domain = domain
    else:
        admissible = torch.ones(n, bank.z.shape[0], dtype=torch.bool, device=u.device)
        if bank.ids is not None:
            admissible = instance_ids[:, None] != bank.ids[None, :]
        column_domain = bank.domain
    if column_domain is not None:
        admissible = admissible & (domain[:, None] == column_domain[None, :])
    u = u.detach()
    return best_k(inner_products(u, u if bank is None else bank.z), admissible, k)


def _neighbor_term(
    u: Tensor,
    s: Tensor,
    temperature: float | Tensor,
    neighbor_weight: float | Tensor,
    bank: Bank | None,
    columns: Tensor,  # [N, k], -1 = none
) -> tuple[Tensor, Tensor, Tensor]:
    """(lam_i times the sum of s over M_k(i), lam_i |M_k(i)|, [N, N] bool: neighbours in the batch that are alone)."""
    found, chosen = columns >= 0, columns.clamp(min=0)
    if bank is None:
        similarity = s.gather(1, chosen)
    else:
        similarity = torch.einsum("nd,nkd->nk", u, bank.z[chosen]) / temperature
    neighbor_sum = similarity.masked_fill(~found, 0).sum(dim=1)
    if isinstance(neighbor_weight, Tensor):
        neighbor_weight = neighbor_weight.detach().to(u.dtype)
    alone = torch.zeros_like(s, dtype=torch.bool)
    if bank is None:
        one = found.sum(dim=1, keepdim=True) == 1
        alone = alone.scatter(1, chosen[:, :1], one)  # the places without a neighbour come last
    return neighbor_weight * neighbor_sum, neighbor_weight * found.sum(dim=1), alone


def nt_xent(
    z: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = lse_i - mean of s_iv over the other views v of i (SimCLR, Chen 2020)."""
    with full_precision(z):
        s, lse = _similarities(unit_rows(z, normalize), temperature)
        loss = reduce_rows(*_row_losses(s, lse, view_mask(len(s), instance_ids, s.device)), reduction)
    return (loss, lse) if return_lse else loss


def supcon(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = lse_i - mean of s_ij over the other rows j of i's label (Khosla 2020, "out" form)."""
    with full_precision(z):
        s, lse = _similarities(unit_rows(z, normalize), temperature)
        loss = reduce_rows(*_class_losses(s, lse, labels), reduction)
    return (loss, lse) if return_lse else loss


def psd_loss(
    z: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    bank: Bank | Tensor | None = None,
    domain: Tensor | None = None,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    return_neighbors: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """l_i = lse_i - (sum_{V(i)} s_iv + lam_i sum_{M_k(i)} s_im) / (|V(i)| + lam_i |M_k(i)|)."""
    with full_precision(z):
        u, bank = unit_rows(z, normalize), Bank.of(bank)
        if bank is not None:
            bank = replace(bank, z=unit_rows(bank.z.detach().to(common_dtype(bank.z, u)), normalize).to(u.dtype))
        s, lse = _similarities(u, temperature)
        cosines, columns = _neighbors(u, k, instance_ids, domain, bank)
        near = _neighbor_term(u, s, temperature, neighbor_weight, bank, columns)
        loss = reduce_rows(*_row_losses(s, lse, view_mask(len(s), instance_ids, s.device), near), reduction)
    extras = ((lse,) if return_lse else ()) + ((cosines, columns) if return_neighbors else ())
    return (loss, *extras) if extras else loss


def domain_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    kind: str = "supcon",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`supcon` with the domains as labels, or ("bce") binary cross-entropy of a linear head on the embeddings."""
    if kind == "supcon":
        return supcon(z, domain, temperature, normalize=normalize, reduction=reduction, return_lse=return_lse)
    with full_precision(z):
        u = unit_rows(z, normalize)
        logits = u @ weight.to(u.dtype) + bias.to(u.dtype)
        return F.binary_cross_entropy_with_logits(logits, domain.to(u.dtype), reduction=reduction)


def stage1_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    alpha: float = 0.3,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    same_domain: bool = True,
    bank: Bank | Tensor | None = None,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    return_neighbors: bool = False,
) -> Stage1Result | tuple:
    """total = psd_loss + alpha * domain_loss, both over the same similarities."""
    psd, lse, cosines, columns = psd_loss(
        z,
        temperature,
        k=k,
        neighbor_weight=neighbor_weight,
        bank=bank,
        domain=domain if same_domain else None,
        instance_ids=instance_ids,
        normalize=normalize,
        reduction=reduction,
        return_lse=True,
        return_neighbors=True,
    )
    separation = domain_loss(z, domain, temperature, normalize=normalize, reduction=reduction)
    result = Stage1Result(psd + alpha * separation, psd, separation)
    extras = ((lse,) if return_lse else ()) + ((cosines, columns) if return_neighbors else ())
    return (result, *extras) if extras else result


def _partial_products(x: Tensor, y: Tensor, normalize: bool, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
    """(unit rows of y, their inner products [n, M] with the rows of x, where row i is not column i + diagonal)."""
    u, v = unit_rows(x, normalize), unit_rows(y, normalize)
    rows, columns = torch.arange(len(u), device=u.device), torch.arange(len(v), device=u.device)
    return v, inner_products(u, v), rows[:, None] + diagonal != columns[None, :]


def contrastive_partial(
    x: Tensor,  # [n, D]
    y: Tensor,  # [M, D]
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    k: int = 0,
    instances: tuple[Tensor, Tensor] | None = None,  # of the rows, of the columns
    domains: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows against some columns: (lse [n] float64, cosines [n, k], columns [n, k]). Row i and column i + diagonal
    are the same embedding; lse is -inf where a row has no other. Neighbours are of another instance, of one domain."""
    with torch.no_grad(), full_precision(x):
        _, products, other = _partial_products(x, y, normalize, diagonal)
        s = (products / temperature).double()
        alone = ~other.any(dim=1)
        lse = s.masked_fill(~other, -torch.inf).masked_fill(alone[:, None], 0).logsumexp(dim=1)
        if instances is not None:
            other = other & (instances[0][:, None] != instances[1][None, :])
        if domains is not None:
            other = other & (domains[0][:, None] == domains[1][None, :])
        cosines, columns = best_k(products, other, k)
        missing = (0, k - cosines.shape[1])
        cosines, columns = F.pad(cosines, missing, value=-torch.inf), F.pad(columns, missing, value=-1)
        return lse.masked_fill(alone, -torch.inf), cosines, columns


def contrastive_partial_bwd(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    of_rows: tuple[Tensor, Tensor],  # lse and its gradient w
    of_columns: tuple[Tensor, Tensor],
) -> Tensor:
    """[n, D]: (1/tau) sum_j G_ij u(y_j) over the other columns, G_ij = w_i exp(s_ij - lse_i) + w_j exp(s_ij - lse_j):
    the gradient of sum w lse, over all rows, at u(x_i)."""
    (x_lse, x_weight), (y_lse, y_weight) = of_rows, of_columns
    with torch.no_grad(), full_precision(x):
        v, products, other = _partial_products(x, y, normalize, diagonal)
        s = (products / temperature).double()
        g = x_weight[:, None] * (s - x_lse[:, None]).exp() + y_weight[None, :] * (s - y_lse[None, :]).exp()
        return (g.masked_fill(~other, 0) @ v.double() / temperature).to(v.dtype)
