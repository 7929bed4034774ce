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

from ._common import (
    best_k,
    common_dtype,
    full_precision,
    inner_products,
    reduce_rows,
    rows_as_given_in_double,
    unit_rows,
    view_mask,
)
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


def _row_losses(lse: Tensor, attraction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(l_i = lse_i - attraction_i / weight_i, which rows have a positive); rows without one hold 0."""
    has_positive = weight > 0
    rows = lse - attraction / weight.where(has_positive, 1)
    return rows.masked_fill(~has_positive, 0), has_positive


def _keep_digits(losses: tuple[Tensor, Tensor], s: Tensor, sole: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """`losses` with log(1 + exp(rest_i - s_ip)) + excess_i in the rows with one positive p, rest_i = log-sum-exp over
    all rows but i and p: lse_i - s_ip would round a small loss away. sole: [N, N] bool, the entries p."""
    rows, has_positive = losses
    small = F.softplus(_logsumexp(s, ~sole & ~_diagonal(s)) - _entry(s, sole)) + excess
    return small.where(sole.any(dim=1) & has_positive, rows), has_positive


def _sole(positive: Tensor) -> Tensor:
    """[N, N] bool: the positives of the rows that have exactly one."""
    return positive & (positive.sum(dim=1) == 1)[:, None]


def _entry(s: Tensor, sole: Tensor) -> Tensor:
    return s.masked_fill(~sole, 0).sum(dim=1)


def _view_term(s: Tensor, instance_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of s over V(i), |V(i)|)."""
    views = view_mask(s.shape[0], instance_ids, s.device)
    return s.masked_fill(~views, 0).sum(dim=1), views.sum(dim=1)


def _decoupled(s: Tensor, positive: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(log-sum-exp over the negatives, row losses of which it is the denominator): a row without negatives has none."""
    lse = _logsumexp(s, ~positive & ~_diagonal(s))
    weight = positive.sum(dim=1).where(lse > -torch.inf, 0)
    return lse, _row_losses(lse, s.masked_fill(~positive, 0).sum(dim=1), weight)


def _mask_losses(s: Tensor, lse: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Row losses whose positives are those of the mask."""
    attraction, sole = s.masked_fill(~positive, 0).sum(dim=1), _sole(positive)
    excess = _entry(s, sole) - attraction.where(sole.any(dim=1), 0)  # 0, or NaN where a similarity is infinite
    return _keep_digits(_row_losses(lse, attraction, positive.sum(dim=1)), s, sole, excess)


def _same_class(s: Tensor, labels: Tensor) -> Tensor:
    """[N, N] bool: all other rows of the same label."""
    return (labels[:, None] == labels[None, :]) & ~_diagonal(s)


def _psd_losses(
    s: Tensor,
    lse: Tensor,
    instance_ids: Tensor | None,
    neighbors: tuple[Tensor, Tensor],  # of _neighbor_term
    columns: Tensor | None,  # [N, k] of neighbours in the batch, -1 = none
) -> tuple[Tensor, Tensor]:
    attraction, weight = (a + b for a, b in zip(_view_term(s, instance_ids), neighbors, strict=True))
    views = view_mask(len(s), instance_ids, s.device)
    sole, alone = _sole(views), torch.zeros_like(views)
    if columns is not None:  # the places without a neighbour come last
        one = ((columns >= 0).sum(dim=1) == 1) & ~views.any(dim=1)
        alone = alone.scatter(1, columns[:, :1].clamp(min=0), one[:, None])
    s_sole = _entry(s, sole | alone)
    mean = s_sole.where(alone.any(dim=1), attraction / weight.where(weight > 0, 1))
    excess = (s_sole - mean).where((sole | alone).any(dim=1), 0)
    return _keep_digits(_row_losses(lse, attraction, weight), s, sole | alone, excess)


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
    u: Tensor, temperature: float | Tensor, neighbor_weight: float | Tensor, bank: Bank | None, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """(lam_i times the sum of s over M_k(i), lam_i |M_k(i)|); columns [N, k] of u, or of the bank, -1 = none."""
    found = columns >= 0
    similarity = torch.einsum("nd,nkd->nk", u, (u if bank is None else bank.z)[columns.clamp(min=0)]) / temperature
    neighbor_sum = similarity.masked_fill(~found, 0).sum(dim=1)
    if isinstance(neighbor_weight, Tensor):
        neighbor_weight = neighbor_weight.detach().to(u.dtype)
    return neighbor_weight * neighbor_sum, neighbor_weight * found.sum(dim=1)


def _of_other_view(columns: Tensor, instance_ids: Tensor | None) -> Tensor:
    """[N, k]: those that the next view of the row's instance has found, -1 where there is no other view."""
    n = len(columns)
    views = view_mask(n, instance_ids, columns.device)
    step = (torch.arange(n)[None, :] - torch.arange(n)[:, None]).to(columns.device) % n  # from row i on to row j
    other = step.masked_fill(~views, n).argmin(dim=1)
    return columns[other].masked_fill(~views.any(dim=1)[:, None], -1)


@rows_as_given_in_double
def nt_xent(
    z: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    instance_ids: Tensor | None = None,
    decoupled: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = lse_i - mean of s_iv over the other views v of i (SimCLR, Chen 2020); decoupled: lse_i without them."""
    with full_precision(z):
        s, lse = _similarities(unit_rows(z, normalize), temperature)
        positive = view_mask(len(s), instance_ids, s.device)
        lse, losses = _decoupled(s, positive) if decoupled else (lse, _mask_losses(s, lse, positive))
        loss = reduce_rows(*losses, reduction)
    return (loss, lse) if return_lse else loss


@rows_as_given_in_double
def supcon(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    decoupled: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """l_i = lse_i - mean of s_ij over the other rows j of i's label (Khosla 2020, "out" form); decoupled: lse_i without
    them."""
    with full_precision(z):
        s, lse = _similarities(unit_rows(z, normalize), temperature)
        positive = _same_class(s, labels)
        lse, losses = _decoupled(s, positive) if decoupled else (lse, _mask_losses(s, lse, positive))
        loss = reduce_rows(*losses, reduction)
    return (loss, lse) if return_lse else loss


@rows_as_given_in_double
def psd_loss(
    z: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    pairing: str = "same",
    bank: Bank | Tensor | None = None,
    domain: Tensor | None = None,
    instance_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_lse: bool = False,
    return_neighbors: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """l_i = lse_i - (sum_{V(i)} s_iv + lam_i sum_{M_k(i)} s_im) / (|V(i)| + lam_i |M_k(i)|).

    pairing="cross": M_k of the other view in place of M_k(i), its rows without gradient (NNCLR, Dwibedi 2021).
    """
    with full_precision(z):
        u, bank = unit_rows(z, normalize), Bank.of(bank)
        if bank is not None:
            bank = replace(bank, z=unit_rows(bank.z.detach().to(common_dtype(bank.z, u)), normalize).to(u.dtype))
        s, lse = _similarities(u, temperature)
        cosines, columns = _neighbors(u, k, instance_ids, domain, bank)
        if pairing == "cross":
            targets, own = bank or Bank(u.detach()), None
            near = _neighbor_term(u, temperature, neighbor_weight, targets, _of_other_view(columns, instance_ids))
        else:
            near = _neighbor_term(u, temperature, neighbor_weight, bank, columns)
            own = columns if bank is None else None
        loss = reduce_rows(*_psd_losses(s, lse, instance_ids, near, own), reduction)
    extras = ((lse,) if return_lse else ()) + ((cosines, columns) if return_neighbors else ())
    return (loss, *extras) if extras else loss


@rows_as_given_in_double
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


@rows_as_given_in_double
def stage1_loss(
    z: Tensor,
    domain: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    alpha: float = 0.3,
    k: int = 1,
    neighbor_weight: float | Tensor = 1.0,
    pairing: str = "same",
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
        pairing=pairing,
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


def _excluded(ids: tuple[Tensor, Tensor] | None, s: Tensor) -> Tensor:
    if ids is None:
        return torch.zeros_like(s, dtype=torch.bool)
    x, y = ids[0][:, None], ids[1][None, :]
    return (x == y) & (x >= 0)


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
    excluded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows against some columns: (lse [n] float64, cosines [n, k], columns [n, k]). Row i and column i + diagonal
    are the same embedding; lse is -inf where a row has no other. Neighbours are of another instance, of one domain;
    columns of a row's id in `excluded`, if it is not -1, are left out of lse."""
    with torch.no_grad(), full_precision(x):
        _, products, other = _partial_products(x, y, normalize, diagonal)
        s = (products / temperature).double()
        lse = _logsumexp(s, other & ~_excluded(excluded, s))
        if instances is not None:
            other = other & (instances[0][:, None] != instances[1][None, :])
        if domains is not None:
            other = other & (domains[0][:, None] == domains[1][None, :])
        cosines, columns = best_k(products, other, k)
        missing = (0, k - cosines.shape[1])
        cosines, columns = F.pad(cosines, missing, value=-torch.inf), F.pad(columns, missing, value=-1)
        return lse, cosines, columns


def contrastive_partial_bwd(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    diagonal: int,
    of_rows: tuple[Tensor, Tensor],  # lse and its gradient w
    of_columns: tuple[Tensor, Tensor],
    excluded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[n, D]: (1/tau) sum_j G_ij u(y_j) over the other columns, G_ij = w_i exp(s_ij - lse_i) + w_j exp(s_ij - lse_j):
    the gradient of sum w lse, over all rows, at u(x_i)."""
    (x_lse, x_weight), (y_lse, y_weight) = of_rows, of_columns
    with torch.no_grad(), full_precision(x):
        v, products, other = _partial_products(x, y, normalize, diagonal)
        s = (products / temperature).double()
        g = x_weight[:, None] * (s - x_lse[:, None]).exp() + y_weight[None, :] * (s - y_lse[None, :]).exp()
        return (g.masked_fill(~other | _excluded(excluded, s), 0) @ v.double() / temperature).to(v.dtype)
